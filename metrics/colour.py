"""Colour statistics of a set of images: whether generated ones are too bright, or their contrast too high."""

import torch
from torch import Tensor

COLOURS = ("mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b")


def colour_statistics(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> mean of red, green, blue, then their standard deviations, in gray levels (6,)."""
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return torch.cat([mean, variance.sqrt()])
