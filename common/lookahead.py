"""Lookahead: the weights of all players of a game go back to where they came from, halfway, every few updates.

Chavdarova et al. 2021, "Taming GANs with Lookahead-Minmax" (arXiv:2006.14567), algorithm 1, after Zhang et al. 2019
(arXiv:1907.08610). Updates of a generator and a discriminator turn around an equilibrium; a point between two that are
on one circle lies nearer to its centre.
"""

from collections.abc import Iterable

import torch
from torch import nn

ALPHA = 0.5  # share of the way that is kept


class Lookahead:
    """Pulls ``networks`` back together, after ``every`` updates of all of them; 0 for never. Their optimisers keep what
    they have; buffers (batch-norm statistics) are left alone."""

    def __init__(self, networks: Iterable[nn.Module], every: int):
        self.every = every
        self.fast = [p.detach() for network in networks for p in network.parameters()] if every else []
        self.slow = [p.clone() for p in self.fast]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the update of ``step``, which counts from 0."""
        if self.every and (step + 1) % self.every == 0:
            torch._foreach_lerp_(self.slow, self.fast, ALPHA)
            torch._foreach_copy_(self.fast, self.slow)

    def state_dict(self) -> dict:
        return {"slow": self.slow}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for ours, saved in zip(self.slow, state["slow"], strict=True):
            ours.copy_(saved)
