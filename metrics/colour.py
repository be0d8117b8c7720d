"""Colour statistics of a set of images: whether generated ones are too bright, or their contrast too high."""

import torch
from torch import Tensor

COLOURS = ("mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b")


def colour_statistics(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> mean of red, green, blue, then their standard deviations, in gray levels (6,)."""
    values = images.transpose(0, 1).flatten(1).double()
    return torch.cat([values.mean(1), values.std(1)])
