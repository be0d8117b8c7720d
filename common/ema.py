"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

POWER = 8.0  # how steps count in an average while its decay rises, see EMA


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set the batch-norm statistics to their mean over batches of ``inputs``; leaves eval mode on."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean instead of a moving one
    network.train()
    for x in inputs:
        network(x)
    network.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


class EMA:
    """Keeps ``module``, a copy of ``source`` whose weights follow it with the given decay.

    The decay of step s is min(decay, (1 + s) / (2 + power + s)). While it is the latter, the weights of step s count
    about as s^power: averages forget the initial weights, and all reach back over the same share of training (Karras et
    al. 2024, arXiv:2312.02696, section 3).
    Buffers (batch-norm statistics) do not follow: averaged weights have statistics of their own, which
    ``reestimate_batch_norm`` measures, or get those of the source by ``copy_buffers``. With decay 0 the weights are the
    source's.
    """

    def __init__(self, source: nn.Module, decay: float, power: float = POWER):
        self.decay, self.power = decay, power
        self.module = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (2 + self.power + step))
        ours, theirs = list(self.module.parameters()), [p.detach() for p in source.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    @torch.no_grad()
    def copy_buffers(self, source: nn.Module) -> None:
        for ours, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
            ours.copy_(theirs)
