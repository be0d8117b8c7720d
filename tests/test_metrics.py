"""Fréchet distances against closed forms and against pytorch-fid; the face counter; the reference cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from metrics.colour import colour_statistics
from metrics.detect import face_counts, face_rate
from metrics.frechet import Inception, frechet_distance
from tests.helpers import ROOT, smooth_images

WEIGHTS = Path("hub/checkpoints/pt_inception-2015-12-05-6726825d.pth")


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whitened(n: int, d: int, seed: int) -> torch.Tensor:
    """Features with mean exactly 0 and covariance exactly 1."""
    x = gaussian(n, d, seed)
    q = torch.linalg.qr(x - x.mean(0)).Q
    return q * (n - 1) ** 0.5


def test_shift_costs_its_square():
    x = gaussian(50, 8, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(8 * 9)


def test_commuting_covariances():
    """Diagonal covariances: the distance is the sum of (mu1 - mu2)^2 + (sigma1 - sigma2)^2."""
    s, t = torch.linspace(0.5, 2, 6).double(), torch.linspace(3, 1, 6).double()
    x, y = whitened(40, 6, 1) * s, whitened(90, 6, 2) * t + 0.25
    assert frechet_distance(x, y) == pytest.approx(float(((s - t) ** 2).sum() + 6 * 0.25**2))


def test_agrees_with_eigenvalues_of_the_product():
    """tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of S1 S2, for general covariances."""
    x, y = gaussian(60, 7, 3) @ gaussian(7, 7, 4), gaussian(80, 7, 5) @ gaussian(7, 7, 6) + 1
    s1, s2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    trace = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s1) + np.trace(s2) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected)


def test_rank_deficient_covariances():
    """Fewer images than dimensions, as with 1,000 samples and 2,048 features; orthogonal subspaces do not interact."""
    x, y = torch.zeros(5, 40).double(), torch.zeros(6, 40).double()
    x[:, :4], y[:, 10:15] = gaussian(5, 4, 7), gaussian(6, 5, 8)
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item())


def test_one_image_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(gaussian(1, 4, 0), gaussian(9, 4, 0))


def inception_home() -> Path | None:
    places = [os.environ.get("TORCH_HOME"), ROOT.parent / "shared" / "inception", Path.home() / ".cache" / "torch"]
    return next((Path(p) for p in places if p and (Path(p) / WEIGHTS).is_file()), None)


@pytest.mark.skipif(inception_home() is None, reason="no Inception weights on this machine")
def test_features_are_those_of_pytorch_fid(monkeypatch):
    from pytorch_fid.inception import InceptionV3

    monkeypatch.setenv("TORCH_HOME", str(inception_home()))
    images = torch.from_numpy(smooth_images(4, 64)).permute(0, 3, 1, 2)
    ours = Inception(torch.device("cpu"), 768).features(images)
    stock = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[768]]).eval()
    with torch.inference_mode():
        theirs = stock(images.float() / 255)[0].mean((2, 3))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_missing_inception_weights_are_one_clear_line(no_inception):
    with pytest.raises(UserError, match="TORCH_HOME"):
        Inception(torch.device("cpu"))


def test_reference_features_are_kept_until_the_images_change(tmp_path):
    inception = object.__new__(Inception)  # without the weights: only the cache is looked at
    inception.sizes, calls = (1, 2), []

    def features(images, what):
        calls.append(what)
        return images.float().mean((2, 3))

    inception.features = features
    images = torch.from_numpy(smooth_images(5, 64)).permute(0, 3, 1, 2)
    first = inception.reference(images, tmp_path / "f.safetensors")
    assert torch.equal(inception.reference(images, tmp_path / "f.safetensors"), first)
    assert len(calls) == 1
    changed = images.clone()
    changed[4, 0, 0, 0] += 1
    assert not torch.equal(inception.reference(changed, tmp_path / "f.safetensors"), first)
    assert len(calls) == 2


def test_distances_of_several_sizes_are_taken_apart():
    inception = object.__new__(Inception)
    inception.sizes = (2, 3)
    x, y = gaussian(20, 5, 0), gaussian(30, 5, 1)
    distances = inception.distances(x, y)
    assert list(distances) == ["FD-2", "FD-3"]
    assert distances["FD-2"] == pytest.approx(frechet_distance(x[:, :2], y[:, :2]))
    assert distances["FD-3"] == pytest.approx(frechet_distance(x[:, 2:], y[:, 2:]))


def test_no_face_in_gradients():
    images = torch.from_numpy(smooth_images(3, 64)).permute(0, 3, 1, 2)
    assert face_counts(images) == [0, 0, 0]


def test_face_rate_counts_exactly_one():
    assert face_rate([1, 0, 2, 1]) == 50


def test_colour_statistics():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = 10
    images[1, 1] = 200
    expected = torch.tensor([10, 100, 0, 0, 100, 0], dtype=torch.float64)
    assert torch.allclose(colour_statistics(images), expected)
