"""Build the course's folder hw2_data from the public data sets.

  python3 -m datasets.prepare hw2_data                              # download everything, build all four sets
  python3 -m datasets.prepare hw2_data --only mnistm --mnist DIR --bsds BSR_bsds500.tgz     # from local files
  python3 -m datasets.prepare hw2_data --only face --celeba img_align_celeba.zip

Writes   hw2_data/face/{train,val,test}/*.png                       64x64 RGB
         hw2_data/digits/{mnistm,svhn,usps}/data/*.png              28x28 (usps: gray)
         hw2_data/digits/{mnistm,svhn,usps}/{train,val,test}.csv    image_name,label
         and beside them contact_sheet.png and prepared.json (what was built, and from what)

The same sources give the same pixels everywhere. An interrupted build goes on where it was; a set appears under its
name when it is complete, and is then left alone. A source can be a folder, a zip or a tar archive; without one it is
downloaded into hw2_data/.sources, which may be deleted afterwards.

SVHN's cropped digits do not tell which photograph they are from. Neighbours in a photograph overlap, so parts of a
validation image can stand in a training image, as in the course's own split.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import csv
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import Parser, UserError, run_main
from common.files import alone_in, make_folder, read_json, write_json
from common.options import positive_int
from common.pictures import save_png, sheet
from datasets import digits, faces
from datasets.sources import (
    Celeba,
    Source,
    check_sha256,
    download,
    load_mnist,
    load_photographs,
    load_svhn,
    load_usps,
    parse_image,
)

SETS = ("mnistm", "svhn", "usps", "face")  # CelebA last: it is the one that may not be had
SPLITS = ("train", "val", "test")
FACE_COUNTS = (38_464, 2_025, 2_132)  # the course's
ALIGNED = (218, 178)  # height and width of CelebA's aligned faces
CROP = 148  # pixels of a CelebA face that are kept, from the middle
SEED = 2022
VERSION = 1  # raise when the result changes
CHUNK = 1000  # images between notes of progress
MARK = "prepared.json"


@dataclass
class Plan:
    """A set to build: for each image its file and split, its label (digits) and a function that draws it."""

    files: list[str]  # under the set's folder
    splits: list[str]
    labels: list[int] | None
    draw: Callable[[int], np.ndarray]  # uint8 (H, W, 3) or (H, W)


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="datasets.prepare")
    parser.add_argument("dest", type=Path, help="folder to build, such as hw2_data")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument("--mnist", type=Path, help="MNIST: the four idx files, gzipped or not")
    parser.add_argument("--bsds", type=Path, help="BSDS500: BSR_bsds500.tgz, or a folder of its images")
    parser.add_argument("--bsds-sha256", default="", metavar="HEX", help="refuse any other BSDS500 archive")
    parser.add_argument("--svhn", type=Path, help="SVHN: train_32x32.mat and test_32x32.mat")
    parser.add_argument("--usps", type=Path, help="USPS: usps.bz2 and usps.t.bz2")
    parser.add_argument("--celeba", type=Path, help="CelebA: img_align_celeba.zip or folder; partition list if there")
    parser.add_argument(
        "--face-counts", type=positive_int, nargs=3, default=FACE_COUNTS, metavar="N", help="faces: train, val, test"
    )
    return parser


def split_sizes(count: int) -> dict[str, int]:
    """The course's shares: a fifth for test, a fifth of the rest for val, both rounded up."""
    test = math.ceil(count / 5)
    val = math.ceil((count - test) / 5)
    return {"train": count - test - val, "val": val, "test": test}


def shuffled(count: int) -> tuple[np.ndarray, np.random.RandomState]:
    """(an order of ``count`` images, the generator that drew it)."""
    random = np.random.RandomState(SEED)  # NumPy promises that its numbers stay the same in all versions
    return random.permutation(count), random


def plan_digits(labels: np.ndarray, order: np.ndarray, draw: Callable[[int], np.ndarray]) -> Plan:
    """Images 00000.png ... in ``order``; ``draw`` takes the position in the published order."""
    splits = [split for split, size in split_sizes(len(order)).items() for _ in range(size)]
    files = [f"data/{i:05d}.png" for i in range(len(order))]
    return Plan(files, splits, labels[order].tolist(), lambda i: draw(order[i]))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, as the course's USPS is."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def blend(digit: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """|patch - digit| in each channel (Ganin et al. 2016, section 5.2.4): (H, W) and (H, W, 3) -> (H, W, 3)."""
    return np.abs(patch.astype(np.int16) - digit[..., None]).astype(np.uint8)


def plan_mnistm(source: Source, photographs: list[np.ndarray]) -> Plan:
    images, labels = load_mnist(source)
    order, random = shuffled(len(images))
    which = random.randint(len(photographs), size=len(images))
    corner = random.random_sample((len(images), 2))

    def draw(i: int) -> np.ndarray:
        photograph, (h, w) = photographs[which[i]], images[i].shape
        top = int(corner[i, 0] * (photograph.shape[0] - h + 1))
        left = int(corner[i, 1] * (photograph.shape[1] - w + 1))
        return blend(images[i], photograph[top : top + h, left : left + w])

    return plan_digits(labels, order, draw)


def plan_resized(images: np.ndarray, labels: np.ndarray) -> Plan:
    return plan_digits(labels, shuffled(len(images))[0], lambda i: resize(images[i], digits.SIZE))


def plan_faces(celeba: Celeba, counts: dict[str, int]) -> Plan:
    chosen = celeba.split(counts)
    names = [name for split in SPLITS for name in chosen[split]]
    files = [f"{split}/{i:05d}.png" for split in SPLITS for i in range(counts[split])]

    def draw(i: int) -> np.ndarray:
        image = celeba.images.parse(names[i], parse_image)
        if image.shape[:2] != ALIGNED:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"{celeba.images.path}: {names[i]}: {size} pixels; give CelebA's aligned images, 178x218")
        top, left = ((side - CROP) // 2 for side in ALIGNED)
        return resize(image[top : top + CROP, left : left + CROP], faces.SIZE)

    return Plan(files, [split for split in SPLITS for _ in range(counts[split])], None, draw)


def sources_of(name: str, o: argparse.Namespace) -> dict[str, Path]:
    """The local files of a set, by source; downloads those that were not given."""
    needed = {"face": ("celeba",), "mnistm": ("mnist", "bsds"), "svhn": ("svhn",), "usps": ("usps",)}[name]
    found = {n: getattr(o, n) or download(n, o.dest / ".sources" / n, o.bsds_sha256) for n in needed}
    if "bsds" in found and o.bsds_sha256:
        bsds = found["bsds"]
        check_sha256(bsds if o.bsds else bsds / "BSR_bsds500.tgz", o.bsds_sha256)
    return found


def open_sources(name: str, o: argparse.Namespace) -> tuple[str, Callable[[], Plan]]:
    """(a key of the sources, a function that reads them)."""
    paths = sources_of(name, o)
    if name == "face":
        celeba = Celeba(paths["celeba"])
        counts = dict(zip(SPLITS, o.face_counts, strict=True))
        return f"{celeba.images.key()} {celeba.lists.hexdigest()[:16]}", lambda: plan_faces(celeba, counts)
    source = Source(paths["mnist" if name == "mnistm" else name])
    if name == "mnistm":
        tgz = paths["bsds"] / "BSR_bsds500.tgz"
        bsds = Source(tgz if tgz.is_file() else paths["bsds"])
        return f"{source.key()} {bsds.key()}", lambda: plan_mnistm(source, load_photographs(bsds))
    load = {"svhn": load_svhn, "usps": load_usps}[name]
    return source.key(), lambda: plan_resized(*load(source))


def prepare(name: str, o: argparse.Namespace) -> None:
    """Build one set, or recognise that it is there."""
    folder = o.dest / "face" if name == "face" else o.dest / "digits" / name
    recipe = {"set": name, "version": VERSION} | ({"counts": list(o.face_counts)} if name == "face" else {})
    if folder.exists():
        found = read_json(folder / MARK)
        if not found:
            raise UserError(f"{folder}: is there, and not made by this script; move it away, or choose another folder")
        if found.get("recipe") != recipe:
            raise UserError(f"{folder}: was built as {found.get('recipe')}; delete it to build {recipe}")
        print(f"{folder}: is there already\n{found['summary']}")
        return
    key, read = open_sources(name, o)
    partial = folder.with_name(f".{folder.name}.partial")
    progress = partial / "progress.json"
    before = read_json(progress) or {}
    done = before["done"] if before.get("key") == [recipe, key] else 0
    if not done and partial.exists():
        shutil.rmtree(partial)
    plan = read()
    for parent in {(partial / file).parent for file in plan.files}:
        make_folder(parent)

    def write(i: int) -> None:
        Image.fromarray(plan.draw(i)).save(partial / plan.files[i], format="PNG")

    with ThreadPoolExecutor() as pool, tqdm(initial=done, total=len(plan.files), unit="img", desc=name) as bar:
        while done < len(plan.files):
            chunk = range(done, min(done + CHUNK, len(plan.files)))
            list(pool.map(write, chunk))
            done = chunk.stop
            write_json(progress, {"key": [recipe, key], "done": done})
            bar.update(len(chunk))
    summary = finish(partial, plan)
    progress.unlink()
    write_json(partial / MARK, {"recipe": recipe, "sources": key, "summary": summary})
    partial.rename(folder)
    print(f"{folder}\n{summary}")


def finish(folder: Path, plan: Plan) -> str:
    """Write the lists and the contact sheet; returns counts for each split, and class."""
    rows = {split: [i for i, s in enumerate(plan.splits) if s == split] for split in SPLITS}
    lines = []
    for split, chosen in rows.items():
        text = f"  {split:5s} {len(chosen):6d}"
        if plan.labels is not None:
            names = [(Path(plan.files[i]).name, plan.labels[i]) for i in chosen]
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as f:
                csv.writer(f, lineterminator="\n").writerows([("image_name", "label"), *names])
            counts = Counter(label for _, label in names)
            text += ", of digit 0 ... 9: " + " ".join(str(counts[digit]) for digit in range(digits.CLASSES))
        lines.append(text)
    shown = rows["train"][:100]
    if plan.labels is not None:
        shown = [i for d in range(digits.CLASSES) for i in [i for i in rows["train"] if plan.labels[i] == d][:10]]
    images = np.stack([parse_image((folder / plan.files[i]).read_bytes()) for i in shown])
    save_png(sheet(torch.from_numpy(images).permute(0, 3, 1, 2), columns=10), folder / "contact_sheet.png")
    return "\n".join(lines)


def main() -> None:
    o = build_parser().parse_args(sys.argv[1:])
    with alone_in(make_folder(o.dest), f"{o.dest}: is being built by another process; wait for it, or stop it"):
        for name in o.only:
            prepare(name, o)


if __name__ == "__main__":
    run_main(main)
