"""Run folders: numbered, with their options, metrics and training state; budgets; stopping; resuming.

A run folder ``runs/p1_sngan_000`` holds ``options.json``, ``metrics.csv``, ``curves.png``, ``samples/``,
``state.pt`` (to resume) and the weights it exports.
"""

import argparse
import csv
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import alone_in, atomic, make_folder, write_json
from common.options import add_device_option, positive_float, positive_int, seed, several_or_none
from common.parallel import processes

BUDGET = {"steps", "max_minutes"}  # may be changed on resume, which is noted in options.json
PLACES = {"device", "data", "save_every", "keep", "record"}  # may be changed on resume, too
FREE_ON_RESUME = BUDGET | PLACES | {"resume"}  # all other options define the result


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options every training script has."""
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--max-minutes", type=positive_float, help="stop after so many minutes; annealing ends there")
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights, data order and noise")
    add_device_option(parser)
    parser.add_argument("--bf16", action=boolean, help="bfloat16 autocast (default: where the processor profits)")
    parser.add_argument("--save-every", type=positive_float, default=3.0, help="minutes between training states")
    parser.add_argument("--keep", action="store_true", help="keep the weights of every evaluation (step_*.safetensors)")
    parser.add_argument("--record", type=Path, metavar="JSON", help="put the last held-out scores into this file")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Options of the scripts that train a generator."""
    parser.add_argument("--sample-every", type=positive_int, default=1000, help="steps between sample sheets")
    parser.add_argument("--eval-every", type=positive_int, default=5000, help="steps between evaluations")
    what = "samples per evaluation (digits: in tens), 0 for none"
    parser.add_argument("--eval-images", type=several_or_none, default=1000, help=what)


def parse_with_resume(
    parser: argparse.ArgumentParser,
    argv: list[str],
    recipe: Callable[[argparse.Namespace], dict[str, object]] | None = None,
) -> argparse.Namespace:
    """Options from the command line. ``recipe`` gives the defaults that depend on other options; with --resume the
    saved options take the place of all defaults. Raises UserError when a given option differs from a saved one."""
    options = parser.parse_args(argv)
    if recipe:
        parser.set_defaults(**recipe(options))
        options = parser.parse_args(argv)
    return resume_options(parser, options, argv) if options.resume else options


def to_json(options: argparse.Namespace) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(options).items())}


def given_options(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """Names of the options that stand on the command line, whatever their values."""
    absent = object()  # argparse fills in defaults only where the namespace has nothing yet
    namespace = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, namespace)).items() if value is not absent}


def resume_options(parser: argparse.ArgumentParser, options: argparse.Namespace, argv: list[str]) -> argparse.Namespace:
    """The options saved in ``options.resume``, with the free ones from the command line.

    Raises UserError naming every option that was given and differs from the saved one.
    """
    path = options.resume / "options.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, script = record["options"], Path(shlex.split(record["command"])[1]).name
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --resume takes a run folder, such as runs/p1_sngan_000") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; start a new run") from None
    if script != Path(sys.argv[0]).name:
        raise UserError(f"{options.resume}: is a run of {script}; resume it with python3 {script}")
    given, asked = given_options(parser, argv), to_json(options)
    changed = [k for k in sorted(given - FREE_ON_RESUME) if asked[k] != saved.get(k)]
    if changed:
        listed = ", ".join(f"--{k.replace('_', '-')} (run {saved.get(k)}, given {asked[k]})" for k in changed)
        raise UserError(f"{options.resume}: cannot resume with other options: {listed}; leave them out")
    merged = argparse.Namespace(**(asked | saved | {k: asked[k] for k in given}))
    merged.resume = options.resume
    merged.data, merged.out = Path(merged.data), Path(merged.out)
    merged.record = merged.record and Path(merged.record)
    return merged


def command_line() -> str:
    """The command of this process, as it would be typed in the repository's folder."""
    here = f"{Path(__file__).resolve().parents[1]}/"
    script, *words = (word.removeprefix(here) for word in sys.argv)
    return shlex.join(["python3", script.removeprefix("./"), *words])


def git_commit() -> str:
    """Commit of the code, with ``+changes`` when the tree differs from it; ``unknown`` outside git."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Run:
    """One run folder. ``Run.start`` makes a new numbered one."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.state_path = self.folder / "state.pt"
        self.metrics_path = self.folder / "metrics.csv"

    @classmethod
    def start(cls, name: str, options: argparse.Namespace, before: list[dict] | None = None) -> "Run":
        """Make the next numbered folder. ``before`` tells of the runs whose weights this one starts from."""
        out = make_folder(options.out)
        with alone_in(out):
            numbers = [p.name.removeprefix(f"{name}_") for p in out.glob(f"{name}_*")]
            number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)
            run = cls(out / f"{name}_{number:03d}")
            make_folder(run.folder / "samples")
        record = {"command": command_line(), "commit": git_commit(), "options": to_json(options)}
        write_json(run.folder / "options.json", record | ({"before": before} if before else {}))
        return run

    def resumed(self, options: argparse.Namespace) -> None:
        """Note the command that resumes this run, and the options that it changes."""
        record = self.record
        now = {k: v for k, v in to_json(options).items() if k in BUDGET | PLACES}
        budget = {k: v for k, v in now.items() if k in BUDGET}
        if any(record["options"].get(k) != v for k, v in budget.items()):
            record["budget"] = budget  # no longer what the first command says
        record["options"] |= now
        this = {"command": command_line(), "commit": git_commit()}
        write_json(self.folder / "options.json", record | {"resumed": [*record.get("resumed", []), this]})

    def resume_command(self) -> str:
        """What goes on with this run, as started from here: with as many processes."""
        several = ["torchrun", "--standalone", "--nproc-per-node", str(processes())]
        return shlex.join([*(several if processes() > 1 else ["python3"]), sys.argv[0], "--resume", str(self.folder)])

    @property
    def record(self) -> dict:
        """What options.json holds: command and commit that started the run, its options, what resumed it."""
        return json.loads((self.folder / "options.json").read_text(encoding="utf-8"))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the folder from other processes. Raises UserError when one trains in it."""
        busy = f"{self.folder}: is being trained by another process; wait for it, or stop it"
        with alone_in(make_folder(self.folder / "samples"), busy):
            yield

    def log(self, row: dict[str, object]) -> None:
        """Append a row to metrics.csv, of the same columns as all others; floats keep 5 significant digits."""
        row = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.metrics_path.open("a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(row), lineterminator="\n")
            if not f.tell():  # empty
                writer.writeheader()
            writer.writerow(row)

    def forget_after(self, step: int) -> None:
        """Drop metric rows after ``step``, which a killed run may have logged after its last save, and cut ones."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        header, *rows = [line for line in lines if line.endswith("\n")] or [""]
        steps = [row.partition(",")[0] for row in rows]
        kept = [row for row, n in zip(rows, steps, strict=True) if n.isdecimal() and int(n) <= step]
        with atomic(self.metrics_path) as temporary:
            temporary.write_text("".join([header, *kept]), encoding="utf-8")


class Budget:
    """Progress in [0, 1] over ``steps`` and ``max_minutes``, whichever is further. Time before a resume counts."""

    def __init__(self, steps: int, max_minutes: float | None, elapsed: float = 0.0):
        self.steps, self.seconds = steps, (max_minutes or math.inf) * 60
        self.started = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.steps, self.elapsed / self.seconds))


def annealed(progress: float, hold: float = 0.5) -> float:
    """Learning-rate factor: 1 for the first ``hold`` of the budget, then linear to 0."""
    return min(1.0, max(0.0, 1.0 - progress) / (1.0 - hold)) if hold < 1 else 1.0


class StopFlag:
    """Turns SIGINT, SIGTERM and, unless it is ignored (nohup), SIGHUP into ``flag.set``, so that the loop can save and
    end. A second one kills."""

    def __enter__(self) -> "StopFlag":
        self.set = False
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._stop) for s in signals}
        return self

    def _stop(self, number: int, _frame: object) -> None:
        self.set = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
