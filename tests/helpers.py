"""What several test files need: small real-format data, scripts run in-process, a stand-in for Inception."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import run_main
from metrics.frechet import frechet_distance

ROOT = Path(__file__).resolve().parent.parent


def smooth_images(count: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, channels): coloured gradients, all different."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (count, 2, 2, channels))
    t = np.linspace(0, 1, size)
    rows = corners[:, :1] * (1 - t)[None, :, None, None] + corners[:, 1:] * t[None, :, None, None]
    full = rows[:, :, :1] * (1 - t)[None, None, :, None] + rows[:, :, 1:] * t[None, None, :, None]
    return full.round().astype(np.uint8)


def write_pngs(folder: Path, images: np.ndarray) -> list[Path]:
    """Save images as 00000.png, 00001.png, ... (one channel: gray files)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.squeeze()).save(path)
    return paths


def write_index(path: Path, rows: list[tuple]) -> None:
    """A list of images as the course has it: image_name,label."""
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("image_name", "label"), *rows])


@dataclass
class Outcome:
    code: int
    error: str  # the one line of an error, or ""


def run(main, *argv: object) -> Outcome:
    """Call a script's ``main`` as the command line would. Raises what would be a traceback."""
    before = sys.argv
    sys.argv = [f"{main.__module__}.py", *map(str, argv)]
    try:
        run_main(main)
    except SystemExit as end:
        if isinstance(end.code, str):
            return Outcome(1, end.code)
        return Outcome(int(end.code or 0), "")
    finally:
        sys.argv = before
    return Outcome(0, "")


def assert_user_error(outcome: Outcome, *parts: object) -> None:
    """A non-zero exit with one line that holds every one of ``parts``."""
    assert outcome.code != 0
    assert outcome.error
    assert "\n" not in outcome.error
    for part in parts:
        assert str(part) in outcome.error


class MeanInception:
    """Stands in for Inception: the features of an image are its 16x16-block means, 48 numbers."""

    dims, name, note = 48, "FD-48", ""

    sizes = (48,)

    def __init__(self, device: torch.device, dims: int | None = None, also: tuple[int, ...] = ()):
        pass

    def distances(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {self.name: frechet_distance(x, y)}

    def features(self, images: Tensor, batch_size: int = 50, what: str = "") -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, images.shape[-1] // 4).flatten(1)

    def reference(self, images: Tensor, cache: Path) -> Tensor:
        return self.features(images)
