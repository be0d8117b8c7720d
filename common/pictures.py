"""Tensors to PNG files: single images, sheets, training curves."""

import csv
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic, check_replaceable, make_folder

# Colours that colour-blind readers can tell apart: Okabe and Ito for a few lines, Paul Tol's "muted" and a gray for ten
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MUTED = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#555555")
WIDTH = 8.4  # inches, at 100 dots each


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 on the CPU, rounded to nearest; values outside are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(image: Tensor, path: Path, compress_level: int = 6) -> None:
    """uint8 (3, H, W) or (1, H, W) -> an RGB or gray PNG, written under a temporary name and renamed.

    Its folder is made when missing.
    """
    make_folder(path.parent)
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=compress_level)


def save_images(images: Tensor, names: list[str], out: Path) -> None:
    """uint8 (N, C, H, W) -> ``out/NAME`` for each name. All files appear together, at the end; before that an error
    leaves none, and a folder that was not there goes.

    The folder is made when missing. A note names files in it that are not of this set.
    """
    existed = Path(out).is_dir()
    out = make_folder(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as temporary:
            for image, name in zip(images, names, strict=True):
                save_png(image, Path(temporary) / name)
            for name in names:
                check_replaceable(out / name)
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


def pyplot():
    """matplotlib.pyplot without a display, with the one look of all figures. (Imported late: it takes a second.)"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cycle = matplotlib.cycler(color=OKABE_ITO)
    look = {"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13, "savefig.dpi": 100, "axes.prop_cycle": cycle}
    plt.rcParams.update(look | {"figure.constrained_layout.use": True, "legend.frameon": False})
    return plt


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, under a temporary name and renamed, and close it.

    Its folder is made when missing.
    """
    make_folder(path.parent)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot().close(figure)


def plot_images(images: Sequence[Tensor], titles: list[str], path: Path, columns: int) -> None:
    """uint8 (3, H, W) images row by row, enlarged, each under its title."""
    rows = -(-len(images) // columns)
    size = (WIDTH, rows * (WIDTH / columns + 0.4))
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, title) in zip(axes.flat, zip(images, titles, strict=True), strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title)
    save_figure(figure, path)


def plot_points(points: np.ndarray, groups: list[int], names: list[str], title: str, path: Path) -> None:
    """Points (N, 2), coloured by group (an index into ``names``), with a legend below the crowd.

    More than two groups are drawn as their names, one character each, without a legend: colour alone does not tell ten
    apart.
    """
    many = len(names) > 2
    colours = MUTED if many else OKABE_ITO
    figure, axis = pyplot().subplots(figsize=(0.7 * WIDTH, 0.7 * WIDTH))
    for group, name in enumerate(names):
        chosen = points[np.array(groups) == group]
        style = {"marker": f"${name}$", "s": 24} if many else {"s": 9}
        axis.scatter(chosen[:, 0], chosen[:, 1], color=colours[group], label=name, linewidths=0, **style)
    axis.set(title=title, xticks=[], yticks=[])
    if not many:
        figure.legend(loc="outside lower center", ncols=len(names), markerscale=3)
    save_figure(figure, path)


def plot_curves(metrics_csv: Path, path: Path, panels: dict[str, tuple[str, ...]], title: str) -> None:
    """Columns of a metrics CSV against its ``step`` column, one panel (title: columns) each, two in a row.

    Empty cells, columns that are zero throughout and panels without numbers are left out.
    """
    with metrics_csv.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    columns = {c for names in panels.values() for c in names if any(float(row.get(c) or 0) for row in rows)}
    panels = {name: shown for name, names in panels.items() if (shown := [c for c in names if c in columns])}
    if not panels:
        return
    height = -(-len(panels) // 2)
    figure, axes = pyplot().subplots(height, 2, figsize=(WIDTH, 2.6 * height + 0.4), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, shown) in zip(axes.flat, panels.items(), strict=False):
        many = len(shown) > len(OKABE_ITO)
        for i, column in enumerate(shown):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            style = {"color": MUTED[i % len(MUTED)], "markersize": 7} if many else {}
            few = f"${column[-1]}$" if many else "."
            axis.plot(*zip(*points, strict=True), label=column, marker=few if len(points) < 30 else None, **style)
        axis.set(title=name, xlabel="training step")
        axis.grid(alpha=0.3)
        if len(shown) > 1:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, handlelength=1)
    figure.suptitle(title)
    save_figure(figure, path)
