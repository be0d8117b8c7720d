"""Digits for problems 2 and 3: MNIST-M, SVHN, USPS, 28x28, ``ROOT/data/*.png`` with ``ROOT/{train,val}.csv``
(``image_name,label``), or the packed mosaics of the same splits beside the same CSV files.

Channels are in RGB order. USPS is gray: its one channel is repeated in red, green and blue.
"""

from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from datasets.images import hold_out, load_split, read_index

SIZE = 28
CLASSES = 10
HELD_OUT = 2000  # training images (at most) kept for choosing a checkpoint or a sampler
Folds = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # (images, labels) to train on, and held out


def load_digits(root: Path, split: str) -> Tensor:
    """uint8 (N, 3, 28, 28) in the order of the CSV; the label column is not read, and need not be there.

    Raises UserError for missing or unreadable files.
    """
    return load_split(root, split, SIZE, listed=True)


def load_labels(root: Path, split: str) -> Tensor:
    """int64 (N,) in 0 ... 9, in the order of the CSV. Raises UserError for a missing column or a wrong label."""
    return torch.tensor([label for _, label in read_labels(Path(root) / f"{split}.csv")])


def load_folds(root: Path, at_most: int = HELD_OUT) -> Folds:
    """((images, labels) to train on, (images, labels) held out) of the split train; see ``hold_out``."""
    (images, held_images), (labels, held_labels) = (
        hold_out(x, at_most, root) for x in (load_digits(root, "train"), load_labels(root, "train"))
    )
    return (images, labels), (held_images, held_labels)


def read_labels(path: Path) -> list[tuple[str, int]]:
    """(image name, label) of every row. Raises UserError for a missing column or a wrong label."""
    labels: dict[str, int] = {}
    rows = []
    for line, row in enumerate(read_index(path, "label"), 2):
        text = (row["label"] or "").strip()
        if text not in set("0123456789"):
            raise UserError(f"{path}, line {line}: label {text!r} of {row['image_name']} is not a digit 0-9; mend it")
        name, label = row["image_name"], int(text)
        if labels.setdefault(name, label) != label:
            raise UserError(f"{path}, line {line}: {name} is {labels[name]} further up and {label} here; mend it")
        rows.append((name, label))
    return rows
