"""Muon: momentum whose matrices are made orthogonal, for the hidden layers of a network; AdamW for the rest.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). Rates
are in AdamW's units by the factor of Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv:2502.16982), section
2.2. ``torch.optim.Muon`` takes 2-D weights alone, which those of convolutions are not, needs torch 2.9, and computes in
bfloat16: 23 times as slow on a processor without it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan et al.: five steps bring values of 0.01 to 1 between 0.68 and 1.14
RMS = 0.2  # root mean square of an update of rate 1, about that of AdamW's


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of matrices x = U S V^T (..., m, n): a step x <- (A + B x x^T + C (x x^T)^2) x leaves U and V as
    they are and brings the singular values, at most 1 from the start, nearer to 1. A matrix of zeros stays one.

    All factors are polynomials of the first x x^T and so commute: they are multiplied up as m x m matrices, in float32,
    which for wide matrices costs less than half of the steps as written.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT, steps).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram = x @ x.mT
    product = eye = torch.eye(x.shape[-2], device=x.device)
    for _ in range(steps):
        factor = A * eye + B * gram + C * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Updates of ``network``: Muon with Nesterov's momentum for all weights of two dimensions or more, a convolution's
    (out, in, h, w) taken as a matrix (out, in h w); AdamW for the others and for those of the modules ``apart``, which
    are to be the first and the last layer and embeddings. ``lr`` and ``weight_decay`` are those of both."""

    def __init__(
        self,
        network: nn.Module,
        apart: Iterable[nn.Module],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        ends = {p for module in apart for p in module.parameters()}
        matrices = [p for p in network.parameters() if p.ndim >= 2 and p not in ends]
        others = [p for p in network.parameters() if p.ndim < 2 or p in ends]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": matrices}, {"params": others}], defaults)
        self.adamw = torch.optim.AdamW(others, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        group, others = self.param_groups
        self.adamw.param_groups[0]["lr"] = others["lr"]
        self.adamw.step()
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.flatten(1).shape, []).append(p)
        for (rows, columns), weights in shapes.items():  # those of one shape at once
            update = orthogonalised(torch.stack([self.direction(p, group["momentum"]) for p in weights]))
            update *= group["lr"] * RMS * max(rows, columns) ** 0.5
            for p, change in zip(weights, update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change.view(p.shape))

    def direction(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient of ``p`` as a matrix, averaged over steps, and once more with the newest."""
        gradient, state = p.grad.flatten(1).float(), self.state[p]
        if not state:
            state["average"] = torch.zeros_like(gradient)
        average = state["average"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def state_dict(self) -> dict:
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
