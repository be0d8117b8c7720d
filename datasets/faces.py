"""Faces for problem 1: 64x64 RGB, ``ROOT/{train,val}/*.png`` or the packed mosaics of the same splits."""

from pathlib import Path

from torch import Tensor

from datasets.images import decode_files, find_mosaics, list_images, load_split

SIZE = 64
HELD_OUT = 2025  # as many training images as the validation set has


def load_faces(root: Path, split: str) -> Tensor:
    """uint8 (N, 3, 64, 64), in the order of the file names. Raises UserError for missing or unreadable files."""
    return load_split(root, split, SIZE)


def load_reference(folder: Path) -> Tensor:
    """Real faces to score against, uint8 (N, 3, 64, 64): the images of ``folder``, or the split val of a data root.

    Raises UserError for a missing or empty folder or unreadable files.
    """
    folder = Path(folder)
    if (folder / "val").is_dir() or find_mosaics(folder, "val"):
        return load_faces(folder, "val")
    return decode_files(list_images(folder), SIZE, what=str(folder))
