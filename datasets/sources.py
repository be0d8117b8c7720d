"""The public data sets as their authors publish them: downloads, archives and file formats. Used by datasets.prepare.

| set | files | by |
|---|---|---|
| MNIST | {train,t10k}-{images-idx3,labels-idx1}-ubyte, also .gz | LeCun, Cortes, Burges 1998 |
| BSDS500 | BSR_bsds500.tgz | Arbelaez, Maire, Fowlkes, Malik, PAMI 2011 |
| SVHN | {train,test}_32x32.mat | Netzer et al., NIPS workshop 2011 |
| USPS | usps.bz2, usps.t.bz2 (LIBSVM's copy) | Hull, PAMI 1994 |
| CelebA | img_align_celeba(.zip), list_eval_partition.txt, identity_CelebA.txt | Liu et al., ICCV 2015 |
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError, first_line
from common.files import make_folder
from datasets.images import UNREADABLE

FIRST_OF_VAL, FIRST_OF_TEST = 162_771, 182_638  # file numbers at which CelebA's official partition changes
BSDS_URL = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
DAMAGED = (*UNREADABLE, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, KeyError)
DAMAGED += (RuntimeError,)


class Source:
    """The files of a folder (and its subfolders), a zip or a tar archive, by their names without folders.

    Raises UserError when ``path`` is missing or damaged, or when two different files of the same name are asked for.
    """

    def __init__(self, path: Path):
        self.path, self.twice = path, set()
        if path.is_dir():
            walked = sorted(Path(place, name) for place, _, names in os.walk(path, followlinks=True) for name in names)
            whole = [p for p in walked if p.is_file() and not p.name.startswith(".")]
            self.files = self.by_name((p.name, p) for p in whole)
            self.sizes = {name: p.stat().st_size for name, p in self.files.items()}
            self.read_file: Callable = Path.read_bytes
        elif zipfile.is_zipfile(path):
            try:
                archive = zipfile.ZipFile(path)
            except DAMAGED as error:
                raise self.damaged(path.name, error) from None
            self.files = self.by_name((Path(m.filename).name, m) for m in archive.infolist() if not m.is_dir())
            self.sizes = {name: m.file_size for name, m in self.files.items()}
            self.read_file = archive.read
        elif path.is_file():
            try:  # a compressed tar archive cannot be read out of order: keep it all
                with tarfile.open(path) as archive:
                    content = ((Path(m.name).name, archive.extractfile(m).read()) for m in archive if m.isfile())
                    self.files = self.by_name(content)
            except DAMAGED as error:
                raise UserError(
                    f"{path}: not a whole zip or tar archive ({first_line(error)}); delete it and download it again, "
                    "or give the folder of the files"
                ) from None
            self.sizes = {name: len(content) for name, content in self.files.items()}
            self.read_file = bytes
        else:
            raise UserError(f"{path}: no such file or folder; give a local copy of the data set, or leave it out")

    def by_name(self, files: Iterable[tuple[str, object]]) -> dict:
        """The last file of each name; names that come twice are noted in ``twice``."""
        found: dict = {}
        for name, file in files:
            if name in found:
                self.twice.add(name)
            found[name] = file
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self, *suffixes: str) -> list[str]:
        """Names that end in one of ``suffixes``, sorted."""
        return sorted(n for n in self.files if n.lower().endswith(suffixes) and not n.startswith("."))

    def find(self, *names: str) -> str:
        """The first of ``names`` that is there. Raises UserError when none is."""
        for name in names:
            if name in self.files:
                return name
        raise UserError(f"{self.path}: lacks {' or '.join(names)}; give the folder or archive that holds it")

    def read(self, name: str) -> bytes:
        if name in self.twice:
            raise UserError(f"{self.path}: holds {name} more than once; give the one folder or archive that is meant")
        try:
            return self.read_file(self.files[name])
        except DAMAGED as error:
            raise self.damaged(name, error) from None

    def parse(self, name: str, parser: Callable):
        """``parser(content)`` of a file. Raises UserError when that fails, or the file is damaged."""
        try:
            return parser(self.read(name))
        except DAMAGED as error:
            raise self.damaged(name, error) from None

    def damaged(self, name: str, error: Exception) -> UserError:
        place = self.path if self.path.name == name else f"{self.path}: {name}"
        return UserError(f"{place}: cannot be read ({first_line(error)}); download it again")

    def key(self) -> str:
        """Tells one version of the files from another, by their names and sizes."""
        return hashlib.sha256(repr(sorted(self.sizes.items())).encode()).hexdigest()[:16]


def download(name: str, folder: Path, bsds_sha256: str = "") -> Path:
    """Fetch a data set into ``folder``, with progress; files that are there and whole are not fetched again.

    torchvision compares MD5 sums where it knows them. Raises UserError without a network.
    """
    import torch.hub
    from torchvision import datasets

    make_folder(folder)
    try:
        if name == "mnist":
            datasets.MNIST(folder, download=True)
        elif name == "svhn":
            for split in ("train", "test"):
                datasets.SVHN(folder, split, download=True)
        elif name == "usps":
            for train in (True, False):
                datasets.USPS(folder, train, download=True)
        elif name == "celeba":
            datasets.CelebA(folder, download=True)
        elif not (folder / "BSR_bsds500.tgz").is_file():
            torch.hub.download_url_to_file(BSDS_URL, str(folder / "BSR_bsds500.tgz"), bsds_sha256.lower() or None)
    except Exception as error:  # gdown, which torchvision uses for CelebA, has exceptions of its own
        raise UserError(
            f"{name}: could not be downloaded ({first_line(error)}); give a local copy with --{name} PATH"
        ) from None
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Raises UserError when the file's SHA-256 is another."""
    if not path.is_file():
        raise UserError(f"{path}: --bsds-sha256 needs the archive, not a folder")
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected.lower():
        raise UserError(f"{path}: SHA-256 is {digest.hexdigest()}, not {expected}; download it again")


def parse_idx(data: bytes) -> np.ndarray:
    """The idx format of MNIST's files (unsigned bytes), compressed or not."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def load_mnist(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Training and test digits in official order: uint8 (N, 28, 28), labels (N,)."""

    def read(part: str, kind: str) -> np.ndarray:
        name = f"{part}-{kind}-ubyte"
        return source.parse(source.find(name, f"{name}.gz", name.replace("-idx", ".idx")), parse_idx)

    images = [read(part, "images-idx3") for part in ("train", "t10k")]
    labels = [read(part, "labels-idx1") for part in ("train", "t10k")]
    if any(len(x) != len(y) or x.shape[1:] != (28, 28) for x, y in zip(images, labels, strict=True)):
        raise UserError(f"{source.path}: images and labels do not fit together; download MNIST again")
    return np.concatenate(images), np.concatenate(labels)


def load_photographs(source: Source) -> list[np.ndarray]:
    """The photographs of BSDS500 in the order of their names: uint8 (H, W, 3) each."""
    names = [name for name in source.names(".jpg") if Path(name).stem.isdigit()]  # not 101087_small.jpg
    if not names:
        raise UserError(f"{source.path}: holds no .jpg; give BSR_bsds500.tgz or its folder images")
    if len(names) != 500:
        print(f"note: BSDS500 has 500 photographs, {source.path} has {len(names)}", file=sys.stderr)
    return [source.parse(name, parse_photograph) for name in names]


def parse_photograph(data: bytes) -> np.ndarray:
    image = parse_image(data)
    if min(image.shape[:2]) < 28:
        raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels, a digit has 28x28")
    return image


def parse_image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def load_svhn(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Cropped training and test digits in official order: uint8 (N, 32, 32, 3), labels (N,); '10' is the digit 0."""
    from scipy.io import loadmat

    def parse(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        try:
            content = loadmat(io.BytesIO(data))
        except Exception as error:  # whatever a cut file leads SciPy to
            raise ValueError(first_line(error)) from None
        return content["X"].transpose(3, 0, 1, 2), content["y"].flatten() % 10

    parts = [source.parse(source.find(f"{part}_32x32.mat"), parse) for part in ("train", "test")]
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return images, labels


def load_usps(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Training and test digits in official order: uint8 (N, 16, 16), labels (N,), published as 1 ... 10."""
    from sklearn.datasets import load_svmlight_file

    def parse(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        x, y = load_svmlight_file(io.BytesIO(bz2.decompress(data)), n_features=256, zero_based=False)
        return ((x.toarray().reshape(-1, 16, 16) + 1) / 2 * 255).astype(np.uint8), y.astype(int) - 1

    parts = [source.parse(source.find(name), parse) for name in ("usps.bz2", "usps.t.bz2")]
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return images, labels


class Celeba:
    """CelebA's aligned faces: a folder or zip of NNNNNN.jpg, with its lists beside or within it where there are any."""

    def __init__(self, path: Path):
        lists = Source(path)
        self.images = lists
        if "img_align_celeba.zip" in lists and path.is_dir():
            self.images = Source(lists.files["img_align_celeba.zip"])
        self.names = self.images.names(".jpg")
        if not self.names:
            raise UserError(f"{path}: holds no .jpg; give img_align_celeba.zip or the folder that holds it")

        def read_list(name: str) -> dict[str, int] | None:
            beside = path.absolute().parent / name
            if name not in lists and not beside.is_file():
                return None
            text = lists.read(name) if name in lists else beside.read_bytes()
            self.lists.update(name.encode() + text)
            try:
                return {image: int(value) for image, value in map(str.split, text.decode("ascii").splitlines())}
            except ValueError:
                raise UserError(f"{path}: {name}: each line must be an image and a number; download it again") from None

        self.lists = hashlib.sha256()  # tells their versions apart
        self.partition = read_list("list_eval_partition.txt")
        self.identity = read_list("identity_CelebA.txt")

    def split(self, counts: dict[str, int]) -> dict[str, list[str]]:
        """Names for each of train, val, test, so that nobody is in two of them; the first ``counts`` in file order.

        By the official partition, which is one by identity. Without its list by the list of identities: whole
        persons go to test, then to val, the others to train. Without either by the file numbers at which the
        official partition changes. Raises UserError where there are not enough.
        """
        pools: dict[str, list[str]] = {split: [] for split in counts}
        if self.partition is not None:
            of_image = {name: {0: "train", 1: "val", 2: "test"}.get(n) for name, n in self.partition.items()}
        elif self.identity is not None:
            of_image = self.split_by_person(counts)
        else:
            numbers = {name: int(Path(name).stem) for name in self.names if Path(name).stem.isdigit()}
            of_image = {
                name: "train" if n < FIRST_OF_VAL else "val" if n < FIRST_OF_TEST else "test"
                for name, n in numbers.items()
            }
        for name in self.names:
            if split := of_image.get(name):
                pools[split].append(name)
        self.check_gaps(of_image, pools, counts)
        for split, count in counts.items():
            if len(pools[split]) < count:
                raise UserError(
                    f"{self.images.path}: has {len(pools[split])} faces for {split}, {count} are needed; "
                    f"give all of CelebA, its identity_CelebA.txt, or smaller --face-counts"
                )
        return {split: pools[split][:count] for split, count in counts.items()}

    def check_gaps(self, of_image: dict, pools: dict[str, list[str]], counts: dict[str, int]) -> None:
        """Raises UserError when the official partition has images before the last chosen one that are not there: later
        ones would take their places."""
        there = set(self.names)
        for split, count in counts.items() if self.partition is not None else ():
            last = pools[split][:count][-1:]
            absent = [n for n, s in of_image.items() if s == split and last and n < last[0] and n not in there]
            if absent:
                raise UserError(
                    f"{self.images.path}: lacks {len(absent)} images, such as {absent[0]}; give all of CelebA"
                )

    def split_by_person(self, counts: dict[str, int]) -> dict[str, str]:
        assert self.identity is not None
        named = [name for name in self.names if name in self.identity]
        room, place = {"test": counts["test"], "val": counts["val"]}, {}
        for person, size in Counter(self.identity[name] for name in named).items():
            place[person] = next((split for split in room if room[split] > 0), "train")
            if place[person] in room:
                room[place[person]] -= size
        return {name: place[self.identity[name]] for name in named}
