"""Training on several GPUs: one process for each, started by torchrun.

  torchrun --standalone --nproc-per-node 4 p2_train.py --data hw2_data/digits/mnistm

All processes hold the same weights and draw the same random numbers. Each computes its share of every batch, their
gradients are averaged, and all make the same update. So the result is that of one process, but for rounding, for
batch normalisation, whose statistics are those of a share, and for DiffAugment, which every process draws for its own
generated images. The first process alone reports, scores and saves.
Started without torchrun, the functions here do nothing.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    return rank() == 0


def join(batch_size: int) -> None:
    """Meet the other processes. Raises UserError when a batch cannot be shared equally."""
    if processes() > 1:
        if batch_size % processes() or batch_size < 2 * processes():  # one image has no batch statistics
            raise UserError(
                f"--batch-size {batch_size}: a multiple of {processes()} is needed, with 2 for each process"
            )
        # the others wait through the first one's evaluations
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share(batch: Tensor) -> Tensor:
    """The rows of a batch (N, ...) that are this process's: N / ``processes()`` in a row."""
    return batch.chunk(processes())[rank()]


def agree(*values: float) -> list[float]:
    """The first process's values, in all of them: clocks and signals differ."""
    if processes() > 1:
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()
    return list(values)


@torch.no_grad()
def mean_of_shares(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes: of a batch, where each has the mean of its share."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= processes()
    return x


@torch.no_grad()
def average_gradients(optimiser: Optimizer) -> None:
    """Put the mean over the processes in the place of each gradient that ``optimiser`` is about to use."""
    if processes() > 1:
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])  # one message, not one for each parameter
        dist.all_reduce(flat)
        flat /= processes()
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view(g.shape))
