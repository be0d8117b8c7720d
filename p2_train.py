r"""Train the class-conditional diffusion model of digits (problem 2) on MNIST-M, 28x28.

  python3 p2_train.py --data hw2_data/digits/mnistm                     # our recipe; a GPU: minutes
  python3 p2_train.py --data hw2_data/digits/mnistm --max-minutes 100   # stop, annealed, after 100 minutes
  python3 p2_train.py --data hw2_data/digits/mnistm --recipe report     # the report's own recipe
  python3 p2_train.py --init checkpoints/p2_unet.safetensors --lr 1.4e-3 --gamma 0 --low-noise 0.3 --batch-size 64 \
      --ema 0.997 --max-minutes 100                                     # go on from the shipped weights
  python3 p2_train.py --resume runs/p2_000                              # go on after Ctrl-C or a kill
  torchrun --standalone --nproc-per-node 4 p2_train.py                  # four GPUs, a quarter of a batch on each

--data is a folder with data/ and train.csv, or with packed mosaics (see datasets/images.py). Runs on the CPU, on one
GPU (choose with CUDA_VISIBLE_DEVICES or --device) or on several. The run folder gets options.json, metrics.csv,
curves.png, samples/ (10 of each digit), state.pt, last.safetensors and best.safetensors (best Fréchet distance to a
held-out slice of the training digits; validation digits are never read).
"""

import common.start  # noqa: F401

# isort: split
import argparse
import math
import sys
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import history, load_network
from common.device import autocast, device_and_format, step_generator
from common.ema import EMA
from common.errors import Parser, UserError, run_main
from common.muon import Muon
from common.options import from_zero, positive_float, positive_int, share_of_one, weight
from common.parallel import is_first, share
from common.pictures import sheet
from common.run import add_common_options, add_sample_options, parse_with_resume
from common.trainer import Part, Trainer, descend
from datasets.augment import normalise, resize
from datasets.digits import CLASSES, load_folds
from datasets.images import describe
from metrics.classify import accuracy, load_classifier
from metrics.colour import COLOURS, colour_statistics
from metrics.frechet import HeldOutDistance
from models.diffusion import Process, mean_error, snr_weight, timesteps, training_loss
from models.unet import UNet_conditional
from p2_test import FAST, generate

RECIPES = {
    "ours": {
        "predicts": "velocity",
        "size": 28,
        "batch_size": 128,
        "steps": 30_000,
        "optimiser": "muon",
        "lr": 6e-4,
        "ema": 0.9995,
        "gamma": 5.0,
        "floor": 0.5,
        "drop_per": "sample",
        "anneal": True,
    },
    "report": {
        "predicts": "noise",
        "size": 32,
        "batch_size": 64,
        "steps": 140_000,
        "optimiser": "adamw",
        "lr": 3e-4,
        "ema": 0.995,
        "gamma": 0.0,
        "floor": 0.0,
        "drop_per": "batch",
        "anneal": False,
    },
}
OPTIMISERS = ("adamw", "muon")
PASS = 100  # images per forward pass where mean errors are measured
LOW_NOISE = 250  # the highest t of --low-noise; below, textures are made
# Samples during training; their seed is none that generated digits are reported for.
EVAL = argparse.Namespace(
    sampler="dpm++", steps=10, power=1.0, eta=0.0, w=2.0, guide=(1, 600), rescale=0.0, mean=None, errors=None, seed=-2
)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--recipe", choices=RECIPES, default="ours", help="sets the options marked *, see README")
    parser.add_argument("--data", type=Path, default=Path("hw2_data/digits/mnistm"), help="folder with the split train")
    parser.add_argument("--steps", type=positive_int, help="* updates")
    parser.add_argument("--batch-size", type=positive_int, help="* images per update")
    what = "* muon takes the weights of hidden layers, and leaves the others to adamw"
    parser.add_argument("--optimiser", choices=OPTIMISERS, help=what)
    parser.add_argument("--lr", type=positive_float, help="* learning rate, for muon in units of AdamW's")
    parser.add_argument("--ema", type=share_of_one, help="* decay of the weight average; 0 for none")
    parser.add_argument("--predicts", choices=("noise", "velocity"), help="* what the network's output means")
    parser.add_argument(
        "--size", type=int, choices=(28, 32), help="* digits are padded in the network, or resized to 32"
    )
    parser.add_argument("--gamma", type=weight, help="* highest weight of the image error (min-SNR); 0 for none")
    parser.add_argument("--floor", type=weight, help="* lowest weight of the image error (truncated SNR); 0 for none")
    what = f"share of images that are noised to t <= {LOW_NOISE} at most; the others to any t"
    parser.add_argument("--low-noise", type=share_of_one, default=0.0, help=what)
    parser.add_argument("--drop", type=share_of_one, default=0.1, help="share of labels dropped, for guidance")
    parser.add_argument(
        "--drop-per", choices=("sample", "batch"), help="* drop labels one by one, or a batch's at once"
    )
    parser.add_argument("--anneal", action=boolean, help="* the learning rate falls to 0 over the second half")
    what = "training digits by which mean errors of predictions at t = 600 are measured, for p2_test.py; 0: not at all"
    parser.add_argument("--calibrate", type=from_zero, default=1000, help=what)
    parser.add_argument("--init", type=Path, metavar="FILE", help="start from these weights, not from random ones")
    parser.add_argument("--dim", type=positive_int, default=64, help="width of the network; the report has 64")
    add_sample_options(parser)
    add_common_options(parser)
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    o = parse_with_resume(build_parser(), argv, lambda o: RECIPES[o.recipe])
    if o.floor > (o.gamma or math.inf):
        raise UserError(f"--floor {o.floor} --gamma {o.gamma}: give a floor of at most gamma")
    if o.dim % 4:
        raise UserError(f"--dim {o.dim}: give a multiple of 4, the number of attention's heads")
    return o


class Judge:
    """Accuracy, Fréchet distance and colours of generated digits, where they can be had.

    ``held_out`` are training digits that are not trained on.
    """

    def __init__(self, held_out: Tensor, device: torch.device, data: Path):
        self.distance = HeldOutDistance(held_out, device, data)
        self.colours = colour_statistics(held_out)
        try:
            self.classifier = load_classifier().to(device)
        except UserError as error:
            tqdm.write(f"note: no digit accuracy in this run: {error}")
            self.classifier = None

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        scores = dict(zip(COLOURS, (colour_statistics(images) - self.colours).tolist(), strict=True))
        if self.classifier:
            scores["accuracy"] = accuracy(self.classifier, images, labels)
        return scores | self.distance(images)


def new_optimiser(network: UNet_conditional, o: argparse.Namespace) -> torch.optim.Optimizer:
    if o.optimiser == "muon":
        return Muon(network, (network.inc.double_conv[0], network.outc, network.label_emb), o.lr)
    return torch.optim.AdamW(network.parameters(), o.lr, fused=True)


class DiffusionTrainer(Trainer):
    losses = ("loss",)
    scores = ("accuracy", "fd", *COLOURS)
    selects = "fd"
    panels: ClassVar = {
        "loss": ("loss",),
        "digits read correctly, %": ("accuracy",),
        "Fréchet distance to held-out digits": ("fd",),
        "mean of the samples minus that of the data": COLOURS[:3],
        "deviation of the samples minus that of the data": COLOURS[3:],
    }

    def __init__(self, o: argparse.Namespace):
        device, o.bf16 = device_and_format(o.device, o.bf16)
        (images, labels), (held_out, _) = load_folds(o.data)
        self.images, self.labels = images.to(device), labels.to(device)
        torch.manual_seed(o.seed)  # weights are drawn on the CPU: the same on every device
        before = None
        if o.init and not o.resume:
            self.network, card = load_network(o.init, {"unet": UNet_conditional})
            before = history(card)
            if card["config"]["dim"] != o.dim:
                raise UserError(f"{o.init}: holds a network of {card['config']}; give the same --dim")
            # weights that predict the noise are a good start for the velocity
            self.network.predicts, self.network.size = o.predicts, o.size
            self.network.train()
        else:
            self.network = UNet_conditional(dim=o.dim, predicts=o.predicts, size=o.size)
        self.network.to(device, memory_format=torch.channels_last)
        self.ema = EMA(self.network, o.ema)
        self.optimiser = new_optimiser(self.network, o)
        self.process = Process()
        self.weight = snr_weight(self.process, o.gamma, o.floor).to(device)
        parts: dict[str, Part] = {"network": self.network, "average": self.average, "optimiser": self.optimiser}
        super().__init__("p2", o, device, describe(images), parts, before)
        self.judge = Judge(held_out, device, o.data) if o.eval_images and is_first() else None

    @property
    def average(self) -> nn.Module:
        return self.ema.module

    def update(self) -> Tensor:
        """DDPM algorithm 1, for a batch; all randomness comes from (seed, step)."""
        o, device = self.o, self.device
        random = step_generator(device, o.seed, self.step)
        rows = torch.randint(len(self.images), (o.batch_size,), generator=random, device=device)
        x_0 = self.images_at(rows)
        t = self.draw_steps(random)
        eps = torch.randn(x_0.shape, generator=random, device=device)
        draws = torch.rand(o.batch_size if o.drop_per == "sample" else 1, generator=random, device=device)
        y = torch.where(draws < o.drop, -1, self.labels[rows])
        with autocast(device, o.bf16):
            loss = training_loss(self.network, self.process, *map(share, (x_0, y, t, eps)), self.weight)
        descend(loss, self.optimiser, o.lr * self.factor)
        self.ema.update(self.network, self.step)
        return loss.detach()[None]

    def images_at(self, rows: Tensor) -> Tensor:
        """Training digits as the network takes them, (len(rows), 3, size, size) in [-1, 1]."""
        x_0 = resize(normalise(self.images[rows]), self.o.size, antialias=True)
        return x_0.contiguous(memory_format=torch.channels_last)

    def draw_steps(self, random: torch.Generator) -> Tensor:
        """How far the images of a batch are noised, t (batch size,) in 1 ... T: uniform, or more often low."""
        shape, device = (self.o.batch_size,), self.device
        t = torch.randint(1, self.process.T + 1, shape, generator=random, device=device)
        if self.o.low_noise:
            low = torch.randint(1, LOW_NOISE + 1, shape, generator=random, device=device)
            t = torch.where(torch.rand(shape, generator=random, device=device) < self.o.low_noise, low, t)
        return t

    def describe(self, means: dict[str, float]) -> str:
        return "loss {loss:.4f}".format(**means)

    def samples(self, per_digit: int) -> Tensor:
        o = argparse.Namespace(**vars(EVAL), bf16=self.o.bf16)
        return generate(self.average, list(range(CLASSES)), per_digit, o, self.device, bar=per_digit > 20)

    def picture(self) -> Tensor:
        return sheet(self.samples(10), columns=10)

    def evaluate(self) -> dict[str, float]:
        if self.o.calibrate:
            self.facts |= {"mean_errors": self.mean_errors()}  # for p2_test.py --calibrate
        if not self.judge:
            return {}
        per_digit = max(1, self.o.eval_images // CLASSES)
        return self.judge(self.samples(per_digit), torch.arange(CLASSES).repeat_interleave(per_digit))

    @cached_property
    def mean_colour(self) -> list[float]:
        return [round(c, 1) for c in colour_statistics(self.images)[:3].tolist()]

    def prepare(self) -> None:
        self.facts = {"mean": self.mean_colour}  # for p2_test.py --mean

    @torch.inference_mode()
    def mean_errors(self) -> dict[int, list[float]]:
        """t: by how many gray levels red, green and blue of the average's predictions are too bright, at the steps of
        the default sampler. Those between tell nothing of them: the code of t turns by a radian from one to the next.
        Where there is less noise fewer digits tell as surely, and fewer are taken."""
        random = step_generator(self.device, self.o.seed, -2)
        rows = torch.randperm(len(self.images), generator=random, device=self.device)[: self.o.calibrate]
        errors = {}
        for t in timesteps(self.process, FAST["steps"], FAST["power"])[:-1]:
            total, taken = torch.zeros(3, device=self.device), rows[: math.ceil(len(rows) * t / self.process.T)]
            for part in taken.split(PASS):
                x_0 = self.images_at(part)
                eps = torch.randn(x_0.shape, generator=random, device=self.device)
                with autocast(self.device, self.o.bf16):
                    total += len(part) * mean_error(self.average, self.process, x_0, self.labels[part], t, eps)
            errors[t] = [round(127.5 * c, 2) for c in (total / len(taken)).tolist()]
        return errors

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        return "unet", {name: getattr(self.o, name) for name in ("dim", "predicts", "size")}, self.average.state_dict()


def main() -> None:
    DiffusionTrainer(parse_options(sys.argv[1:])).train()


if __name__ == "__main__":
    run_main(main)
