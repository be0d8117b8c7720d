"""Tensors to PNG files: single images, sheets, training curves."""

import csv
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic, make_folder

# Paul Tol's "muted" colours, which colour-blind readers can tell apart, and a gray
MUTED = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#555555")


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 on the CPU, rounded to nearest; values outside are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(image: Tensor, path: Path, compress_level: int = 6) -> None:
    """uint8 (3, H, W) or (1, H, W) -> an RGB or gray PNG, written under a temporary name and renamed."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=compress_level)


def save_images(images: Tensor, names: list[str], out: Path) -> None:
    """uint8 (N, C, H, W) -> ``out/NAME`` for each name. All files appear together, at the end, or none does.

    The folder is made when missing. A note names files in it that are not of this set.
    """
    existed = Path(out).is_dir()
    out = make_folder(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as temporary:
            for image, name in zip(images, names, strict=True):
                save_png(image, Path(temporary) / name)
            for name in names:
                (Path(temporary) / name).replace(out / name)
    except BaseException:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    foreign = sorted({p.name for p in out.iterdir()} - set(names))
    if foreign:
        listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        print(f"note: {out} also holds {len(foreign)} other files ({listed})", file=sys.stderr)


def sheet(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 (N, C, H, W) -> one uint8 picture (C, rows * (H + gap) + gap, ...), row by row, white gaps."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def plot_strip(images: list[Tensor], titles: list[str], path: Path) -> None:
    """uint8 (3, H, W) images side by side, enlarged, each under its title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images), figsize=(1.5 * len(images), 1.8), squeeze=False, layout="constrained")
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def plot_points(points: np.ndarray, groups: list[int], names: list[str], title: str, path: Path) -> None:
    """Points (N, 2), coloured by group (an index into ``names``), with a legend beside the crowd.

    More than two groups are drawn as their names, one character each, without a legend: colour alone does not tell ten
    apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    many = len(names) > 2
    colours = MUTED if many else ("#0072b2", "#d55e00")
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    for group, name in enumerate(names):
        chosen = points[np.array(groups) == group]
        style = {"marker": f"${name}$", "s": 16} if many else {"s": 7}
        axis.scatter(chosen[:, 0], chosen[:, 1], color=colours[group], label=name, linewidths=0, **style)
    axis.set(title=title, xticks=[], yticks=[])
    if not many:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2.5, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def plot_curves(metrics_csv: Path, path: Path, panels: tuple[tuple[str, ...], ...], title: str) -> None:
    """One panel per tuple of columns of a metrics CSV, against its ``step`` column. Empty cells are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with metrics_csv.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    panels = [columns for columns in panels if any(row.get(c) for row in rows for c in columns)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, columns in zip(axes[0], panels, strict=True):
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                axis.plot(*zip(*points, strict=True), label=column, marker="." if len(points) < 30 else None)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(columns) > 6 else {}
        axis.legend(**beside)
    figure.suptitle(title)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)
