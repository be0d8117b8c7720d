"""Gradient reversal, its schedule, and the networks of problem 3."""

import pytest
import torch

from models.dann import (
    DomainClassifier,
    FeatureExtractor,
    LabelPredictor,
    adaptation_factor,
    reverse_gradient,
    small_image_resnet34,
)


def test_reversal_keeps_values_and_turns_gradients():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    (y * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad.tolist() == pytest.approx([-1.5, -2.1])


def test_adaptation_factor():
    assert adaptation_factor(0) == 0
    assert adaptation_factor(0.1) == pytest.approx(0.46211716)
    assert adaptation_factor(1) == pytest.approx(0.99990920)


@pytest.mark.parametrize(
    ("network", "count"), [(FeatureExtractor, 2_143_488), (LabelPredictor, 530_442), (DomainClassifier, 1_055_233)]
)
def test_parameter_counts(network, count):
    with torch.device("meta"):  # no values
        assert sum(p.numel() for p in network().parameters()) == count


def test_shapes():
    h = FeatureExtractor(dim=2)(torch.randn(3, 3, 32, 32))
    assert h.shape == (3, 512)
    assert LabelPredictor()(h).shape == (3, 10)
    assert DomainClassifier()(h).shape == (3,)


def test_resnet_keeps_small_images_large_enough():
    network = small_image_resnet34().eval()
    seen = []
    network.layer4.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    with torch.no_grad():
        assert network(torch.randn(1, 3, 28, 28)).shape == (1, 10)
    assert seen == [(1, 512, 4, 4)]
