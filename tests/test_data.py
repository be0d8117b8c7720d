"""Images on disk -> one uint8 tensor: order, modes, sizes, mosaics, caches, bad files."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets.augment import diff_augment, normalise, random_flip
from datasets.digits import load_digits, load_labels
from datasets.faces import HELD_OUT, load_faces, load_reference
from datasets.images import cache_file, cached, find_mosaics, hold_out, load_split
from tests.helpers import smooth_images, write_index, write_pngs


def chw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def write_mosaics(root, images: np.ndarray, per_mosaic: int) -> None:
    """Pack images as the real data is packed: 50 columns, row by row, lossless here."""
    size = images.shape[1]
    for number, start in enumerate(range(0, len(images), per_mosaic)):
        part = images[start : start + per_mosaic]
        grid = np.zeros((-(-len(part) // 50) * size, 50 * size, 3), np.uint8)
        for i, image in enumerate(part):
            top, left = i // 50 * size, i % 50 * size
            grid[top : top + size, left : left + size] = image
        Image.fromarray(grid).save(root / f"train_{number:02d}.png")
    with (root / "train.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["image_name"], *([f"{i:05d}.png"] for i in range(len(images)))])


def test_folder_in_name_order(tmp_path):
    images = smooth_images(12, 64)
    write_pngs(tmp_path / "train", images)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    assert torch.equal(load_faces(tmp_path, "train"), chw(images))


def test_modes_and_sizes_are_converted(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    Image.new("L", (64, 64), 7).save(folder / "a.png")
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(folder / "b.png")
    Image.new("RGB", (100, 80), (9, 8, 7)).save(folder / "c.png")
    pixels = load_faces(tmp_path, "train")[:, :, 30, 30].tolist()
    assert pixels == [[7, 7, 7], [1, 2, 3], [9, 8, 7]]


def test_mosaics_equal_the_folder(tmp_path):
    images = smooth_images(130, 64)
    write_mosaics(tmp_path, images, per_mosaic=100)
    assert torch.equal(load_faces(tmp_path, "train"), chw(images))


def test_a_missing_mosaic_is_named(tmp_path):
    write_mosaics(tmp_path, smooth_images(130, 64), per_mosaic=100)
    (tmp_path / "train_01.png").unlink()
    with pytest.raises(UserError, match=r"train.csv: lists 130 images, the mosaics hold 100"):
        load_faces(tmp_path, "train")


@pytest.mark.parametrize("size", [(50 * 64 + 20, 64), (49 * 64, 64), (50 * 64, 70)])
def test_an_image_that_is_no_mosaic_is_named(tmp_path, size):
    write_mosaics(tmp_path, smooth_images(50, 64), per_mosaic=50)
    Image.new("RGB", size).save(tmp_path / "train_00.png")
    with pytest.raises(UserError, match=rf"train_00.png: {size[0]}x{size[1]} is not a mosaic of 64x64 tiles"):
        load_faces(tmp_path, "train")


def test_a_copy_of_a_mosaic(tmp_path):
    """It would shift all labels after it."""
    write_mosaics(tmp_path, smooth_images(130, 64), per_mosaic=100)
    images = load_faces(tmp_path, "train")
    shutil.copy(tmp_path / "train_00.png", tmp_path / "train_00 (copy).png")
    assert torch.equal(load_faces(tmp_path, "train"), images)
    shutil.copy(tmp_path / "train_00.png", tmp_path / "train_00.jpg")
    with pytest.raises(UserError, match=r"a mosaic of train twice"):
        load_faces(tmp_path, "train")


def test_cache_is_used_and_never_trusted(tmp_path, monkeypatch):
    paths = write_pngs(tmp_path / "train", smooth_images(6, 64))
    first = load_faces(tmp_path, "train")
    cache = tmp_path / ".cache_train_64x64x3.safetensors"
    assert cache.is_file()

    with monkeypatch.context() as m:
        m.setattr("datasets.images.decode_files", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load_faces(tmp_path, "train"), first)

    stat = paths[2].stat()  # stale: a file was rewritten
    Image.new("RGB", (64, 64)).save(paths[2])
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert load_faces(tmp_path, "train")[2].sum() == 0

    paths[3].unlink()  # stale: a file is gone
    assert len(load_faces(tmp_path, "train")) == 5

    good = load_faces(tmp_path, "train")
    data = bytearray(cache.read_bytes())  # broken: one flipped bit, then half a file
    data[-1000] ^= 1
    cache.write_bytes(data)
    assert torch.equal(load_faces(tmp_path, "train"), good)
    cache.write_bytes(data[: len(data) // 2])
    assert torch.equal(load_faces(tmp_path, "train"), good)
    assert not list(tmp_path.glob(".*.partial"))


def test_read_only_data_is_cached_at_home(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.images.is_writable", lambda folder: False)
    path = cache_file(tmp_path / "data", "x")
    assert path.is_relative_to(tmp_path / "xdg" / "hw2")
    assert path != cache_file(tmp_path / "other", "x")


def test_an_unwritable_cache_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    data = torch.arange(6, dtype=torch.uint8)
    assert torch.equal(cached(tmp_path / "file" / "cache", "key", lambda: data), data)


def test_all_bad_files_stand_in_one_error(tmp_path):
    paths = write_pngs(tmp_path / "train", smooth_images(5, 64))
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[3].write_text("a text file renamed .png")
    with pytest.raises(UserError) as error:
        load_faces(tmp_path, "train")
    assert "2 of 5" in str(error.value)
    assert str(paths[1]) in str(error.value)
    assert str(paths[3]) in str(error.value)
    assert not list(tmp_path.glob(".cache*"))


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path / "nowhere", "train", 64)
    with pytest.raises(UserError, match="neither a folder train/ nor packed mosaics"):
        load_split(tmp_path, "train", 64)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_split(tmp_path, "train", 64)


def test_reference_is_a_folder_or_the_validation_split(faces):
    assert torch.equal(load_reference(faces), load_reference(faces / "val"))
    assert len(load_reference(faces)) == 12


def test_values_of_unknown_range_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    ramp = np.arange(64 * 64).reshape(64, 64)
    for name, array in (("float.tif", (ramp / 4096).astype(np.float32)), ("wide.tif", (ramp % 256).astype(np.int32))):
        Image.fromarray(array).save(tmp_path / "train" / name)
    with pytest.raises(UserError, match=r"2 of 2 images cannot be read: .*float.tif, .*wide.tif"):
        load_faces(tmp_path, "train")


def test_mosaics_come_in_the_order_of_their_numbers(tmp_path):
    for number in (9, 10, 100):
        (tmp_path / f"train_{number}.png").touch()
    assert [path.stem for path in find_mosaics(tmp_path, "train")] == ["train_9", "train_10", "train_100"]


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    (tmp_path / "val").mkdir()
    Image.fromarray(values).save(tmp_path / "val" / "a.png")
    assert torch.equal(load_faces(tmp_path, "val")[0, 0], torch.from_numpy((values >> 8).astype(np.uint8)))


def test_held_out_is_the_end_of_train():
    images = torch.arange(50)
    kept, held_out = hold_out(images, HELD_OUT, Path())
    assert kept.tolist() + held_out.tolist() == list(range(50))
    assert len(held_out) == 5
    assert len(hold_out(torch.arange(38_464), HELD_OUT, Path())[1]) == 2025


# Digits


def test_digits_follow_their_list(digits):
    images, labels = load_digits(digits, "val"), load_labels(digits, "val")
    assert torch.equal(images, chw(smooth_images(80, 28, seed=3))[60:])
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_gray_digits_become_rgb_by_repetition(tmp_path):
    gray = smooth_images(3, 28, channels=1)
    paths = write_pngs(tmp_path / "data", gray)
    write_index(tmp_path / "train.csv", [(p.name, 1) for p in reversed(paths)])
    images = load_digits(tmp_path, "train")
    assert torch.equal(images, chw(gray).flip(0).expand(3, 3, 28, 28))


def test_images_are_read_without_labels(tmp_path):
    write_pngs(tmp_path / "data", smooth_images(2, 28))
    (tmp_path / "train.csv").write_text("image_name\n00000.png\n00001.png\n")
    assert len(load_digits(tmp_path, "train")) == 2
    with pytest.raises(UserError, match=r"train.csv: needs a header line with label"):
        load_labels(tmp_path, "train")


def test_digit_mosaics_equal_the_folder(tmp_path):
    images = smooth_images(60, 28)
    write_mosaics(tmp_path, images, per_mosaic=50)
    assert torch.equal(load_digits(tmp_path, "train"), chw(images))


@pytest.mark.parametrize("label", ["10", "-1", "", "7.0", "seven"])
def test_wrong_labels_are_named(tmp_path, label):
    write_index(tmp_path / "train.csv", [("a.png", 3), ("b.png", label)])
    with pytest.raises(UserError, match=rf"train.csv, line 3: label '{label}' of b.png"):
        load_labels(tmp_path, "train")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write_pngs(tmp_path / "train", smooth_images(2, 64))
    (tmp_path / "train" / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        load_faces(tmp_path, "train")


def test_wrong_lists_are_named(tmp_path):
    write_pngs(tmp_path / "data", smooth_images(2, 28))
    index = tmp_path / "train.csv"
    with pytest.raises(UserError, match=r"train.csv: no such file"):
        load_digits(tmp_path, "train")
    write_index(index, [("00000.png", 0), ("gone.png", 1), ("00001.png", 2)])
    with pytest.raises(UserError, match=r"train.csv: lists 1 images that are not there: .*gone\.png"):
        load_digits(tmp_path, "train")
    for text in ("", "image_name,label\n", "name,label\n00000.png,1\n", "label,image_name\n1,00000.png\n2\n"):
        index.write_text(text)
        with pytest.raises(UserError, match=r"train.csv: needs a header line with image_name"):
            load_digits(tmp_path, "train")
    index.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(UserError, match=r"train.csv: not a CSV file"):
        load_digits(tmp_path, "train")


# Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_flips_mirror_some_and_leave_the_rest():
    x = torch.randn(64, 3, 8, 8)
    y = random_flip(x, generator())
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(x, y, strict=True)]
    same = [torch.equal(b, a) for a, b in zip(x, y, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_translation_shifts_by_an_eighth_at_most():
    x = torch.zeros(200, 1, 64, 64)
    x[:, :, 32, 32] = 1
    y = diff_augment(x, "translation", generator())
    assert y.sum() == 200
    rows, columns = y.nonzero()[:, 2] - 32, y.nonzero()[:, 3] - 32
    for shift in (rows, columns):
        assert shift.min() == -8
        assert shift.max() == 8


def test_cutout_zeroes_a_square_of_half_the_side():
    y = diff_augment(torch.ones(100, 3, 64, 64), "cutout", generator())
    holes = (y == 0).sum((1, 2, 3)) / 3
    assert holes.max() == 32 * 32
    assert holes.min() >= 16 * 16


def test_colour_is_per_image_and_keeps_the_order_of_pixels():
    x = torch.rand(100, 3, 8, 8) - 0.5
    x[:, 1:] = x[:, :1]  # gray: saturation does nothing, the rest is affine
    y = diff_augment(x, "color", generator())
    slopes = (y.amax((1, 2, 3)) - y.amin((1, 2, 3))) / (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))
    shifts = (y - x).mean((1, 2, 3))
    for values, low, high in ((slopes, 0.5, 1.5), (shifts, -0.5, 0.5)):  # contrast and brightness
        assert low - 1e-4 <= values.min() < low + 0.1
        assert high - 0.1 < values.max() <= high + 1e-4
    mean_x, mean_y = x.mean((1, 2, 3), keepdim=True), y.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(y, mean_y + slopes.view(-1, 1, 1, 1) * (x - mean_x), atol=1e-5)


def test_colour_changes_saturation():
    x = torch.rand(100, 3, 8, 8) - 0.5
    y = diff_augment(x, "color", generator())
    share = (y - y.mean(1, keepdim=True)).std((1, 2, 3)) / (x - x.mean(1, keepdim=True)).std((1, 2, 3))
    contrast = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
    saturation = share / contrast
    assert 0 <= saturation.min() < 0.2
    assert 1.8 < saturation.max() < 2 + 1e-4


def test_augmentation_is_differentiable_and_reproducible():
    x = torch.randn(4, 3, 64, 64, requires_grad=True)
    y = diff_augment(x, "color,translation,cutout", generator(3))
    assert torch.equal(y, diff_augment(x, "color,translation,cutout", generator(3)))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(diff_augment(x, "", generator()), x)
