"""Gradient reversal, its schedule, losses on unlabelled images, and the networks of problem 3."""

import math

import pytest
import torch

from models.dann import (
    DomainClassifier,
    FeatureExtractor,
    LabelPredictor,
    adaptation_factor,
    conditional_entropy,
    reverse_gradient,
    small_image_resnet34,
    virtual_mixup_loss,
)


def test_reversal_keeps_values_and_turns_gradients():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    (y * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad.tolist() == pytest.approx([-1.5, -2.1])


def test_one_step_confuses_the_domain_classifier():
    """Descending a reversed loss moves the features so that the domain loss rises, for a fixed classifier."""
    torch.manual_seed(0)
    head, h = torch.nn.Linear(4, 1), torch.randn(6, 4, requires_grad=True)
    domain = torch.tensor([1.0, 1, 1, 0, 0, 0])
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    before = loss(head(reverse_gradient(h)).flatten(), domain)
    before.backward()
    after = loss(head(h - 0.1 * h.grad).flatten(), domain)
    assert after > before


def test_adaptation_factor():
    assert adaptation_factor(0) == 0
    assert adaptation_factor(0.1) == pytest.approx(0.46211716)
    assert adaptation_factor(1) == pytest.approx(0.99990920)


def test_conditional_entropy():
    uniform, sure = torch.zeros(2, 10), 100 * torch.eye(10)
    assert conditional_entropy(uniform).item() == pytest.approx(math.log(10))
    assert conditional_entropy(sure).item() == pytest.approx(0, abs=1e-6)
    two = torch.tensor([[0.0, math.log(3)]])
    assert conditional_entropy(two).item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_virtual_mixup():
    """Nothing to learn where all predictions agree; the divergence of its definition elsewhere; labels are fixed."""
    x = torch.arange(4.0).view(4, 1, 1, 1)

    def random():
        return torch.Generator().manual_seed(0)

    def constant(x):
        return torch.tensor([[0.3, -1.0]]).expand(len(x), 2)

    assert virtual_mixup_loss(constant, x, constant(x), random()).item() == pytest.approx(0, abs=1e-6)

    logits = torch.randn(4, 2, generator=random(), requires_grad=True)
    seen = []

    def uniform(x):
        seen.append(x.flatten())
        return torch.zeros(len(x), 2, requires_grad=True)

    loss = virtual_mixup_loss(uniform, x, logits, random())
    g = random()
    share, partner = torch.rand(4, generator=g), torch.randperm(4, generator=g)
    assert torch.allclose(seen[0], share * torch.arange(4.0) + (1 - share) * partner)
    p = logits.softmax(1)
    mixed = share[:, None] * p + (1 - share[:, None]) * p[partner]
    assert loss.item() == pytest.approx((mixed * (mixed / 0.5).log()).sum(1).mean().item(), rel=1e-4)
    loss.backward()
    assert logits.grad is None


@pytest.mark.parametrize(
    ("network", "count"), [(FeatureExtractor, 2_143_488), (LabelPredictor, 530_442), (DomainClassifier, 1_055_233)]
)
def test_parameter_counts(network, count):
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
