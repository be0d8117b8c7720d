"""Result files: measured rows with the command, commit, hardware and weights that gave them.

A result file is a JSON list with one row a line. README and report are made from such files, so a number stands in one
place. A row is known by its ``key`` (for instance sampler, steps and seed): measured again, it is replaced.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from common.device import hardware
from common.errors import UserError
from common.files import alone_in, atomic, check_file, make_folder
from common.run import command_line, git_commit


def add_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, metavar="JSON", help="with --evaluate: put the scores into this file")


def weights_id(path: Path) -> str:
    """The first 12 digits of a weight file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def weights_name(path: Path) -> str:
    """What a weight file is called in result files: its name, after that of its run folder where it lies in one."""
    path = Path(path).resolve()
    return f"{path.parent.name}/{path.stem}" if (path.parent / "options.json").exists() else path.stem


def read_results(path: Path) -> list[dict]:
    """The rows of a result file. Raises UserError when it is missing or something else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such result file; measure with --record {path}, or restore it with git") from None
    except (ValueError, OSError):
        rows = None
    parts = {"key": dict, "scores": dict, "weights": str, "hardware": str}

    def sound(row: object) -> bool:
        return (
            isinstance(row, dict)
            and all(isinstance(row.get(name), kind) for name, kind in parts.items())
            and all(isinstance(score, (int, float)) for score in row["scores"].values())
        )

    if not isinstance(rows, list) or not all(map(sound, rows)):
        raise UserError(f"{path}: not a result file; move it away, or restore it with git")
    return rows


def check_record(path: Path | None, scored: bool, remedy: str = "add --evaluate") -> None:
    """Raises UserError when --record is given and cannot take a row, before anything is measured.

    ``scored``: whether there will be scores; ``remedy``: what the user has to do to have some.
    """
    if path is None:
        return
    if not scored:
        raise UserError(f"--record: needs scores; {remedy}")
    make_folder(path.parent)
    check_file(path)
    if path.exists():
        read_results(path)


def training_key(card: dict) -> dict:
    """What tells a training from others: its command, and its budget where a resume changed that."""
    return {"training": card["command"]} | ({"budget": card["budget"]} if "budget" in card else {})


def stored(key: dict) -> dict:
    """A key as a result file gives it back: tuples are lists."""
    return json.loads(json.dumps(key))


def record(path: Path, key: dict, scores: dict[str, float], weights: Path | None, device: torch.device) -> None:
    """Put a row into a result file: ``key`` says what was measured, ``scores`` keep 6 significant digits."""
    key = stored(key)
    new = {
        "key": key,
        "scores": {name: float(f"{value:.6g}") for name, value in scores.items()},
        "weights": weights_id(weights) if weights else "none",
        "command": command_line(),
        "commit": git_commit(),
        "hardware": hardware(device),
    }
    with alone_in(path.parent):
        rows = [row for row in read_results(path) if row["key"] != key] if path.exists() else []
        rows = sorted([*rows, new], key=lambda row: json.dumps(row["key"]))
        with atomic(path) as temporary:
            temporary.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
