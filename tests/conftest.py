from pathlib import Path

import pytest
import torch

from tests.helpers import MeanInception, smooth_images, write_index, write_pngs


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Training draws nothing; tests of its curves put ``plot_curves`` back."""
    monkeypatch.setattr("common.trainer.plot_curves", lambda _metrics, path, *_: path.touch())


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A face data root of the course's layout: train/ of 60 and val/ of 12 images."""
    root = tmp_path_factory.mktemp("data") / "face"
    write_pngs(root / "train", smooth_images(60, 64, seed=1))
    write_pngs(root / "val", smooth_images(12, 64, seed=2))
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A digit data root of the course's layout: 60 training and 20 validation digits in data/, and their lists."""
    root = tmp_path_factory.mktemp("data") / "mnistm"
    paths = write_pngs(root / "data", smooth_images(80, 28, seed=3))
    write_index(root / "train.csv", [(p.name, i % 10) for i, p in enumerate(paths[:60])])
    write_index(root / "val.csv", [(p.name, i % 10) for i, p in enumerate(paths[60:])])
    return root


@pytest.fixture(scope="session")
def domains(tmp_path_factory) -> Path:
    """mnistm, usps (gray) and svhn; the lists of the targets have labels in val only, none in train."""
    root = tmp_path_factory.mktemp("digits")
    for seed, (name, channels) in enumerate((("mnistm", 3), ("svhn", 3), ("usps", 1))):
        paths = write_pngs(root / name / "data", smooth_images(40, 28, channels, seed))
        write_index(root / name / "train.csv", [(p.name, i % 10) for i, p in enumerate(paths)])
    for name in ("svhn", "usps"):
        lines = (root / name / "train.csv").read_text().splitlines()
        (root / name / "unlabelled.csv").write_text("\n".join(line.split(",")[0] for line in lines))
    return root


@pytest.fixture
def mean_inception(monkeypatch):
    """Fréchet distances of block means instead of Inception features, in every script."""
    monkeypatch.setattr("metrics.frechet.Inception", MeanInception)


@pytest.fixture
def no_inception(monkeypatch, tmp_path):
    """A machine without Inception weights and without a network."""
    from urllib.error import URLError

    def refuse(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)


torch.set_num_threads(1)  # tiny networks: a second thread only waits
