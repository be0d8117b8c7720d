"""The training loop that the three problems share: update, log, show, evaluate, save, resume, stop."""

import argparse
import errno
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import load_network, load_state, load_weights, save_state, save_weights
from common.device import hardware
from common.errors import UserError, is_out_of_memory
from common.parallel import agree, average_gradients, is_first, join, leave
from common.pictures import plot_curves, save_png
from common.results import check_record, record, training_key
from common.run import Budget, Run, StopFlag, annealed

LOG_STEPS = 50  # steps between rows of metrics.csv


class Part(Protocol):
    """A network, an average or an optimiser: something with a state to save."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> object: ...


def descend(loss: Tensor, optimiser: torch.optim.Optimizer, lr: float) -> None:
    """A step down the gradient of ``loss``, of which every process has computed its share."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(optimiser)
    optimiser.step()


class Trainer:
    """A resumable loop. ``step`` counts the updates done, ``scored`` is the one that was evaluated last. ``progress``,
    the used share of the budget before the next update, and ``factor``, that update's learning-rate factor, are the
    same in all processes.

    A problem's trainer sets the four class attributes and defines the methods that raise NotImplementedError. Its
    ``update`` must draw every random number from ``common.device.step_generator(device, seed, step)``; a resumed
    run is then the same as one that was never stopped, where the budget is in steps. With several processes
    (common/parallel.py) it computes this process's share of the batch, and averages gradients.
    """

    losses: tuple[str, ...]  # names of what ``update`` returns
    scores: tuple[str, ...]  # names of what ``evaluate`` may return
    selects: str  # the score whose smallest value marks the best weights
    panels: dict[str, tuple[str, ...]]  # title: columns drawn together in curves.png
    facts: Mapping[str, object] = MappingProxyType({})  # what else the card of exported weights has to say

    def __init__(
        self,
        name: str,
        o: argparse.Namespace,
        device: torch.device,
        data_id: str,
        parts: dict[str, Part],
        before: list[dict] | None = None,
    ):
        """``name`` of the run folder, options, device, a key of the training data, all that training changes, and the
        runs whose weights it starts from."""
        remedy = "leave it out, this run has none" if o.resume else "give --eval-images above 0"
        check_record(o.record, getattr(o, "eval_images", 1) > 0, remedy)
        self.o, self.device, self.data_id, self.parts = o, device, data_id, parts
        self.step, self.scored, self.progress, self.best, elapsed = 0, -1, 0.0, None, 0.0
        join(o.batch_size)
        self.sums, self.since = torch.zeros(len(self.losses), device=device), 0
        if o.resume:
            self.run = Run(o.resume)
            with self.alone():
                elapsed = self.restore()
        else:
            self.run = Run.start(name, o, before) if is_first() else Run(o.out)  # the others write nothing
        self.budget = Budget(o.steps, o.max_minutes, elapsed)
        self.last_save = time.monotonic()
        torch.backends.cudnn.benchmark = True

    def alone(self) -> AbstractContextManager:
        """Keep other trainings out of the run folder. Raises UserError when there is one."""
        return self.run.alone() if is_first() else nullcontext()

    @property
    def life(self) -> float:
        """The used share of what the learning rate anneals over: of the budget, unless a network starts within it."""
        return self.progress

    @property
    def factor(self) -> float:
        return annealed(self.life) if self.o.anneal else 1.0

    def start_clock(self) -> None:
        """What the speed in metrics.csv is measured from."""
        self.clock, self.clocked = time.monotonic(), self.step

    @contextmanager
    def off_clock(self) -> Iterator[None]:
        """For what is no training: its time does not count in that speed. The device must be idle at the start."""
        begun = time.monotonic()
        yield
        self.clock += time.monotonic() - begun

    def update(self) -> Tensor:
        """One update of all networks; returns ``losses``, float32 on the device, without waiting for it."""
        raise NotImplementedError

    def describe(self, means: dict[str, float]) -> str:
        """What the progress bar says of the mean losses since the last time; the place for warnings, too."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Called before a checkpoint: bring the weights that will be shown, scored and exported up to date."""

    def picture(self) -> Tensor | None:
        """uint8 (C, H, W) that shows where training is, from fixed noise or data; None for no picture."""
        return None

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out training data, by their names in ``scores``; those that cannot be had are left out."""
        raise NotImplementedError

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        """(model, its configuration, state dict) to export."""
        raise NotImplementedError

    def restore(self) -> float:
        """Load the saved state; returns the seconds trained so far."""
        state = load_state(self.run.state_path)
        try:
            if state["data"] != self.data_id:
                raise UserError(
                    f"{self.o.data}: not the data that {self.run.folder} was started with; give the same --data"
                )
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self.step, self.scored, self.best, elapsed = (state[k] for k in ("step", "scored", "best", "elapsed"))
            self.sums, self.since = state["sums"].to(self.device), state["since"]
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{self.run.state_path}: of another version of the code; start a new run") from None
        best, last = ((self.run.folder / f"{name}.safetensors").exists() for name in ("best", "last"))
        if not (best and last):  # deleted: the next evaluation writes them again
            self.best, self.scored = self.best if best else None, -1
        if is_first():
            self.run.resumed(self.o)
            self.run.forget_after(self.step)
        return elapsed

    def check(self) -> None:
        """Raises UserError when a loss since the last row of metrics.csv was infinite or no number."""
        if not bool(self.sums.isfinite().all()):
            raise UserError(
                f"{self.run.folder}: a loss is no finite number after step {self.step}; start again with a lower "
                "learning rate"
            )

    def save(self) -> None:
        self.check()
        with self.off_clock():
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            position = {"step": self.step, "scored": self.scored, "best": self.best, "elapsed": self.budget.elapsed}
            position |= {"sums": self.sums, "since": self.since}
            save_state(self.run.state_path, {"parts": parts, "data": self.data_id, **position})
        self.last_save = time.monotonic()

    def export(self, name: str, scores: dict) -> None:
        record, (model, config, state) = self.run.record, self.weights()
        card = {
            "model": model,
            "config": config,
            "command": record["command"],
            "commit": record["commit"],
            "options": record["options"],
            "data": self.data_id,
            "steps": self.step,
            "minutes": round(self.budget.elapsed / 60, 1),
            "hardware": hardware(self.device),
            "bf16": self.o.bf16,
            "torch": str(torch.__version__),
            "held_out_scores": scores,
        }
        card |= dict(self.facts) | {k: record[k] for k in ("resumed", "budget", "before") if k in record}
        save_weights(self.run.folder / f"{name}.safetensors", state, card)

    def best_network(self, kinds: dict[str, Callable[..., nn.Module]]) -> nn.Module:
        """The exported best weights, as ``common.checkpoint.load_network`` reads them."""
        return load_network(self.run.folder / "best.safetensors", kinds)[0].to(self.device)

    def log(self, bar: tqdm, scores: dict) -> None:
        """A row of metrics.csv: mean losses since the last row, and the scores, if any."""
        self.check()
        means = dict(zip(self.losses, (self.sums / max(self.since, 1)).tolist(), strict=True))
        rate = (self.step - self.clocked) * self.o.batch_size / max(time.monotonic() - self.clock, 1e-9)
        row = {"step": self.step, "minutes": self.budget.elapsed / 60, "images_per_s": rate, "lr_factor": self.factor}
        losses = means if self.since else dict.fromkeys(means)
        self.run.log(row | losses | {name: scores.get(name) for name in self.scores})
        bar.set_postfix_str(f"{self.describe(means)}, {rate:.0f} img/s")
        self.sums.zero_()
        self.since = 0
        self.start_clock()

    def checkpoint(self, bar: tqdm, evaluate: bool) -> None:
        """Picture, scores where asked for, exported weights, curves."""
        self.check()
        with self.off_clock():
            self.prepare()
            picture = self.picture()
            if picture is not None:
                save_png(picture, self.run.folder / "samples" / f"{self.step:07d}.png")
            scores = self.evaluate() if evaluate else {}
        self.log(bar, scores)
        self.export("last", scores)
        if scores:
            tqdm.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if evaluate:
            self.scored = self.step
        score = scores.get(self.selects)
        if evaluate and (score is None or self.best is None or score < self.best):
            self.best = score
            self.export("best", scores)
        if evaluate and self.o.keep:
            self.export(f"step_{self.step:06d}", scores)
        plot_curves(self.run.metrics_path, self.run.folder / "curves.png", self.panels, self.run.folder.name)
        self.start_clock()

    def train(self) -> None:
        """Run until the budget is used up. After SIGINT or SIGTERM the state is saved and the script exits with 130."""
        bar = tqdm(
            initial=self.step, total=self.o.steps, unit="step", desc=self.run.folder.name, disable=not is_first()
        )
        self.start_clock()
        with self.alone(), StopFlag() as stop, bar:
            try:
                stopped = self.loop(bar, stop)
            except OSError as error:
                # Ctrl-C has stopped what reads the output, as ``tee`` does, before this script, or the terminal is gone
                if is_first() and (isinstance(error, BrokenPipeError) or error.errno == errno.EIO):
                    self.save()
                raise
            leave()
            if is_first():
                self.finish(bar, stopped)

    def loop(self, bar: tqdm, stop: StopFlag) -> bool:
        """Updates until the budget is used up; whether they were stopped before.

        When the first process, which alone reports, cannot go on, the others end with it, and leave the word to it.
        """
        failure: Exception | None = None
        while True:
            progress, stopped, failed = agree(self.budget.progress(self.step), stop.set, failure is not None)
            if failure:
                raise failure
            if failed:
                sys.exit(1)
            if progress >= 1 or stopped:
                return bool(stopped)
            self.progress = progress
            self.sums += self.update()
            self.step += 1
            self.since += 1
            bar.update()
            if is_first() and self.budget.progress(self.step) < 1:
                try:
                    self.report(bar)
                except (UserError, OSError) as error:
                    failure = error

    def report(self, bar: tqdm) -> None:
        """What is due after a step: an evaluation, a picture, a row of metrics.csv, the saved state."""
        o = self.o
        if self.step % o.eval_every == 0:
            self.checkpoint(bar, evaluate=True)
        elif self.step % o.sample_every == 0:
            self.checkpoint(bar, evaluate=False)
        elif self.step % LOG_STEPS == 0:
            self.log(bar, {})
        if time.monotonic() - self.last_save > o.save_every * 60:
            self.save()

    def finish(self, bar: tqdm, stopped: bool) -> None:
        """Save; unless the run was stopped, score the last step, too, and say where the weights are."""
        o = self.o
        self.save()
        if not stopped and self.scored != self.step:
            self.checkpoint(bar, evaluate=True)
            self.save()
        if stopped:
            tqdm.write(f"stopped at step {self.step}; go on with: {self.run.resume_command()}")
            sys.exit(130)
        if o.record:
            weights = self.run.folder / "last.safetensors"
            _, card = load_weights(weights)
            if self.selects not in card["held_out_scores"]:
                raise UserError(f"{o.record}: no row written, for want of {self.selects} (see the notes above)")
            record(o.record, training_key(card), card["held_out_scores"], weights, self.device)
        print(f"done: {self.run.folder / 'best.safetensors'}")


class LabelTrainer(Trainer):
    """A trainer of a classifier of digits: its loss is the cross-entropy of labels."""

    losses = ("loss",)
    scores = ("error",)
    selects = "error"
    panels: ClassVar = {"loss": ("loss",), "error on held-out digits, %": ("error",)}

    def describe(self, means: dict[str, float]) -> str:
        return "loss {loss:.3f}".format(**means)
