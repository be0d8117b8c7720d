"""Augmentation of batches on their device. Every function draws from the generator it is given."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def resize(x: Tensor, size: int, antialias: bool = False) -> Tensor:
    """(N, C, H, H) -> (N, C, size, size), bilinear; with ``antialias`` pixels are averaged where it shrinks."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", antialias=antialias)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=torch.float32)


def random_flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirror each image of (N, C, H, W) left to right with probability one half."""
    return torch.where(_uniform(x, generator) < 0.5, x.flip(3), x)


def colour(x: Tensor, generator: Generator) -> Tensor:
    """Brightness +-0.5, saturation 0..2, contrast 0.5..1.5 (Zhao et al. 2020, on images in [-1, 1])."""
    x = x + (_uniform(x, generator) - 0.5)
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * (_uniform(x, generator) * 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (_uniform(x, generator) + 0.5)


def translation(x: Tensor, generator: Generator, ratio: float = 0.125) -> Tensor:
    """Shift by up to ``ratio`` of the side in both directions, zeros move in."""
    n, _, h, w = x.shape

    def shift(side: int) -> Tensor:
        reach = int(side * ratio + 0.5)
        return torch.randint(-reach, reach + 1, (n, 1, 1), generator=generator, device=x.device)

    rows = torch.arange(h, device=x.device).view(1, h, 1) + shift(h) + 1
    columns = torch.arange(w, device=x.device).view(1, 1, w) + shift(w) + 1
    padded = F.pad(x, (1, 1, 1, 1))
    batch = torch.arange(n, device=x.device).view(n, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[batch, rows.clamp(0, h + 1), columns.clamp(0, w + 1)]
    return picked.permute(0, 3, 1, 2)


def cutout(x: Tensor, generator: Generator, ratio: float = 0.5) -> Tensor:
    """Zero a square of ``ratio`` of the side around a random centre."""
    n, _, h, w = x.shape

    def inside(side: int, shape: tuple[int, ...]) -> Tensor:
        length = int(side * ratio + 0.5)
        centre = torch.randint(0, side + 1 - length % 2, (n, 1, 1, 1), generator=generator, device=x.device)
        offset = torch.arange(side, device=x.device).view(shape) - (centre - length // 2)
        return (offset >= 0) & (offset < length)

    return x * ~(inside(h, (1, 1, h, 1)) & inside(w, (1, 1, 1, w)))


def standardise(x: Tensor) -> Tensor:
    """Each image of (N, C, H, W) minus its mean, over its standard deviation, all pixels and channels together."""
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    return (x - mean) / std.clamp(min=0.02)


def digit_input(images: Tensor, size: int, standardised: bool, gray: bool = False) -> Tensor:
    """uint8 digits (N, 3, 28, 28) -> what the classifiers of problem 3 see: float (N, 3, size, size).

    ``gray`` puts the mean of red, green and blue in the place of each.
    """
    x = normalise(images)
    if gray:
        x = x.mean(1, keepdim=True).expand_as(x)
    x = resize(x, size)
    return standardise(x) if standardised else x


def geometry(
    x: Tensor,
    generator: Generator,
    turn: float = 0.2,
    zoom: float = 0.2,
    shift: float = 0.12,
    width: tuple[float, float] = (1.0, 1.0),
    height: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Shift by up to ``shift`` of half the side, rotation by up to ``turn`` radians, then enlargement along either axis
    of the image, by a factor from ``width`` or ``height`` over one of 1 +- ``zoom``; the border is repeated."""
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator, device=x.device) * (high - low) + low

    angle = draw(-turn, turn)
    sx, sy = (draw(1 - zoom, 1 + zoom) / draw(*factors) for factors in (width, height))
    dx, dy = draw(-shift, shift), draw(-shift, shift)
    rows = torch.stack([angle.cos() * sx, -angle.sin() * sy, dx, angle.sin() * sx, angle.cos() * sy, dy], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def neighbours(x: Tensor, generator: Generator, reach: float = 0.3) -> Tensor:
    """Let other digits of the batch into each image (N, C, H, W), as in crops from house numbers.

    On either side, with probability one half, up to ``reach`` of the width shows the near part of another image.
    """
    n, _, _, w = x.shape
    columns = torch.arange(w, device=x.device).view(1, 1, 1, w)
    result = x
    for flipped in (False, True):
        width = (_uniform(x, generator) * 2 - 1).clamp(min=0) * reach * w
        other = x[torch.randperm(n, generator=generator, device=x.device)]
        margin = 0.15 * w  # a digit starts about there
        position = (columns - (w - width) + margin).long().clamp(0, w - 1)  # column of ``other`` seen at the right
        if flipped:
            position, inside = w - 1 - position.flip(3), columns < width
        else:
            inside = columns >= w - width
        result = torch.where(inside, other.gather(3, position.expand_as(x)), result)
    return result


def negatives(x: Tensor, generator: Generator) -> Tensor:
    """Invert each image (N, C, H, W) of mean 0 with probability one half: bright digits become dark ones."""
    return x * (1 - 2 * torch.randint(2, (len(x), 1, 1, 1), generator=generator, device=x.device))


def soften(x: Tensor, generator: Generator, noise: float = 0.1) -> Tensor:
    """Blur each image twice by a random share of its 3x3 mean, then add Gaussian noise of deviation 0 ... ``noise``."""
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(x, blurred, _uniform(x, generator))
    return x + torch.randn(x.shape, generator=generator, device=x.device) * _uniform(x, generator) * noise


POLICIES = {"color": colour, "translation": translation, "cutout": cutout}


def diff_augment(x: Tensor, policy: str, generator: Generator) -> Tensor:
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738): differentiable augmentation of what the discriminator
    sees, real and generated alike. ``policy`` is a comma list of color, translation, cutout; empty for none."""
    for name in filter(None, policy.split(",")):
        x = POLICIES[name](x, generator)
    return x
