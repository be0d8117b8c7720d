"""Muon: matrices with singular values near 1, the momentum before them, and AdamW for all that is no hidden matrix."""

import copy

import pytest
import torch
from torch import Tensor, nn

from common.muon import A, B, C, Muon, orthogonalised
from common.trainer import descend


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (2, 3, 5, 40)])
def test_singular_vectors_stay_and_values_follow_the_polynomial(shape):
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    result = orthogonalised(u * 7 * s[..., None, :] @ v)  # whatever the scale
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    assert torch.allclose(result, u * s[..., None, :] @ v, atol=1e-5)


def test_singular_values_above_a_hundredth_end_near_one():
    small = torch.logspace(-2, -0.16, 100)  # with the larger value of each 2x2 matrix, 0.01 to 1
    values = torch.linalg.svdvals(orthogonalised(torch.diag_embed(torch.stack([small, (1 - small**2).sqrt()], 1))))
    assert 0.68 < values.min() < values.max() < 1.14
    assert torch.equal(orthogonalised(torch.zeros(2, 3)), torch.zeros(2, 3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.same = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)
        self.linear, self.table = nn.Linear(6, 2), nn.Embedding(3, 4)


def gradients(net: Net, seed: int) -> list[Tensor]:
    """Puts gradients in place, in the channels-last format that training has, and returns them."""
    random = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=random)
        if p.ndim == 4:
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    return [p.grad.clone() for p in net.parameters()]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)


def test_updates(net):
    """Two of them, against the equations, and against AdamW by itself where that is to be used."""
    lr, keep = 1e-2, 0.9
    muon = Muon(net, (net.first, net.table), lr=9.0, momentum=keep)
    for group in muon.param_groups:
        group["lr"] = lr
    twin = copy.deepcopy(net)
    adamw = torch.optim.AdamW(twin.parameters(), lr)
    hidden = {"conv.weight", "same.weight", "linear.weight"}
    expected = {name: p.detach().clone() for name, p in net.named_parameters() if name in hidden}
    averages = {name: torch.zeros_like(p) for name, p in expected.items()}
    for seed in (1, 2):
        given = gradients(net, seed)
        gradients(twin, seed)
        muon.step()
        adamw.step()
        for (name, p), other, g in zip(net.named_parameters(), twin.parameters(), given, strict=True):
            if name not in hidden:
                assert torch.allclose(p, other, atol=1e-7), name
                continue
            averages[name] = keep * averages[name] + (1 - keep) * g
            direction = (keep * averages[name] + (1 - keep) * g).flatten(1)
            change = 0.2 * max(direction.shape) ** 0.5 * orthogonalised(direction).view(p.shape)
            expected[name] = (1 - lr * 0.01) * expected[name] - lr * change
            assert torch.allclose(p, expected[name], atol=1e-6), name
            assert 0.12 < change.square().mean().sqrt() < 0.25  # AdamW's is 0.2 where gradients are noise


def test_the_rate_of_a_step_reaches_both(net):
    muon, before = Muon(net, (net.first, net.table), lr=1.0), copy.deepcopy(net)
    loss = sum(p.square().sum() for p in net.parameters())
    descend(loss, muon, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert all(p.grad is not None for p in net.parameters())


def test_goes_on_from_a_saved_state(net):
    muon, other = Muon(net, (net.first, net.table), 1e-2), copy.deepcopy(net)
    gradients(net, 1)
    muon.step()
    other.load_state_dict(net.state_dict())
    again = Muon(other, (other.first, other.table), 5.0)
    again.load_state_dict(copy.deepcopy(muon.state_dict()))
    for each, optimiser in ((net, muon), (other, again)):
        gradients(each, 2)
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
