"""Images on disk -> one uint8 tensor, decoded once, cached. Shared by all data sets.

Three forms are read:
- a folder of image files (PNG, JPEG, WebP, BMP, GIF, TIFF, PGM, PPM), in the order of their names;
- a folder ``data/`` and the files of it that a CSV lists, in the order of the list;
- packed mosaics: ``SPLIT_00.jpg, SPLIT_01.jpg, ...`` (or ``.webp``, ``.png``), each a grid of tiles with
  50 columns, filled row by row, and ``SPLIT.csv`` whose column ``image_name`` lists the tiles in order.
  40,000 faces fit in 85 MB this way, so they can be carried to a machine without a network.

Any mode is converted: gray, palette and transparent images become RGB (transparency is dropped). An image
file of another size is resized (Lanczos).
"""

import csv
import hashlib
import os
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic, check_writable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
COLUMNS = 50  # tiles per row of a mosaic
FORMAT = "2"  # raise when decoding changes, so that older caches are rebuilt
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad files


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name. Raises UserError when it is missing or has none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise UserError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))}); give a folder of images")
    return paths


def check_range(image: Image.Image) -> None:
    """Raises ValueError for an image whose values have no known range: floats, and 32-bit integers other than 16 bits
    of data, which TIFF files can hold."""
    wide = image.mode == "I" and image.format == "TIFF" and not 255 < np.asarray(image).max() < 65536
    if wide or image.mode == "F":
        raise ValueError(f"values of an unknown range (mode {image.mode})")


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """One image file -> uint8 (size, size, 3), or its own (H, W, 3) without ``size``."""
    with Image.open(path) as image:
        check_range(image)
        if image.mode.startswith("I"):  # 16 bits, which ``convert`` would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


def decode_files(paths: list[Path], size: int, what: str = "images") -> Tensor:
    """Image files -> uint8 (N, 3, size, size), in parallel, with a progress bar.

    Raises one UserError that names the unreadable files, if any.
    """
    pixels = np.empty((len(paths), size, size, 3), np.uint8)
    bad: list[Path] = []

    def decode(i: int) -> None:
        try:
            pixels[i] = read_image(paths[i], size)
        except UNREADABLE:
            bad.append(paths[i])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(decode, range(len(paths)))
        for _ in tqdm(jobs, f"decoding {what}", len(paths), unit="img", disable=len(paths) < 2000):
            pass
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} images cannot be read: {name_some(sorted(bad))}; replace them")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def find_mosaics(folder: Path, split: str) -> list[Path]:
    """The packed mosaics of a split, in order; empty when the folder is not packed."""
    named = (p for p in Path(folder).glob(f"{split}_*") if re.fullmatch(rf"{split}_[0-9]+", p.stem))
    mosaics = sorted((p for p in named if p.suffix.lower() in SUFFIXES), key=lambda p: int(p.stem.rpartition("_")[2]))
    if len({p.stem for p in mosaics}) < len(mosaics):
        raise UserError(f"{folder}: has a mosaic of {split} twice ({name_some(mosaics)}); remove one of the two")
    return mosaics


def decode_mosaics(mosaics: list[Path], index: Path, size: int, what: str = "images") -> Tensor:
    """Packed mosaics -> uint8 (N, 3, size, size), N being the rows of ``index``."""
    count = len(read_index(index))
    pixels = np.empty((count, size, size, 3), np.uint8)
    start = 0
    for path in tqdm(mosaics, f"decoding {what}", unit="mosaic", disable=count < 2000):
        try:
            grid = read_image(path)
        except UNREADABLE:
            raise UserError(f"{path}: cannot be read; copy it again") from None
        rows, columns = grid.shape[0] // size, COLUMNS
        if grid.shape[1] != columns * size or grid.shape[0] % size:
            raise UserError(f"{path}: {grid.shape[1]}x{grid.shape[0]} is not a mosaic of {size}x{size} tiles")
        tiles = grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        tiles = tiles[: count - start]
        pixels[start : start + len(tiles)] = tiles
        start += len(tiles)
    if start < count:
        raise UserError(f"{index}: lists {count} images, the mosaics hold {start}; copy the missing mosaics")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def read_index(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV, each with ``image_name`` and ``columns``. Raises UserError when something is missing."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; it must list the images")
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV file in UTF-8; copy it again, or save it as one") from None
    missing = [c for c in ("image_name", *columns) if not rows or any(row.get(c) is None for row in rows)]
    if missing:
        named = " and ".join(missing)
        raise UserError(f"{path}: needs a header line with {named}, separated by commas, and rows that have it")
    return rows


def fingerprint(paths: list[Path], *settings: object) -> str:
    """A key that changes when a file is added, removed, renamed, resized or rewritten, or a setting changes."""
    digest = hashlib.sha256(repr((FORMAT, *settings)).encode())
    for path in paths:
        stat = path.stat()
        digest.update(os.fsencode(path.name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_writable(folder: Path) -> bool:
    """Whether a file can really be made in ``folder`` (root passes every permission check, even read-only mounts)."""
    try:
        check_writable(folder)
        return folder.is_dir()
    except (OSError, UserError):
        return False


def cache_file(beside: Path, name: str) -> Path:
    """``.cache_NAME.safetensors`` in the folder ``beside``; in the user's cache folder when that is read-only."""
    beside = Path(beside).resolve()
    if is_writable(beside):
        return beside / f".cache_{name}.safetensors"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hw2"
    place = hashlib.sha256(str(beside).encode()).hexdigest()[:12]
    return home / f"{place}_{name}.safetensors"


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a CPU tensor's bytes."""
    return f"{zlib.crc32(tensor.contiguous().view(-1).numpy()):08x}"


def describe(images: Tensor) -> str:
    """One line that tells a training set from another: its size and a CRC-32 of some of its images."""
    return f"{len(images)} training images, CRC-32 of a sample {checksum(images[:: max(1, len(images) // 500)])}"


def hold_out(rows: Tensor, at_most: int, data: Path) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out for choosing a checkpoint).

    Held out is the end of the training split, a tenth of it and ``at_most`` rows, so validation data plays no part
    in training or in selection. Raises UserError, naming ``data``, when there are fewer than 20 rows.
    """
    if len(rows) < 20:
        raise UserError(f"{data}: {len(rows)} training images; at least 20 are needed")
    count = min(at_most, len(rows) // 10)
    return rows[: len(rows) - count], rows[len(rows) - count :]


def cached(path: Path, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, kept in ``path`` under ``key``. A cache with another key or wrong bytes is rebuilt.

    When the cache cannot be written (read-only, full disk) the tensor is returned all the same.
    """
    try:
        with safe_open(path, "pt") as f:
            if (f.metadata() or {}).get("key") == key:
                tensor = f.get_tensor("data").clone()  # a copy: the file is memory-mapped and may change
                if checksum(tensor) == f.metadata()["crc32"]:
                    return tensor
    except (OSError, SafetensorError, KeyError):
        pass
    tensor = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file({"data": tensor.contiguous()}, temporary, {"key": key, "crc32": checksum(tensor)})
    except (OSError, SafetensorError) as error:
        tqdm.write(f"note: {path} could not be written ({error}); images will be decoded again next time")
    return tensor


def load_split(root: Path, split: str, size: int, listed: bool = False) -> Tensor:
    """The images of a split: uint8 (N, 3, size, size), from the first of these forms that is there:

    - the folder ``root/split/``, all of its images; with ``listed`` the files of ``root/data/`` that stand in the
      column image_name of ``root/split.csv``, in that order;
    - the packed mosaics ``root/split_00.*`` with ``root/split.csv``.

    Raises UserError for whatever is missing or unreadable, by name.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; see README, Data")
    folder, index = root / ("data" if listed else split), root / f"{split}.csv"
    mosaics, what = find_mosaics(root, split), f"{root.name}/{split}"
    cache = cache_file(root, f"{split}_{size}x{size}x3")
    if folder.is_dir():
        paths = [folder / row["image_name"] for row in read_index(index)] if listed else list_images(folder)
        absent = [p for p in paths if not p.is_file()] if listed else []
        if absent:
            raise UserError(f"{index}: lists {len(absent)} images that are not there: {name_some(absent)}; copy them")
        key = fingerprint(paths, size, 3)
        return cached(cache, key, lambda: decode_files(paths, size, what))
    if mosaics:
        read_index(index)
        key = fingerprint([*mosaics, index], size, 3)
        return cached(cache, key, lambda: decode_mosaics(mosaics, index, size, what))
    raise UserError(f"{root}: has neither a folder {folder.name}/ nor packed mosaics {split}_00.*; see README, Data")


def name_some(paths: list[Path] | list[str]) -> str:
    """The first five of ``paths``, for an error message."""
    return ", ".join(map(str, paths[:5])) + (", ..." if len(paths) > 5 else "")
