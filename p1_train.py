"""Train a face generator (problem 1): SNGAN or DCGAN on 64x64 faces.

  python3 p1_train.py --model sngan --data hw2_data/face                     # our recipe; a GPU: minutes
  python3 p1_train.py --model dcgan --data hw2_data/face --max-minutes 90    # stop after 90 minutes
  python3 p1_train.py --model dcgan --data hw2_data/face --recipe report     # the report's own recipe
  python3 p1_train.py --resume runs/p1_sngan_000                             # go on after Ctrl-C or a kill
  torchrun --standalone --nproc-per-node 4 p1_train.py --model sngan         # four GPUs, a quarter of a batch on each

--data is a folder with train/ (images) or with packed mosaics (see datasets/images.py). Runs on the CPU, on
one GPU (choose with CUDA_VISIBLE_DEVICES or --device) or on several. The run folder gets options.json, metrics.csv,
curves.png, samples/, state.pt, last.safetensors and best.safetensors (best Fréchet distance to a
held-out slice of the training images; validation images are never read).

The discriminator and the generator step share one batch of fakes: the discriminator sees them detached, the
generator is then updated through the new discriminator.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.device import autocast, device_and_format, noise, step_generator
from common.ema import EMA, POWER, reestimate_batch_norm
from common.errors import Parser, UserError, run_main
from common.options import positive_float, positive_int, several, share_of_one, weight
from common.parallel import is_first, processes, rank, share
from common.pictures import sheet
from common.run import add_common_options, add_sample_options, parse_with_resume
from common.trainer import LOG_STEPS, Part, Trainer, descend
from datasets.augment import POLICIES, diff_augment, normalise, random_flip
from datasets.faces import HELD_OUT, load_faces
from datasets.images import describe, hold_out
from metrics.detect import face_counts, face_rate
from metrics.frechet import HeldOutDistance
from models import dcgan, sngan
from p1_test import generate

MODELS = {"sngan": sngan, "dcgan": dcgan}
OURS = {"lr_d": 4e-4, "ema": 0.999, "ema_power": POWER, "r1": 0.0, "flip": True, "augment": "", "steps": 100_000}
REPORT = {"lr_d": 2e-4, "ema": 0.0, "ema_power": POWER, "r1": 0.0, "flip": False}
RECIPES = {
    ("sngan", "ours"): OURS | {"loss": "hinge"},
    ("dcgan", "ours"): OURS | {"loss": "logistic", "lr_d": 2e-4, "r1": 0.005, "ema": 0.9999, "ema_power": 3.0},
    ("sngan", "report"): REPORT | {"loss": "logistic", "augment": "color,translation,cutout", "steps": 1_202_000},
    ("dcgan", "report"): REPORT | {"loss": "logistic", "augment": "", "steps": 60_100},
}
EVAL_SEED = -2  # noise of sheets and scores during training, apart from every seed used for reported numbers
R1_EVERY = 16  # updates between two with the gradient penalty, which counts so many times more in them
COLLAPSE_LOSS, COLLAPSE_ROWS = 0.02, 10  # mean loss below which the discriminator has won, for so many log rows


def build_parser() -> Parser:
    parser = Parser(__doc__)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--model", choices=MODELS, default="sngan", help="which pair of networks")
    parser.add_argument(
        "--recipe", choices=("ours", "report"), default="ours", help="sets the options marked *, see README"
    )
    parser.add_argument("--data", type=Path, default=Path("hw2_data/face"), help="folder with the split train")
    parser.add_argument("--steps", type=positive_int, help="* updates of each network")
    parser.add_argument("--batch-size", type=several, default=64, help="images per update")
    what = "Adam learning rate of the generator, betas (0.5, 0.999)"
    parser.add_argument("--lr-g", type=positive_float, default=2e-4, help=what)
    parser.add_argument("--lr-d", type=positive_float, help="* the same of the discriminator")
    parser.add_argument("--loss", choices=("hinge", "logistic"), help="* logistic is BCE, non-saturating")
    parser.add_argument("--ema", type=share_of_one, help="* decay of the generator's weight average; 0 for none")
    what = "* how steps before that decay is reached count in the average: step s as s^EMA_POWER"
    parser.add_argument("--ema-power", type=weight, help=what)
    parser.add_argument("--flip", action=boolean, help="* mirror real images at random")
    parser.add_argument("--augment", help=f"* DiffAugment, a comma list of {', '.join(POLICIES)}; '' for none")
    parser.add_argument("--anneal", action=boolean, default=False, help="learning rates fall to 0 over the second half")
    parser.add_argument("--r1", type=weight, help="* weight of the discriminator's gradient penalty, R1")
    parser.add_argument("--dim", type=positive_int, default=64, help="width of both networks; the report has 64")
    add_sample_options(parser)
    add_common_options(parser)
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    options = parse_with_resume(build_parser(), argv, lambda o: RECIPES[o.model, o.recipe])
    unknown = set(filter(None, options.augment.split(","))) - set(POLICIES)
    if unknown:
        raise UserError(f"--augment {','.join(sorted(unknown))}: unknown; choose from {', '.join(POLICIES)}")
    return options


def memory_format(o: argparse.Namespace) -> torch.memory_format:
    """Channels-last pays with bfloat16; float32 convolutions on a CPU are faster without it in small batches."""
    return torch.channels_last if o.bf16 else torch.contiguous_format


class Networks:
    """Both networks, the averaged generator and both optimisers."""

    def __init__(self, o: argparse.Namespace, device: torch.device):
        torch.manual_seed(o.seed)  # weights are drawn on the CPU: the same on every device
        layout = memory_format(o)
        self.generator = MODELS[o.model].Generator(dim=o.dim).to(device, memory_format=layout)
        self.discriminator = MODELS[o.model].Discriminator(dim=o.dim).to(device, memory_format=layout)
        self.ema = EMA(self.generator, o.ema, o.ema_power)
        self.opt_g, self.opt_d = (
            torch.optim.Adam(network.parameters(), lr, betas=(0.5, 0.999), fused=True)
            for network, lr in ((self.generator, o.lr_g), (self.discriminator, o.lr_d))
        )

    @property
    def average(self) -> nn.Module:
        return self.ema.module

    @property
    def parts(self) -> dict[str, Part]:
        """Everything that training changes, and therefore everything that is saved."""
        networks = {"generator": self.generator, "discriminator": self.discriminator, "average": self.average}
        return networks | {"opt_g": self.opt_g, "opt_d": self.opt_d}


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """Logits (N,) of real and generated images -> loss. Hinge: Lim & Ye 2017, Miyato et al. 2018 eq. 16."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """Logits (N,) of generated images -> loss: eq. 17, or non-saturating (Goodfellow et al. 2014)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Mean squared norm of the gradient of the logits at real images (N, 3, 64, 64), float32. Times gamma / 2 this is
    R1 of Mescheder et al. 2018 (arXiv:1801.04406), eq. 9."""
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator.logits(real).sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def both_logits(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits (N,) of the real and of the generated images, (N, 3, 64, 64) each. They go through a network
    with batch norm one after the other, so that each kind is normalised apart, and through one without together:
    that takes one spectral normalisation less (a sixth of an update on a CPU)."""
    if discriminator.batch_norm:
        return discriminator.logits(real).float(), discriminator.logits(fake).float()
    logits_real, logits_fake = discriminator.logits(torch.cat([real, fake])).float().chunk(2)
    return logits_real, logits_fake


def train_step(nets: Networks, images: Tensor, step: int, factor: float, o: argparse.Namespace) -> Tensor:
    """One update of both networks. Returns float32 (4,): loss_d, loss_g, mean D(x), mean D(G(z)).

    ``images`` uint8 (N, 3, 64, 64) on the training device; all randomness comes from (seed, step).
    """
    device = images.device
    random = step_generator(device, o.seed, step)
    real = normalise(images[torch.randint(len(images), (o.batch_size,), generator=random, device=device)])
    if o.flip:
        real = random_flip(real, random)
    real = share(diff_augment(real, o.augment, random)).contiguous(memory_format=memory_format(o))
    z = share(torch.randn(o.batch_size, nets.generator.z_dim, generator=random, device=device))
    if processes() > 1:  # each augments generated images of its own
        random = step_generator(device, o.seed, step, rank())

    with autocast(device, o.bf16):
        fake = diff_augment(nets.generator(z), o.augment, random)
        logits_real, logits_fake = both_logits(nets.discriminator, real, fake.detach())
    loss_d = discriminator_loss(logits_real, logits_fake, o.loss)
    lazy = o.r1 > 0 and step % R1_EVERY == 0  # as in StyleGAN2 (Karras et al. 2020), appendix B
    penalty = o.r1 / 2 * R1_EVERY * gradient_penalty(nets.discriminator, real) if lazy else 0
    descend(loss_d + penalty, nets.opt_d, o.lr_d * factor)

    nets.discriminator.requires_grad_(False)
    with autocast(device, o.bf16):
        loss_g = generator_loss(nets.discriminator.logits(fake).float(), o.loss)
    descend(loss_g, nets.opt_g, o.lr_g * factor)
    nets.discriminator.requires_grad_(True)
    nets.ema.update(nets.generator, step)
    return torch.stack([loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()


def noise_batches(z_dim: int, device: torch.device, batches: int = 20, size: int = 100) -> Iterator[Tensor]:
    """The fixed noise on which the averaged generator's batch-norm statistics are measured."""
    return (noise(-1, range(i * size, (i + 1) * size), z_dim).to(device) for i in range(batches))


class Judge:
    """Fréchet distance to held-out training faces and face rate of generated images, where they can be had."""

    def __init__(self, held_out: Tensor, device: torch.device, data: Path):
        self.distance = HeldOutDistance(held_out, device, data)

    def __call__(self, images: Tensor) -> dict[str, float]:
        scores = self.distance(images)
        try:
            scores["faces"] = face_rate(face_counts(images))
        except UserError as error:
            tqdm.write(f"note: {error}")
        return scores


class FaceTrainer(Trainer):
    losses = ("loss_d", "loss_g", "d_real", "d_fake")
    scores = ("fd", "faces")
    selects = "fd"
    panels: ClassVar = {
        "losses": ("loss_d", "loss_g"),
        "D(x) and D(G(z))": ("d_real", "d_fake"),
        "Fréchet distance to held-out faces": ("fd",),
        "images with exactly one face, %": ("faces",),
    }

    def __init__(self, o: argparse.Namespace):
        device, o.bf16 = device_and_format(o.device, o.bf16)
        images, held_out = hold_out(load_faces(o.data, "train"), HELD_OUT, o.data)
        data_id = describe(images)
        self.images, self.nets, self.low = images.to(device), Networks(o, device), 0
        super().__init__(f"p1_{o.model}", o, device, data_id, self.nets.parts)
        self.judge = Judge(held_out, device, o.data) if o.eval_images and is_first() else None

    def update(self) -> Tensor:
        return train_step(self.nets, self.images, self.step, self.factor, self.o)

    def describe(self, means: dict[str, float]) -> str:
        self.low = self.low + 1 if means["loss_d"] < COLLAPSE_LOSS else 0
        if self.low == COLLAPSE_ROWS:
            tqdm.write(
                f"warning: step {self.step}: the discriminator has won (loss below {COLLAPSE_LOSS} for "
                f"{COLLAPSE_ROWS * LOG_STEPS} steps); the generator no longer learns. Raise --r1 or lower --lr-d"
            )
        return "loss D {loss_d:.3f} G {loss_g:.3f}, D(x) {d_real:.2f}, D(G(z)) {d_fake:.2f}".format(**means)

    def prepare(self) -> None:
        if self.o.ema:
            reestimate_batch_norm(self.nets.average, noise_batches(self.nets.average.z_dim, self.device))
        else:
            self.nets.ema.copy_buffers(self.nets.generator)

    def picture(self) -> Tensor:
        return sheet(generate(self.nets.average, 64, EVAL_SEED, self.device), columns=8)

    def evaluate(self) -> dict[str, float]:
        if not self.judge:
            return {}
        return self.judge(generate(self.nets.average, self.o.eval_images, EVAL_SEED, self.device))

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        return self.o.model, {"z_dim": self.nets.generator.z_dim, "dim": self.o.dim}, self.nets.average.state_dict()


def main() -> None:
    FaceTrainer(parse_options(sys.argv[1:])).train()


if __name__ == "__main__":
    run_main(main)
