"""Building the course's folder from tiny files in the formats in which the data sets are published."""

import bz2
import errno
import gzip
import hashlib
import io
import json
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import dump_svmlight_file

from common.errors import UserError
from common.files import alone_in
from datasets import prepare, sources
from datasets.digits import load_digits, load_labels
from datasets.faces import load_faces
from tests.helpers import assert_user_error, run, smooth_images

COUNTS = ("--face-counts", 4, 2, 1)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def encoded(image: np.ndarray, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """mnist/ (gzipped idx), BSR_bsds500.tgz, svhn/ (.mat), usps/ (.bz2), celeba/ (zip and lists)."""
    root = tmp_path_factory.mktemp("published")
    random = np.random.default_rng(0)
    (root / "mnist").mkdir()
    for part, n in (("train", 40), ("t10k", 10)):
        digits = random.integers(0, 256, (n, 28, 28))
        for kind, array in (("images-idx3", digits), ("labels-idx1", np.arange(n) % 10)):
            (root / "mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))

    with tarfile.open(root / "BSR_bsds500.tgz", "w:gz") as archive:
        for i, photograph in enumerate(smooth_images(3, 60, seed=1)):
            info = tarfile.TarInfo(f"BSR/BSDS500/data/images/train/{i}.jpg")
            content = encoded(photograph[:40])
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

    (root / "svhn").mkdir()
    for part, n in (("train", 30), ("test", 20)):
        images = smooth_images(n, 32, seed=n)
        labels = (np.arange(n) % 10 + 1)[:, None]  # 10 is the digit 0
        savemat(root / "svhn" / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels})

    (root / "usps").mkdir()
    for name, n in (("usps.bz2", 30), ("usps.t.bz2", 20)):
        buffer = io.BytesIO()
        pixels = smooth_images(n, 16, 1, seed=n).reshape(n, 256) / 127.5 - 1
        dump_svmlight_file(pixels, np.arange(n) % 10 + 1, buffer, zero_based=False)
        (root / "usps" / name).write_bytes(bz2.compress(buffer.getvalue()))

    (root / "celeba").mkdir()
    faces = random.integers(0, 256, (12, 218, 178, 3), dtype=np.uint8)
    with zipfile.ZipFile(root / "celeba" / "img_align_celeba.zip", "w") as archive:
        for i, face in enumerate(faces, 1):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(face))
    partition = "".join(f"{i:06d}.jpg {0 if i <= 6 else 1 if i <= 9 else 2}\n" for i in range(1, 13))
    (root / "celeba" / "list_eval_partition.txt").write_text(partition)
    return root


def local(published) -> tuple:
    names = {"mnist": "mnist", "bsds": "BSR_bsds500.tgz", "svhn": "svhn", "usps": "usps", "celeba": "celeba"}
    return (*(x for option, name in names.items() for x in (f"--{option}", published / name)), *COUNTS)


def build(published, dest, *options: object):
    return run(prepare.main, dest, *local(published), *options)


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_zip_with_a_damaged_directory(published, tmp_path):
    path = tmp_path / "damaged.zip"
    whole = (published / "celeba" / "img_align_celeba.zip").read_bytes()
    path.write_bytes(whole.replace(b"PK\1\2", b"PK\0\0", 1))  # where the first file is described
    assert_user_error(
        run(prepare.main, tmp_path / "dest", "--only", "face", "--celeba", path), path, "download it again"
    )


def test_everything_in_the_layout_of_the_course(published, tmp_path, capsys):
    assert build(published, tmp_path).code == 0
    for name in ("mnistm", "svhn", "usps"):
        folder = tmp_path / "digits" / name
        sizes = {split: len(load_digits(folder, split)) for split in ("train", "val", "test")}
        assert sizes == {"train": 32, "val": 8, "test": 10}
        labels = np.concatenate([load_labels(folder, split) for split in sizes])
        assert np.bincount(labels).tolist() == [5] * 10
        with Image.open(folder / "data" / "00000.png") as image:
            assert (image.size, image.mode) == ((28, 28), "L" if name == "usps" else "RGB")
        assert (folder / "train.csv").read_text().splitlines()[0] == "image_name,label"
        assert (folder / "contact_sheet.png").is_file()
    assert [len(load_faces(tmp_path / "face", split)) for split in ("train", "val", "test")] == [4, 2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "face"]
    assert not list(tmp_path.rglob(".*.partial"))
    out = capsys.readouterr().out
    assert "train     32, of digit 0 ... 9: " in out
    assert "val        2" in out


def test_counts_are_those_of_the_course():
    assert prepare.split_sizes(70_000) == {"train": 44_800, "val": 11_200, "test": 14_000}
    assert prepare.split_sizes(73_257 + 26_032) == {"train": 63_544, "val": 15_887, "test": 19_858}
    assert prepare.split_sizes(7_291 + 2_007) == {"train": 5_950, "val": 1_488, "test": 1_860}


def test_mnistm_is_the_difference_of_digit_and_photograph():
    digit = np.array([[0, 255], [200, 10]], np.uint8)
    patch = np.array([[[9, 8, 7], [9, 8, 7]], [[250, 200, 0], [10, 0, 255]]], np.uint8)
    expected = [[[9, 8, 7], [246, 247, 248]], [[50, 0, 200], [0, 10, 245]]]
    assert prepare.blend(digit, patch).tolist() == expected


def test_digits_of_mnistm_are_those_of_mnist(published):
    """Image and label stay together through the shuffle; before black photographs digits are as they were."""
    source = sources.Source(published / "mnist")
    images, labels = sources.load_mnist(source)
    plan = prepare.plan_mnistm(source, [np.zeros((40, 60, 3), np.uint8)] * 3)
    order = np.random.RandomState(prepare.SEED).permutation(50)
    assert plan.labels == labels[order].tolist()
    for i in (0, 7, 49):
        assert np.array_equal(plan.draw(i), np.repeat(images[order[i]][..., None], 3, axis=2))


def test_patches_of_mnistm_come_from_everywhere(published, monkeypatch):
    """Seen through black digits: photographs whose pixels tell their row, their column and their photograph."""
    monkeypatch.setattr(prepare, "load_mnist", lambda _: (np.zeros((500, 28, 28), np.uint8), np.arange(500) % 10))
    rows, columns = np.mgrid[:40, :60]
    photographs = [np.stack([rows, columns, np.full_like(rows, number)], 2).astype(np.uint8) for number in range(3)]
    plan = prepare.plan_mnistm(sources.Source(published / "mnist"), photographs)
    patches = np.stack([plan.draw(i) for i in range(500)])
    top, left, number = patches[:, 0, 0].T
    assert (patches[:, -1, -1] == np.stack([top + 27, left + 27, number], 1)).all()
    assert set(top) == set(range(13))
    assert set(left) == set(range(33))
    assert np.bincount(number).min() > 100


def test_pixels_are_those_of_the_sources(published, tmp_path):
    """Labels stay with their images through the shuffle."""
    assert build(published, tmp_path, "--only", "usps", "svhn", "face").code == 0
    images, labels = sources.load_svhn(sources.Source(published / "svhn"))
    assert labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    order = np.random.RandomState(prepare.SEED).permutation(50)
    ours = load_digits(tmp_path / "digits" / "svhn", "train").permute(0, 2, 3, 1).numpy()
    shrunk = np.asarray(Image.fromarray(images[order[7]]).resize((28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(ours[7], shrunk)
    assert load_labels(tmp_path / "digits" / "svhn", "train")[7] == labels[order[7]]

    usps, labels = sources.load_usps(sources.Source(published / "usps"))
    assert np.abs(usps[:30].astype(int) - smooth_images(30, 16, 1, seed=30)[..., 0]).max() <= 1
    assert labels[:3].tolist() == [0, 1, 2]

    with zipfile.ZipFile(published / "celeba" / "img_align_celeba.zip") as archive:
        face = Image.open(io.BytesIO(archive.read("img_align_celeba/000007.jpg")))
    expected = face.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(load_faces(tmp_path / "face", "val")[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_same_bytes_twice_from_folders_and_archives(published, tmp_path):
    assert build(published, tmp_path / "a").code == 0
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(published / "celeba" / "img_align_celeba.zip") as archive:
        archive.extractall(unpacked / "celeba")
    shutil.copy(published / "celeba" / "list_eval_partition.txt", unpacked / "celeba")
    with tarfile.open(published / "BSR_bsds500.tgz") as archive:
        archive.extractall(unpacked / "bsds", filter="data")
    shutil.make_archive(str(unpacked / "mnist"), "zip", published / "mnist")
    options = ("--celeba", unpacked / "celeba", "--bsds", unpacked / "bsds", "--mnist", unpacked / "mnist.zip")
    assert build(published, tmp_path / "b", *options).code == 0
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name] and not name.endswith("prepared.json")] == []


def test_an_interrupted_build_goes_on(published, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 5)
    save, drawn = Image.Image.save, []

    def killed(self, path, *args, **kwargs):
        drawn.append(str(path))
        if len(drawn) == 23:
            raise KeyboardInterrupt
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", killed)
    assert build(published, tmp_path / "a", "--only", "mnistm").code == 130
    folder = tmp_path / "a" / "digits" / "mnistm"
    assert not folder.exists()
    before = len(drawn)
    assert build(published, tmp_path / "a", "--only", "mnistm").code == 0
    again = [name for name in drawn[before:] if "data" in name]
    assert 30 <= len(again) <= 35  # all but the finished chunks
    monkeypatch.setattr(Image.Image, "save", save)
    assert build(published, tmp_path / "b", "--only", "mnistm").code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_source_starts_again(published, tmp_path):
    partial = tmp_path / "digits" / ".usps.partial"
    (partial / "data").mkdir(parents=True)
    (partial / "data" / "foreign.png").write_text("")
    (partial / "progress.json").write_text(json.dumps({"key": ["other"], "done": 49}))
    assert build(published, tmp_path, "--only", "usps").code == 0
    assert len(list((tmp_path / "digits" / "usps" / "data").iterdir())) == 50


def test_a_finished_set_is_left_alone(published, tmp_path, capsys):
    assert build(published, tmp_path, "--only", "usps", "face").code == 0
    before = files(tmp_path)
    options = ("--only", "usps", "--usps", tmp_path / "no longer there")
    assert build(published, tmp_path, *options).code == 0
    assert "is there already" in capsys.readouterr().out
    assert files(tmp_path) == before
    outcome = build(published, tmp_path, "--only", "face", "--face-counts", 3, 2, 1)
    assert_user_error(outcome, tmp_path / "face", "delete it")
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits" / "usps").mkdir(parents=True)
    assert_user_error(build(published, tmp_path, "--only", "usps"), tmp_path / "digits" / "usps", "not made by this")


def test_faces_by_person(published, tmp_path):
    """Without the partition whole persons are held out; without any list the official file numbers decide."""
    celeba = tmp_path / "celeba"
    celeba.mkdir()
    for i in range(1, 13):
        Image.new("RGB", (178, 218)).save(celeba / f"{i:06d}.jpg")
    outcome = build(published, tmp_path / "x", "--only", "face", "--celeba", celeba)
    assert_user_error(outcome, celeba, "has 0 faces for val, 2 are needed")
    (celeba / "identity_CelebA.txt").write_text("".join(f"{i:06d}.jpg {i % 5}\n" for i in range(1, 13)))
    chosen = sources.Celeba(celeba).split({"train": 4, "val": 2, "test": 1})
    assert [len(names) for names in chosen.values()] == [4, 2, 1]
    persons = [{int(name[:6]) % 5 for name in names} for names in chosen.values()]
    assert not (persons[0] & persons[1] or persons[0] & persons[2] or persons[1] & persons[2])
    (celeba / "identity_CelebA.txt").rename(tmp_path / "identity_CelebA.txt")
    assert sources.Celeba(celeba).split({"train": 4, "val": 2, "test": 1}) == chosen  # beside the folder
    for number in (170_000, 170_001, 190_000):
        Image.new("RGB", (178, 218)).save(celeba / f"{number}.jpg")
    (tmp_path / "identity_CelebA.txt").unlink()
    chosen = sources.Celeba(celeba).split({"train": 4, "val": 2, "test": 1})
    assert chosen["val"] == ["170000.jpg", "170001.jpg"]
    assert chosen["test"] == ["190000.jpg"]


def damage(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_damaged_and_missing_files(published, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)

    def fails(only, *parts):
        outcome = run(prepare.main, tmp_path / "out", *local(copy), "--only", only)
        assert_user_error(outcome, *parts)
        assert not list((tmp_path / "out").glob("*/*/*.csv"))

    for name, only in (
        ("mnist/t10k-labels-idx1-ubyte.gz", "mnistm"),
        ("svhn/test_32x32.mat", "svhn"),
        ("usps/usps.t.bz2", "usps"),
        ("BSR_bsds500.tgz", "mnistm"),
        ("celeba/img_align_celeba.zip", "face"),
    ):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        fails(only, copy / name.split("/")[0], "download it again")
        (copy / name).unlink()
        fails(only, copy / name.split("/")[0])
        (copy / name).write_bytes(whole)
    (copy / "celeba" / "list_eval_partition.txt").write_text("000001.jpg\n")
    fails("face", copy / "celeba", "list_eval_partition.txt")


def test_every_cut_of_a_mat_file_is_named(published, tmp_path):
    shutil.copytree(published / "svhn", tmp_path / "svhn")
    whole = (tmp_path / "svhn" / "test_32x32.mat").read_bytes()
    for length in (0, 1, 127, 128, 130, 136, 150, 200, len(whole) // 3, len(whole) - 9, len(whole) - 1):
        damage(tmp_path / "svhn" / "test_32x32.mat", whole[:length])
        with pytest.raises(UserError, match=r"svhn: test_32x32\.mat: cannot be read \(.+\); download it again"):
            sources.load_svhn(sources.Source(tmp_path / "svhn"))


def test_an_encrypted_zip(tmp_path):
    path = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in (1, 170_000, 190_000):
            archive.writestr(f"{i:06d}.jpg", encoded(np.zeros((218, 178, 3), np.uint8)))
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # bit 0 of the flags of every file: encrypted
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + flags] |= 1
    path.write_bytes(content)
    options = ("--only", "face", "--celeba", path, "--face-counts", 1, 1, 1)
    assert_user_error(run(prepare.main, tmp_path / "out", *options), path, "000001.jpg", "encrypted")


def test_a_file_in_place_of_its_folder(published, tmp_path):
    outcome = run(prepare.main, tmp_path, "--only", "usps", "--usps", published / "usps" / "usps.bz2")
    assert_user_error(outcome, "usps.bz2", "give the folder of the files")


def test_photographs_smaller_than_a_digit(published, tmp_path):
    damage(tmp_path / "bsds" / "1.jpg", encoded(np.zeros((27, 40, 3), np.uint8)))
    damage(tmp_path / "bsds" / "1_small.jpg", encoded(np.zeros((28, 40, 3), np.uint8)))  # no photograph of the set
    outcome = build(published, tmp_path / "out", "--only", "mnistm", "--bsds", tmp_path / "bsds")
    assert_user_error(outcome, "1.jpg", "40x27 pixels")


def test_checksum_of_the_photographs(published, tmp_path):
    archive = published / "BSR_bsds500.tgz"
    right = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert build(published, tmp_path / "a", "--only", "mnistm", "--bsds-sha256", right).code == 0
    outcome = build(published, tmp_path / "b", "--only", "mnistm", "--bsds-sha256", "0" * 64)
    assert_user_error(outcome, archive, right)


@pytest.mark.parametrize(
    ("name", "source", "patched"),
    [
        ("usps", "usps", "torchvision.datasets.USPS"),
        ("svhn", "svhn", "torchvision.datasets.SVHN"),
        ("mnistm", "mnist", "torchvision.datasets.MNIST"),
        ("face", "celeba", "torchvision.datasets.CelebA"),
    ],
)
def test_no_network(tmp_path, monkeypatch, name, source, patched):
    def refuse(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setattr(patched, refuse)
    outcome = run(prepare.main, tmp_path / "out", "--only", name)
    assert_user_error(outcome, f"{source}: could not be downloaded", "no network", f"--{source} PATH")


def test_downloads_stay_beside_the_result(published, tmp_path, monkeypatch):
    """What torchvision and torch.hub fetch is read from where they put it."""
    monkeypatch.setattr(
        "torchvision.datasets.MNIST",
        lambda root, download: shutil.copytree(published / "mnist", root / "MNIST" / "raw", dirs_exist_ok=True),
    )
    seen = []

    def fetch(url, path, prefix):
        seen.append((url, prefix))
        shutil.copy(published / "BSR_bsds500.tgz", path)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    assert run(prepare.main, tmp_path / "a", "--only", "mnistm").code == 0
    assert seen == [(sources.BSDS_URL, None)]
    assert build(published, tmp_path / "b", "--only", "mnistm").code == 0
    assert (
        files(tmp_path / "a" / "digits")["mnistm/data/00003.png"]
        == files(tmp_path / "b" / "digits")["mnistm/data/00003.png"]
    )


def test_a_full_disk(published, tmp_path, monkeypatch):
    def full(self, path, *_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert_user_error(build(published, tmp_path, "--only", "usps"), "the disk is full")
    assert not (tmp_path / "digits" / "usps").exists()


def test_wrong_sizes(published, tmp_path):
    celeba = tmp_path / "celeba"
    for number in (1, 2, 3, 4, 170_000, 170_001, 190_000):
        damage(celeba / f"{number:06d}.jpg", encoded(np.zeros((300, 200, 3), np.uint8)))
    outcome = build(published, tmp_path / "x", "--only", "face", "--celeba", celeba)
    assert_user_error(outcome, "000001.jpg", "200x300 pixels", "aligned images")


def test_files_of_the_same_name_are_not_guessed(published, tmp_path):
    for name in ("MNIST", "fashion"):
        shutil.copytree(published / "mnist", tmp_path / "both" / name)
    outcome = build(published, tmp_path / "x", "--only", "mnistm", "--mnist", tmp_path / "both")
    assert_user_error(outcome, tmp_path / "both", "train-images-idx3-ubyte.gz more than once")


def test_linked_folders_are_entered(published, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "usps").symlink_to(published / "usps")
    assert build(published, tmp_path / "x", "--only", "usps", "--usps", tmp_path / "links").code == 0


def test_missing_faces_are_not_replaced_by_later_ones(published, tmp_path):
    celeba = tmp_path / "celeba"
    with zipfile.ZipFile(published / "celeba" / "img_align_celeba.zip") as archive:
        for name in archive.namelist():
            damage(celeba / Path(name).name, archive.read(name))
    shutil.copy(published / "celeba" / "list_eval_partition.txt", celeba)
    (celeba / "000002.jpg").unlink()
    outcome = build(published, tmp_path / "x", "--only", "face", "--celeba", celeba)
    assert_user_error(outcome, celeba, "lacks 1 images, such as 000002.jpg")


def test_another_list_starts_again(published, tmp_path, monkeypatch):
    """Faces that were built by a wrong list are not kept."""
    shutil.copytree(published / "celeba", tmp_path / "celeba")
    monkeypatch.setattr(prepare, "CHUNK", 2)
    monkeypatch.setattr(prepare, "finish", lambda *_: pytest.fail("stopped here"))
    options = ("--only", "face", "--celeba", tmp_path / "celeba")
    with pytest.raises(BaseException, match="stopped here"):
        build(published, tmp_path / "x", *options)
    monkeypatch.undo()
    path = tmp_path / "celeba" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("000001.jpg 0", "000001.jpg 2"))
    assert build(published, tmp_path / "x", *options).code == 0
    assert build(published, tmp_path / "y", *options).code == 0
    assert files(tmp_path / "x") == files(tmp_path / "y")


def test_one_process_builds(published, tmp_path):
    with alone_in(tmp_path):
        outcome = build(published, tmp_path, "--only", "usps")
    assert_user_error(outcome, tmp_path, "is being built by another process")
