"""The networks are those of the report: as printed, as counted, and as the papers say they behave."""

import pytest
import torch
from torch import nn

from models import dcgan, sngan
from tests.helpers import ROOT

PRINTED = {
    "generator": (dcgan.Generator, 5_142_083),
    "dcgan_discriminator": (dcgan.Discriminator, 4_316_545),
    "sngan_discriminator": (sngan.Discriminator, 4_314_753),
}


@pytest.mark.parametrize("name", PRINTED)
def test_prints_as_in_the_report(name):
    network = PRINTED[name][0]()
    text = str(network).replace("affine=True, bias=True,", "affine=True,")  # torch 2.15 prints one more word
    assert text == (ROOT / "tests" / "printed" / f"{name}.txt").read_text().rstrip("\n")


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts(name):
    network, count = PRINTED[name]
    assert sum(p.numel() for p in network().parameters()) == count


def test_generator_output():
    images = dcgan.Generator(dim=4)(torch.randn(3, 100))
    assert images.shape == (3, 3, 64, 64)
    assert images.abs().max() <= 1


def test_initial_weights():
    torch.manual_seed(0)
    network = dcgan.Generator()
    convolution, norm = network.l2_5[0][0], network.l2_5[0][1]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert sngan.Discriminator().ls[2][0].weight_orig.std().item() == pytest.approx(0.02, rel=0.01)


def test_dcgan_discriminator_is_the_sigmoid_of_its_logits():
    network = dcgan.Discriminator(dim=4).eval()
    x = torch.randn(5, 3, 64, 64)
    assert torch.allclose(network(x), network.ls(x).flatten())
    assert torch.allclose(network(x), network.logits(x).sigmoid())


def test_spectral_norm_brings_every_layer_to_one():
    torch.manual_seed(0)
    network = sngan.Discriminator(dim=2)
    x = torch.randn(1, 3, 64, 64)
    for _ in range(100):  # power iterations
        network(x)
    network.eval()(x)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 5
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
