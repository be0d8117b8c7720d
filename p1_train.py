"""Train a face generator (problem 1): SNGAN or DCGAN on 64x64 faces.

  python3 p1_train.py --model sngan --data hw2_data/face                     # our recipe; a GPU: minutes
  python3 p1_train.py --model sngan --data hw2_data/face --max-minutes 90    # stop, annealed, after 90 minutes
  python3 p1_train.py --model dcgan --data hw2_data/face --recipe report     # the report's own recipe
  python3 p1_train.py --resume runs/p1_sngan_000                             # go on after Ctrl-C or a kill

--data is a folder with train/ (images) or with packed mosaics (see datasets/images.py). Runs on the CPU or on
one GPU (choose with CUDA_VISIBLE_DEVICES or --device). The run folder gets options.json, metrics.csv,
curves.png, samples/, state.pt, last.safetensors and best.safetensors (best Fréchet distance to a
held-out slice of the training images; validation images are never read).

The discriminator and the generator step share one batch of fakes: the discriminator sees them detached, the
generator is then updated through the new discriminator.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import load_state, save_state, save_weights
from common.device import autocast, bfloat16_pays, noise, pick_device, step_generator
from common.ema import EMA
from common.errors import UserError, run_main
from common.pictures import plot_curves, save_png, sheet, to_uint8
from common.run import Budget, Run, StopFlag, add_common_options, annealed, positive_int, resume_options
from datasets.augment import POLICIES, diff_augment, normalise, random_flip
from datasets.faces import hold_out, load_faces
from datasets.images import checksum
from models import dcgan, sngan

MODELS = {"sngan": sngan, "dcgan": dcgan}
OURS = {"lr_g": 2e-4, "lr_d": 4e-4, "ema": 0.999, "flip": True, "augment": "", "anneal": True, "steps": 100_000}
REPORT = {"lr_g": 2e-4, "lr_d": 2e-4, "ema": 0.0, "flip": False, "anneal": False}
RECIPES = {
    ("sngan", "ours"): OURS | {"loss": "hinge"},
    ("dcgan", "ours"): OURS | {"loss": "logistic", "lr_d": 2e-4},
    ("sngan", "report"): REPORT | {"loss": "logistic", "augment": "color,translation,cutout", "steps": 1_202_000},
    ("dcgan", "report"): REPORT | {"loss": "logistic", "augment": "", "steps": 60_100},
}
LOG_STEPS = 50  # steps between the rows of losses
COLLAPSE_LOSS = 0.02  # a mean discriminator loss below this leaves the generator nothing to learn from


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--model", choices=MODELS, default="sngan")
    parser.add_argument("--recipe", choices=("ours", "report"), default="ours", help="defaults of the options marked *")
    parser.add_argument("--data", type=Path, default=Path("hw2_data/face"), help="folder with the split train")
    parser.add_argument("--steps", type=positive_int, help="* updates of each network")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per update")
    parser.add_argument("--lr-g", type=float, help="* Adam learning rate of the generator, betas (0.5, 0.999)")
    parser.add_argument("--lr-d", type=float, help="* the same of the discriminator")
    parser.add_argument("--loss", choices=("hinge", "logistic"), help="* logistic is BCE, non-saturating")
    parser.add_argument("--ema", type=float, help="* decay of the generator's weight average; 0 for none")
    parser.add_argument("--flip", action=boolean, help="* mirror real images at random")
    parser.add_argument("--augment", help=f"* DiffAugment, a comma list of {', '.join(POLICIES)}; '' for none")
    parser.add_argument("--anneal", action=boolean, help="* learning rates fall to 0 over the second half")
    parser.add_argument("--dim", type=positive_int, default=64, help="width of both networks; the report has 64")
    parser.add_argument("--sample-every", type=positive_int, default=1000, help="steps between sample sheets")
    parser.add_argument("--eval-every", type=positive_int, default=5000, help="steps between evaluations")
    parser.add_argument("--eval-images", type=int, default=1000, help="samples per evaluation; 0 for no evaluation")
    add_common_options(parser)
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    first = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[first.model, first.recipe])
    options = parser.parse_args(argv)
    if options.resume:
        options = resume_options(parser, options, argv)
    unknown = set(filter(None, options.augment.split(","))) - set(POLICIES)
    if unknown:
        raise UserError(f"--augment {','.join(sorted(unknown))}: unknown; choose from {', '.join(POLICIES)}")
    return options


@dataclass
class Networks:
    """Everything that training changes, and therefore everything that is saved."""

    generator: nn.Module
    discriminator: nn.Module
    ema: EMA
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer

    @property
    def parts(self) -> dict:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.module,
            "opt_g": self.opt_g,
            "opt_d": self.opt_d,
        }

    def state(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def build_networks(o: argparse.Namespace, device: torch.device) -> Networks:
    torch.manual_seed(o.seed)  # on the CPU, so that the same seed gives the same weights on every device
    generator = MODELS[o.model].Generator(dim=o.dim).to(device, memory_format=torch.channels_last)
    discriminator = MODELS[o.model].Discriminator(dim=o.dim).to(device, memory_format=torch.channels_last)

    def adam(net: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.999), fused=True)

    return Networks(
        generator, discriminator, EMA(generator, o.ema), adam(generator, o.lr_g), adam(discriminator, o.lr_d)
    )


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """Logits (N,) of real and generated images -> loss. Hinge: Lim & Ye 2017, Miyato et al. 2018 eq. 16."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """Logits (N,) of generated images -> loss: eq. 17, or non-saturating (Goodfellow et al. 2014)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def train_step(nets: Networks, images: Tensor, step: int, factor: float, o: argparse.Namespace, bf16: bool) -> Tensor:
    """One update of both networks. Returns float32 (4,): loss_d, loss_g, mean D(x), mean D(G(z)).

    ``images`` uint8 (N, 3, 64, 64) on the training device; all randomness comes from (seed, step).
    """
    device = images.device
    random = step_generator(device, o.seed, step)
    real = normalise(images[torch.randint(len(images), (o.batch_size,), generator=random, device=device)])
    if o.flip:
        real = random_flip(real, random)
    real = diff_augment(real, o.augment, random).contiguous(memory_format=torch.channels_last)
    z = torch.randn(o.batch_size, nets.generator.z_dim, generator=random, device=device)
    for optimiser, lr in ((nets.opt_d, o.lr_d), (nets.opt_g, o.lr_g)):
        optimiser.param_groups[0]["lr"] = lr * factor

    with autocast(device, bf16):
        fake = diff_augment(nets.generator(z), o.augment, random)
        logits_real = nets.discriminator.logits(real).float()
        logits_fake = nets.discriminator.logits(fake.detach()).float()
    loss_d = discriminator_loss(logits_real, logits_fake, o.loss)
    nets.opt_d.zero_grad(set_to_none=True)
    loss_d.backward()
    nets.opt_d.step()

    nets.discriminator.requires_grad_(False)
    with autocast(device, bf16):
        loss_g = generator_loss(nets.discriminator.logits(fake).float(), o.loss)
    nets.opt_g.zero_grad(set_to_none=True)
    loss_g.backward()
    nets.opt_g.step()
    nets.discriminator.requires_grad_(True)
    nets.ema.update(nets.generator, step)
    return torch.stack([loss_d, loss_g, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()


@torch.no_grad()
def reestimate_batch_norm(generator: nn.Module, device: torch.device, batches: int = 20, size: int = 100) -> None:
    """Set the batch-norm statistics to the mean over ``batches`` batches of fixed noise; leaves eval mode on."""
    norms = [m for m in generator.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean instead of a moving one
    generator.train()
    for i in range(batches):
        generator(noise(-1, range(i * size, (i + 1) * size), generator.z_dim).to(device))
    generator.eval()
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def sample(generator: nn.Module, count: int, device: torch.device) -> Tensor:
    """``count`` images of fixed noise (seed -2, apart from every test seed), uint8 (N, 3, 64, 64) on the CPU."""
    z = noise(-2, range(count), generator.z_dim)
    return torch.cat([to_uint8(generator(batch.to(device))) for batch in z.split(100)])


class Evaluator:
    """Fréchet distance and face rate of samples; the reference is the held-out slice of the training images."""

    def __init__(self, held_out: Tensor, count: int, device: torch.device):
        self.held_out, self.count, self.device = held_out, count, device
        self.inception = None
        if not count:
            return
        from metrics.frechet import Inception

        try:
            self.inception = Inception(device)
        except UserError as error:
            tqdm.write(f"note: no Fréchet distance in this run, the last weights are the best: {error}")

    def __call__(self, generator: nn.Module) -> dict[str, float | str]:
        from metrics.detect import face_counts, face_rate
        from metrics.frechet import frechet_distance

        if not self.count:
            return {}
        images = sample(generator, self.count, self.device)
        scores: dict[str, float | str] = {}
        if self.inception:
            if not hasattr(self, "reference"):
                self.reference = self.inception.features(self.held_out, what="Inception, held out")
            features = self.inception.features(images, what="Inception, samples")
            scores = {"fd": frechet_distance(features, self.reference), "fd_name": self.inception.name}
        try:
            scores["faces"] = face_rate(face_counts(images))
        except UserError as error:
            tqdm.write(f"note: {error}")
        return scores


METRICS = ("step", "minutes", "images_per_s", "lr_factor", "loss_d", "loss_g", "d_real", "d_fake", "fd", "faces")


class Trainer:
    """The loop: train_step, log, sample sheet, evaluate, save. Its position is ``step`` (updates done)."""

    def __init__(self, o: argparse.Namespace):
        self.o, self.device = o, pick_device(o.device)
        if o.bf16 is None:
            o.bf16 = bfloat16_pays(self.device)
        images, held_out = hold_out(load_faces(o.data, "train"))
        if len(images) < 2 or len(held_out) < 2:
            raise UserError(f"{o.data}: {len(images) + len(held_out)} training images; at least 20 are needed")
        self.data_id = f"{len(images)}-{checksum(images[:: max(1, len(images) // 500)])}"
        self.images = images.to(self.device)
        self.nets = build_networks(o, self.device)
        self.step, elapsed, self.best = 0, 0.0, None
        self.run = Run.start(f"p1_{o.model}", o)
        if o.resume:
            elapsed = self.restore()
        self.budget = Budget(o.steps, o.max_minutes, elapsed)
        self.evaluate = Evaluator(held_out, o.eval_images, self.device)
        self.sums, self.since, self.low = torch.zeros(4, device=self.device), 0, 0
        self.clock = self.last_save = time.monotonic()
        torch.backends.cudnn.benchmark = True

    def restore(self) -> float:
        state = load_state(self.run.state_path, self.device)
        if state["data"] != self.data_id:
            raise UserError(f"{self.o.data}: other images than {self.run.folder} was started with; give the same --data")
        self.nets.load(state["networks"])
        self.step, self.best = state["step"], state["best"]
        self.run.forget_after(self.step)
        return state["elapsed"]

    def save(self) -> None:
        state = {
            "networks": self.nets.state(),
            "step": self.step,
            "elapsed": self.budget.elapsed,
            "best": self.best,
            "data": self.data_id,
        }
        save_state(self.run.state_path, state)
        self.last_save = time.monotonic()

    def averaged(self) -> nn.Module:
        """The averaged generator, with batch-norm statistics that belong to its weights."""
        if self.o.ema:
            reestimate_batch_norm(self.nets.ema.module, self.device)
        else:
            self.nets.ema.copy_buffers(self.nets.generator)
        return self.nets.ema.module

    def export(self, name: str, scores: dict) -> None:
        record = self.run.record
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        card = {
            "model": self.o.model,
            "config": {"z_dim": self.nets.generator.z_dim, "dim": self.o.dim},
            "command": record["command"],
            "commit": record["commit"],
            "options": record["options"],
            "data": f"{len(self.images)} training images ({self.data_id})",
            "steps": self.step,
            "minutes": round(self.budget.elapsed / 60, 1),
            "hardware": gpu or f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "held_out_scores": scores,
        }
        save_weights(self.run.folder / f"{name}.safetensors", self.nets.ema.module.state_dict(), card)

    def log(self, bar: tqdm, scores: dict) -> None:
        """A metrics row: means since the last one, and the scores if there are any."""
        means, now = (self.sums / max(self.since, 1)).tolist(), time.monotonic()
        rate = self.since * self.o.batch_size / max(now - self.clock, 1e-9)
        values = (self.step, self.budget.elapsed / 60, rate, self.factor, *means, scores.get("fd"), scores.get("faces"))
        self.run.log(dict(zip(METRICS, values, strict=True)))
        bar.set_postfix_str(
            f"loss D {means[0]:.3f} G {means[1]:.3f}, D(x) {means[2]:.2f}, D(G(z)) {means[3]:.2f}, {rate:.0f} img/s"
        )
        self.low = self.low + 1 if means[0] < COLLAPSE_LOSS else 0
        if self.low == 10:
            tqdm.write(
                f"warning: step {self.step}: the discriminator has won (loss below {COLLAPSE_LOSS} for "
                f"{10 * LOG_STEPS} steps); the generator no longer learns. Lower --lr-d or add --augment"
            )
        self.sums.zero_()
        self.since, self.clock = 0, now

    def checkpoint(self, bar: tqdm, evaluate: bool) -> None:
        """Sample sheet, scores when asked for, exported weights, curves."""
        generator = self.averaged()
        save_png(sheet(sample(generator, 64, self.device), 8), self.run.folder / f"samples/{self.step:07d}.png")
        scores = self.evaluate(generator) if evaluate else {}
        self.log(bar, scores)
        self.export("last", scores)
        if "fd" in scores:
            tqdm.write(f"step {self.step}: {scores['fd_name']} {scores['fd']:.3f}, faces {scores.get('faces', 0):.1f} %")
        if evaluate and ("fd" not in scores or self.best is None or scores["fd"] < self.best):
            self.best = scores.get("fd")
            self.export("best", scores)
        panels = [["loss_d", "loss_g"], ["d_real", "d_fake"], ["fd"], ["faces"]]
        plot_curves(self.run.metrics_path, self.run.folder / "curves.png", panels, self.run.folder.name)

    def train(self) -> None:
        o = self.o
        self.nets.generator.train()
        self.nets.discriminator.train()
        with StopFlag() as stop, tqdm(initial=self.step, total=o.steps, unit="step", desc=self.run.folder.name) as bar:
            while (progress := self.budget.progress(self.step)) < 1 and not stop.set:
                self.factor = annealed(progress) if o.anneal else 1.0
                self.sums += train_step(self.nets, self.images, self.step, self.factor, o, o.bf16)
                self.step += 1
                self.since += 1
                bar.update()
                done = self.budget.progress(self.step) >= 1
                if done or self.step % o.eval_every == 0:
                    self.checkpoint(bar, evaluate=True)
                elif self.step % o.sample_every == 0:
                    self.checkpoint(bar, evaluate=False)
                elif self.step % LOG_STEPS == 0:
                    self.log(bar, {})
                if done or time.monotonic() - self.last_save > o.save_every * 60:
                    self.save()
            if stop.set:
                self.save()
                tqdm.write(f"stopped at step {self.step}; go on with: python3 p1_train.py --resume {self.run.folder}")
                sys.exit(130)


def main() -> None:
    trainer = Trainer(parse_options(sys.argv[1:]))
    trainer.train()
    print(f"done: {trainer.run.folder}/best.safetensors; sample it with: ", end="")
    print(f"python3 p1_test.py --weights {trainer.run.folder}/best.safetensors --out faces")


if __name__ == "__main__":
    run_main(main)
