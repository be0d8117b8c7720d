"""DANN: a feature extractor that a domain classifier cannot read, by gradient reversal. Networks of problem 3.

Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016 (arXiv:1505.07818).
Also the ResNet34 of the report's baselines, which are trained on one domain alone.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import resnet34

FEATURES = 512


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradient, None


def reverse_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """x itself; gradients that come back through it are multiplied by -``scale`` (section 4.2, eq. 16 and 17)."""
    return _Reversal.apply(x, scale)


def adaptation_factor(progress: float, gamma: float = 10.0) -> float:
    """lambda_p = 2 / (1 + exp(-gamma p)) - 1 (section 5.2.2), from 0 at p = 0 to nearly 1 at p = 1."""
    return 2 / (1 + math.exp(-gamma * progress)) - 1


class FeatureExtractor(nn.Module):
    """RGB images (N, 3, 32, 32) -> features (N, 512). 2,143,488 parameters at ``dim`` 64."""

    def __init__(self, dim: int = 64):
        super().__init__()
        widths = (3, dim, dim * 2, dim * 4, dim * 4, FEATURES)
        layers = []
        for c_in, c_out in pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)  # (N, 512, 1, 1) before


class LabelPredictor(nn.Module):
    """Features (N, 512) -> logits of the ten digits (N, 10). 530,442 parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(FEATURES, FEATURES),
            nn.ReLU(),
            nn.Linear(FEATURES, FEATURES),
            nn.ReLU(),
            nn.Linear(FEATURES, 10),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h)


class DomainClassifier(nn.Module):
    """Features (N, 512) -> logits of being a source image (N,). 1,055,233 parameters."""

    def __init__(self):
        super().__init__()
        layers = []
        for _ in range(4):
            layers += [nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU()]
        self.layer = nn.Sequential(*layers, nn.Linear(FEATURES, 1))

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h).flatten()


class Dann(nn.Module):
    """What is left for inference, without the domain classifier: images (N, 3, 32, 32) -> logits (N, 10)."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.extractor = FeatureExtractor(dim)
        self.predictor = LabelPredictor()

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor(self.extractor(x))


def small_image_resnet34() -> nn.Module:
    """torchvision's ResNet34 for ten classes and images of about 32x32, (N, 3, H, W) -> logits (N, 10), untrained.

    The first layers are those He et al. 2015 (arXiv:1512.03385, section 4.2) use for CIFAR: a 3x3 convolution of
    stride 1 and no pooling. The usual ones would leave a single pixel in the last stage.
    """
    network = resnet34(weights=None, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


NETWORKS = {"dann": Dann, "resnet34": small_image_resnet34}  # what problem 3 trains, by the names in weight files
