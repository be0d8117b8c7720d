"""The networks are those of the report: as printed, as counted, and as the papers say they behave."""

import pytest
import torch
from torch import nn

from models import dcgan, sngan, unet
from models.classifier import Classifier
from tests.helpers import ROOT

PRINTED = {
    "generator": (dcgan.Generator, 5_142_083),
    "dcgan_discriminator": (dcgan.Discriminator, 4_316_545),
    "sngan_discriminator": (sngan.Discriminator, 4_314_753),
    "unet": (unet.UNet_conditional, 15_664_515),
}


@pytest.mark.parametrize("name", PRINTED)
def test_prints_as_in_the_report(name):
    with torch.device("meta"):  # no values
        network = PRINTED[name][0]()
    text = str(network).replace("affine=True, bias=True", "affine=True")  # torch 2.14 prints one more word
    text = text.replace("'", "")  # and strings in quotes
    assert text == (ROOT / "tests" / "printed" / f"{name}.txt").read_text().rstrip("\n")


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts(name):
    make, count = PRINTED[name]
    with torch.device("meta"):
        network = make()
    assert sum(p.numel() for p in network.parameters()) == count


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


def small_unet() -> unet.UNet_conditional:
    torch.manual_seed(0)
    return unet.UNet_conditional(dim=4).eval()


def test_padding_is_undone_exactly():
    x = torch.randn(2, 3, 28, 28)
    padded, top, left = unet.pad_to_multiple(x, 8)
    assert padded.shape == (2, 3, 32, 32)
    assert torch.equal(padded[:, :, top : top + 28, left : left + 28], x)
    assert torch.equal(padded[:, :, :2], padded[:, :, 3:5].flip(2))  # a reflection: the edge is not repeated
    assert unet.pad_to_multiple(padded, 8)[1:] == (0, 0)


@torch.no_grad()
def test_unet_sees_image_step_and_label():
    network, x, t = small_unet(), torch.randn(2, 3, 28, 28), torch.tensor([5, 300])
    y = torch.tensor([3, 7])
    out = network(x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(network(x, t + 100, y), out)
    assert not torch.allclose(network(x, t, y + 1), out)
    for i in range(2):  # images of a batch do not see each other
        assert torch.allclose(network(x[i : i + 1], t[i : i + 1], y[i : i + 1]), out[i : i + 1], atol=1e-5)


def test_every_parameter_of_the_unet_is_used():
    network = small_unet().train()
    network(torch.randn(10, 3, 16, 16), torch.arange(1, 11), torch.arange(10)).square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert unused == []


@torch.no_grad()
def test_unlabelled_images_do_not_see_the_embedding():
    network, x, t = small_unet(), torch.randn(2, 3, 28, 28), torch.tensor([5, 300])
    before = network(x, t, torch.tensor([-1, 0]))
    network.label_emb.weight.add_(1.0)
    after = network(x, t, torch.tensor([-1, 0]))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


@torch.no_grad()
def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    layer, tokens = unet.SelfAttention(8), torch.randn(2, 20, 8)
    assert torch.allclose(layer.attend(tokens), layer.mha(tokens, tokens, tokens)[0], atol=1e-5)


def test_time_code_is_sines_then_cosines():
    code = unet.time_code(torch.tensor([0, 7]), dim=6)
    assert code[0].tolist() == [0, 0, 0, 1, 1, 1]
    angles = torch.tensor([7.0, 7 / 10_000 ** (1 / 3), 7 / 10_000 ** (2 / 3)])
    assert torch.allclose(code[1], torch.cat([angles.sin(), angles.cos()]))


def test_classifier_output():
    assert Classifier()(torch.randn(3, 3, 28, 28)).shape == (3, 10)
    assert sum(p.numel() for p in Classifier().parameters()) == 456 + 2416 + 32_896 + 8256 + 650
