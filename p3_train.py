"""Train a digit classifier for a target domain (problem 3): MNIST-M to SVHN or USPS.

  python3 p3_train.py --method dann    --target svhn    # DANN: labels of the source, images of the target
  python3 p3_train.py --method dann-st --target svhn    # our best: self-training (usps: with DANN)
  python3 p3_train.py --method source  --target svhn    # lower bound: trained on MNIST-M alone
  python3 p3_train.py --method target  --target svhn    # upper bound: trained on the target's labels
  python3 p3_train.py --resume runs/p3_dann-st_svhn_000

--data is a folder with mnistm/, svhn/ and usps/. Adaptation receives target training images and no target label; its
checkpoint is chosen by held-out source accuracy and the mutual information of target predictions, a student's by the
latter alone. Validation data is never read. The run folder is as that of p1_train.py.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import math
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.device import autocast, device_and_format, step_generator
from common.ema import EMA, reestimate_batch_norm
from common.errors import Parser, UserError, run_main
from common.options import from_zero, positive_float, positive_int, share_of_one, weight
from common.parallel import mean_of_shares, share
from common.run import add_common_options, given_options, parse_with_resume
from common.trainer import LabelTrainer, Trainer, descend
from datasets.augment import cutout, digit_input, geometry, negatives, neighbours, soften
from datasets.digits import CLASSES, Folds, load_digits, load_folds
from datasets.images import describe
from models.dann import (
    NETWORKS,
    Dann,
    DomainClassifier,
    adaptation_factor,
    reverse_gradient,
)

SOURCE = "mnistm"
SCORED = 3000  # target training images on which the label-free validator looks
RAMP = 0.15  # self-training starts after this share of the first network's steps
OWN = 0.4  # a student labels for itself after this share of its steps
BASELINES = ("source", "target")
# options that the baselines have no use for
USELESS = {"fit", "neighbours", "separate", "adversary", "self_training", "fade", "threshold", "align", "students"}
USELESS |= {"cutout", "negatives"}
FOR_NETWORK = {
    "resnet34": {"lr": 1e-3, "weight_decay": 5e-2, "size": 28},
    "dann": {"lr": 5e-4, "weight_decay": 5e-3, "size": 32},
}
ADAPTED = FOR_NETWORK["dann"] | {  # both adapted networks
    "network": "dann",
    "separate": True,
    "gray": True,
    "geometry": True,
    "fit": True,
    "soften": True,
}
RECIPES = {
    "source": {"steps": 1000, "ema": 0.99},
    "target": {"steps": 800, "ema": 0.99, "geometry": True},
    "dann": ADAPTED | {"ema": 0.99},
    "dann-st": ADAPTED | {"ema": 0.995, "self_training": 1.0},
}
FIT = {  # how much wider and higher MNIST-M's digits have to be to fill as much of the image as the target's
    "svhn": {"width": (0.75, 1.2), "height": (1.0, 1.5)},
    "usps": {"width": (1.0, 1.5), "height": (1.1, 1.6)},
}
FOR_TARGET = {  # what hangs on method and target
    ("dann", "svhn"): {"steps": 1200, "adversary": 1.0, "neighbours": True},
    ("dann", "usps"): {"steps": 600, "adversary": 0.3},
    ("dann-st", "svhn"): {
        "steps": 4000,
        "adversary": 0.0,
        "neighbours": True,
        "cutout": True,
        "negatives": True,
        "fade": True,
        "students": 1,
    },
    ("dann-st", "usps"): {"steps": 800, "adversary": 0.3},
}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--method", choices=RECIPES, default="dann-st", help="decides the defaults marked *")
    parser.add_argument("--target", choices=("svhn", "usps"), default="svhn", help="domain to adapt to")
    parser.add_argument("--network", choices=NETWORKS, default="resnet34", help="of the baselines source and target")
    parser.add_argument("--data", type=Path, default=Path("hw2_data/digits"), help="folder with mnistm, svhn, usps")
    parser.add_argument("--steps", type=positive_int, help="* updates")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images of each domain per update")
    parser.add_argument("--lr", type=positive_float, help="* AdamW learning rate, to 0 over the second half")
    parser.add_argument("--weight-decay", type=weight, help="* of AdamW")
    parser.add_argument("--ema", type=share_of_one, help="* decay of the weight average: teacher and result")
    parser.add_argument("--size", type=positive_int, help="* side of the images the network sees")
    parser.add_argument("--standardise", action=boolean, default=True, help="mean 0, deviation 1 for each image")
    parser.add_argument("--geometry", action=boolean, default=False, help="* turn, scale and shift images")
    parser.add_argument("--fit", action=boolean, default=False, help="* with --geometry: source digits of target size")
    parser.add_argument("--soften", action=boolean, default=False, help="* blur images, add noise")
    parser.add_argument("--cutout", action=boolean, default=False, help="* hide a square of target images (svhn)")
    parser.add_argument("--neighbours", action=boolean, default=False, help="* source digits get neighbours (svhn)")
    parser.add_argument("--gray", action=boolean, default=False, help="* see all images in gray")
    parser.add_argument("--negatives", action=boolean, default=False, help="* see target images inverted, too (svhn)")
    parser.add_argument(
        "--separate", action=boolean, default=False, help="* learn with batch statistics of each domain"
    )
    parser.add_argument("--adversary", type=weight, default=0.0, help="* weight of the reversed gradient")
    parser.add_argument("--self-training", type=weight, default=0.0, help="* weight of the teacher's labels")
    parser.add_argument("--fade", action=boolean, default=False, help="* source labels count less and less (svhn)")
    parser.add_argument("--threshold", type=weight, default=0.9, help="teacher's confidence, relative to source images")
    parser.add_argument("--align", action=boolean, default=True, help="pull the teacher's classes to equal shares")
    parser.add_argument("--students", type=from_zero, default=0, help="* new networks, each on the labels of the last")
    parser.add_argument("--dim", type=positive_int, default=64, help="width of the extractor; the report has 64")
    parser.add_argument("--eval-every", type=positive_int, default=400, help="steps between evaluations")
    parser.set_defaults(sample_every=10**9, anneal=True)
    add_common_options(parser)
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    o = parse_with_resume(parser, argv, recipe)
    if o.method not in BASELINES and o.students >= o.steps:
        raise UserError(f"--students {o.students} --steps {o.steps}: each network needs a step; give fewer students")
    useless = given_options(parser, argv) & USELESS
    if o.method in BASELINES and useless:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(useless))
        raise UserError(f"{names}: for adaptation; --method {o.method} does not adapt, leave it out")
    if o.method in BASELINES and o.network == "resnet34" and "dim" in given_options(parser, argv):
        raise UserError(f"--dim {o.dim}: the ResNet34 has one width; leave it out, or add --network dann")
    if o.fit and not o.geometry and "fit" in given_options(parser, argv):
        raise UserError("--fit: a part of --geometry; leave out --no-geometry")
    return o


def recipe(o: argparse.Namespace) -> dict[str, object]:
    if o.method in BASELINES:
        return FOR_NETWORK[o.network] | RECIPES[o.method]
    return RECIPES[o.method] | FOR_TARGET[o.method, o.target]


class DigitTrainer(Trainer):
    """What the methods share: labelled digits, the network, its average, its view of images, its optimiser."""

    def __init__(
        self, o: argparse.Namespace, folds: Folds, network: nn.Module, images: Tensor, extra: dict[str, nn.Module]
    ):
        """``images``: those that the key of the data is of."""
        device = next(network.parameters()).device
        (self.images, self.labels), (self.held_images, self.held_labels) = (
            [x.to(device) for x in fold] for fold in folds
        )
        self.network, self.ema = network, EMA(network, o.ema)
        trained = [p for part in (network, *extra.values()) for p in part.parameters()]
        self.optimiser = torch.optim.AdamW(trained, o.lr, weight_decay=o.weight_decay, fused=True)
        parts = {"network": network, "average": self.average, "optimiser": self.optimiser, **extra}
        super().__init__(f"p3_{o.method}_{o.target}", o, device, describe(images), parts)

    @property
    def average(self) -> nn.Module:
        return self.ema.module

    def see(self, images: Tensor) -> Tensor:
        x = digit_input(images, self.o.size, self.o.standardise, self.o.gray)
        return x.contiguous(memory_format=torch.channels_last)

    def augmented(self, images: Tensor, random: torch.Generator, as_target: bool = False) -> Tensor:
        """What the network learns from.

        ``as_target``: source digits, given the size and the neighbours of the target's. Other images are inverted at
        random with ``negatives``, and lose a square with ``cutout``.
        """
        x = self.see(images)
        if self.o.negatives and not as_target:
            x = negatives(x, random)
        if self.o.geometry:
            x = geometry(x, random, **(FIT[self.o.target] if as_target and self.o.fit else {}))
        if as_target and self.o.neighbours:
            x = neighbours(x, random)
        if self.o.soften:
            x = soften(x, random)
        return cutout(x, random, ratio=0.4) if self.o.cutout and not as_target else x

    @property
    def age(self) -> int:
        """Updates that the network has had."""
        return self.step

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        return torch.randint(count, (self.o.batch_size,), generator=random, device=self.device)

    def descend(self, loss: Tensor) -> None:
        descend(loss, self.optimiser, self.o.lr * self.factor)
        self.ema.update(self.network, self.age)


class SupervisedTrainer(LabelTrainer, DigitTrainer):
    """A network trained on the labels of one domain: the report's lower and upper bound."""

    def __init__(self, o: argparse.Namespace, folds: Folds, device: torch.device):
        torch.manual_seed(o.seed)
        self.config = {"dim": o.dim} if o.network == "dann" else {}
        network = NETWORKS[o.network](**self.config)
        super().__init__(o, folds, network.to(device, memory_format=torch.channels_last), folds[0][0], {})

    def update(self) -> Tensor:
        random = step_generator(self.device, self.o.seed, self.step)
        rows = self.draw(len(self.images), random)
        x = share(self.augmented(self.images[rows], random))
        with autocast(self.device, self.o.bf16):
            logits = self.network.train()(x)
        loss = F.cross_entropy(logits.float(), share(self.labels[rows]))
        self.descend(loss)
        return loss.detach()[None]

    def prepare(self) -> None:
        batches = self.images[:2000].split(250)
        reestimate_batch_norm(self.average, (self.see(batch) for batch in batches))

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            guesses = [self.average(self.see(batch)).argmax(1) for batch in self.held_images.split(250)]
        return {"error": 100 * float((torch.cat(guesses) != self.held_labels).float().mean())}

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        return self.o.network, self.config, self.average.state_dict()


class Generation(nn.Module):
    """Which network of a run is trained: its number, the step it began at, and the labels (N,) that it begins with."""

    def __init__(self, images: int, device: torch.device):
        super().__init__()
        self.number, self.born = 0, 0
        self.register_buffer("labels", torch.zeros(images, dtype=torch.long, device=device))

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number, "born": self.born}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number, self.born = state["number"], state["born"]


class AdaptationTrainer(DigitTrainer):
    """DANN, and self-training on top of it. Of the target it is given images, and nothing else.

    With ``students`` the budget is divided equally between the adapted network and so many new ones, each of which
    learns target images alone: first the labels that the average of the network before gives them, then, after a
    share ``OWN`` of its steps, those of its own average (born-again networks, Furlanello et al. 2018, arXiv:1805.04770;
    noisy student, Xie et al. 2020, arXiv:1911.04252). A new network learns what most labels have in common before it
    learns their errors, and so loses some of them.
    """

    losses = ("loss_class", "loss_domain", "loss_self", "domain_source", "domain_target", "kept")
    scores = ("validator", "source", *(f"share_{c}" for c in range(CLASSES)))
    selects = "validator"
    panels: ClassVar = {
        "losses": ("loss_class", "loss_domain", "loss_self"),
        "share of domains guessed, of targets kept": ("domain_source", "domain_target", "kept"),
        "validator (lower is better)": ("validator",),
        "accuracy on held-out source digits, %": ("source",),
        "shares of predicted target classes": tuple(f"share_{c}" for c in range(CLASSES)),
    }

    def __init__(self, o: argparse.Namespace, source: Folds, target_images: Tensor, device: torch.device):
        self.target_images = target_images.to(device)
        torch.manual_seed(o.seed)
        network = Dann(o.dim).to(device, memory_format=torch.channels_last)
        self.domain = DomainClassifier().to(device)
        self.generation = Generation(len(target_images), device)
        extra = {"domain": self.domain, "generation": self.generation}
        super().__init__(o, source, network, torch.cat([source[0][0][:500], target_images]), extra)

    @property
    def life(self) -> float:
        """The used share of the present network's part of the budget."""
        return self.progress * (self.o.students + 1) - self.generation.number

    @property
    def age(self) -> int:
        return self.step - self.generation.born

    def classes(self, images: Tensor, both: bool) -> Tensor:
        """Class probabilities (N, 10) of uint8 images by the average; ``both``: mean over image and negative."""
        x = self.see(images)
        logits = self.average(torch.cat([x, -x]) if both else x).float()
        return logits.softmax(1).view(-1, len(x), CLASSES).mean(0)

    @torch.no_grad()
    def predict(self, images: Tensor, both: bool = False) -> Tensor:
        """``classes`` of any number of images, with the batch statistics of just these, not of their negatives."""
        reestimate_batch_norm(self.average, (self.see(batch) for batch in images.split(250)))
        return torch.cat([self.classes(batch, both) for batch in images.split(250)])

    def features(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        extractor = self.network.extractor
        if self.o.separate:
            return extractor(source), extractor(target)
        return extractor(torch.cat([source, target])).tensor_split([len(source)])

    def update(self) -> Tensor:
        if self.life >= 1:
            self.begin(self.generation.number + 1)
        random = step_generator(self.device, self.o.seed, self.step)
        return self.study(random) if self.generation.number else self.adapt(random)

    def begin(self, number: int) -> None:
        """A new network. Target images get the labels of the average before it; the best weights will be its own."""
        generation = self.generation
        generation.labels.copy_(self.predict(self.target_images, self.o.negatives).argmax(1))
        torch.manual_seed(self.o.seed + number)
        state = Dann(self.o.dim).state_dict()
        self.network.load_state_dict(state)
        self.average.load_state_dict(state)
        self.optimiser.state.clear()
        generation.number, generation.born = number, self.step
        self.best = None

    def study(self, random: torch.Generator) -> Tensor:
        """An update of a student."""
        rows = self.draw(len(self.target_images), random)
        target, labels = self.target_images[rows], share(self.generation.labels[rows])
        sure = torch.ones(len(labels), device=self.device)
        x = share(self.augmented(target, random))
        with autocast(self.device, self.o.bf16):
            logits = self.network.train()(x).float()
        if self.life >= OWN:
            labels, sure = self.teach(share(target), 1.0, align=False)
        loss = (F.cross_entropy(logits, labels, reduction="none") * sure).mean()
        self.descend(loss)
        return self.row(loss_self=loss, kept=sure.mean())

    def adapt(self, random: torch.Generator) -> Tensor:
        """An update of the network that learns from both domains."""
        o, device = self.o, self.device
        rows = self.draw(len(self.images), random)
        source, labels = self.images[rows], self.labels[rows]
        target = self.target_images[self.draw(len(self.target_images), random)]
        reversal = o.adversary * adaptation_factor(self.life)
        self.network.train()
        x_s, x_t = share(self.augmented(source, random, as_target=True)), share(self.augmented(target, random))
        with autocast(device, o.bf16):
            h_s, h_t = self.features(x_s, x_t)
            logits_s, logits_t = self.network.predictor(h_s).float(), self.network.predictor(h_t).float()
            domain = self.domain(reverse_gradient(torch.cat([h_s, h_t]), reversal)).float()
        is_source = torch.cat([domain.new_ones(len(h_s)), domain.new_zeros(len(h_t))])
        loss_domain = F.binary_cross_entropy_with_logits(domain, is_source)
        loss_class = F.cross_entropy(logits_s, share(labels))
        loss_self, kept = domain.new_zeros(()), domain.new_zeros(())
        if o.self_training and self.life >= RAMP:
            confidence = mean_of_shares(logits_s.detach().softmax(1).max(1).values.mean())
            guess, sure = self.teach(share(target), confidence, o.align)
            loss_self = (F.cross_entropy(logits_t, guess, reduction="none") * sure).mean()
            kept = sure.mean()
        weight_of_source = source_factor(self.life) if o.fade else 1.0
        self.descend(weight_of_source * loss_class + loss_domain + o.self_training * loss_self)
        correct = ((domain > 0) == (is_source > 0)).float()
        domain_s, domain_t = correct[: len(h_s)].mean(), correct[len(h_s) :].mean()
        return self.row(
            loss_class=loss_class,
            loss_domain=loss_domain,
            loss_self=loss_self,
            domain_source=domain_s,
            domain_target=domain_t,
            kept=kept,
        )

    def row(self, **means: Tensor) -> Tensor:
        """What an update returns: ``losses``, zero where there is nothing to tell."""
        nothing = torch.zeros((), device=self.device)
        return torch.stack([means.get(name, nothing).detach() for name in self.losses])

    @torch.no_grad()
    def teach(self, target: Tensor, reference: Tensor | float, align: bool) -> tuple[Tensor, Tensor]:
        """(guessed classes (N,), 1 where the teacher is sure enough (N,)) of target images.

        The teacher is the weight average; it sees images as they are, and with ``negatives`` inverted, too. Sure enough
        is ``threshold`` times ``reference``, the network's mean confidence on source images (AdaMatch, Berthelot et al.
        2022, arXiv:2106.04732), or 1 where it sees none. With ``align`` its classes are first weighted so that they
        come in equal shares.
        """
        self.average.train()  # statistics of the batch at hand
        with autocast(self.device, self.o.bf16):
            p = self.classes(target, self.o.negatives)
        if align:
            p = p / mean_of_shares(p.mean(0)).clamp(min=1e-3)
            p = p / p.sum(1, keepdim=True)
        confidence, guess = p.max(1)
        return guess, (confidence >= self.o.threshold * reference).float()

    def describe(self, means: dict[str, float]) -> str:
        text = "loss class {loss_class:.3f} domain {loss_domain:.3f} self {loss_self:.3f}, "
        return (text + "domain right {domain_source:.2f} / {domain_target:.2f}, kept {kept:.2f}").format(**means)

    def evaluate(self) -> dict[str, float]:
        source = 100 * float((self.predict(self.held_images).argmax(1) == self.held_labels).float().mean())
        p = self.predict(self.target_images[:SCORED])  # last, so that its statistics are exported
        shares = torch.bincount(p.argmax(1), minlength=CLASSES) / len(p)
        validator = -mutual_information(p) / math.log(CLASSES)
        if not self.generation.number:  # how a student reads source digits, which it never saw, says nothing
            validator -= source / 100
        scores = {"validator": validator, "source": source}
        return scores | {f"share_{c}": float(share) for c, share in enumerate(shares)}

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        return "dann", {"dim": self.o.dim}, self.average.state_dict()

    def finish(self, bar: tqdm, stopped: bool) -> None:
        if not stopped and self.generation.number < self.o.students:  # after a resume with less of a budget
            self.save()
            raise UserError(f"{self.run.folder}: the budget ended before its last network began; resume it with more")
        super().finish(bar, stopped)


def source_factor(progress: float) -> float:
    """What source labels count with ``--fade``: 1 in the first quarter of a run, falling to 0.1 at 70 % of it.

    After DIRT-T (Shu et al. 2018, arXiv:1802.08735), which refines a classifier on the target alone.
    """
    return min(1.0, max(0.1, 1.5 - 2 * progress))


def mutual_information(p: Tensor) -> float:
    """H(mean p) - mean H(p) of class probabilities p (N, C), in nats: high when predictions are sure and varied."""

    def entropy(q: Tensor) -> Tensor:
        return -(q * q.clamp(min=1e-12).log()).sum(-1)

    return float(entropy(p.mean(0)) - entropy(p).mean())


def make_trainer(o: argparse.Namespace) -> DigitTrainer:
    device, o.bf16 = device_and_format(o.device, o.bf16)
    if o.network == "dann" and not 32 <= o.size < 64:
        raise UserError(f"--size {o.size}: the report's own network sees images of side 32 to 63")
    if o.method not in BASELINES and o.network != "dann":
        raise UserError(f"--network {o.network}: a network of the baselines; {o.method} trains the report's own")
    if o.method == "target":
        return SupervisedTrainer(o, load_folds(o.data / o.target), device)
    source = load_folds(o.data / SOURCE)
    if o.method == "source":
        return SupervisedTrainer(o, source, device)
    return AdaptationTrainer(o, source, load_digits(o.data / o.target, "train"), device)


def main() -> None:
    make_trainer(parse_options(sys.argv[1:])).train()


if __name__ == "__main__":
    run_main(main)
