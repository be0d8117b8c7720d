"""Nearest training images: whether a generator repeats what it was trained on."""

import torch
from torch import Tensor


@torch.inference_mode()
def nearest(images: Tensor, training: Tensor, k: int = 1, batch_size: int = 200) -> tuple[Tensor, Tensor]:
    """(distances (N, k), rows of ``training`` (N, k)), nearest first.

    uint8 (N, C, H, W) and (M, C, H, W), M >= k. The distance is the root mean square difference of all values, in
    gray levels of 0 ... 255.
    """
    base = training.flatten(1).float()
    squares = base.square().sum(1)
    distances, rows = [], []
    for batch in images.split(batch_size):
        x = batch.flatten(1).float()
        d = squares - 2 * x @ base.T  # squared distance less |x|^2, which does not change the order
        best = d.topk(k, largest=False)
        exact = (x[:, None] - base[best.indices]).square().mean(2).sqrt()  # free of the cancellation above
        order = exact.argsort(1)
        distances.append(exact.gather(1, order))
        rows.append(best.indices.gather(1, order))
    return torch.cat(distances), torch.cat(rows)
