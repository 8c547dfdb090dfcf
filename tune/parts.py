"""Use all cores: a batch is computed in parts, each by a thread of its own.

Torch's threads share every operation and wait for one another thousands of times a step; parts wait once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor, nn

__all__ = ["differentiate", "one_core_each", "update"]


def one_core_each(threads: int) -> ThreadPoolExecutor:
    """Return threads for parts; torch's own are switched off."""
    torch.set_num_threads(1)
    return ThreadPoolExecutor(threads)


def differentiate(pool: Executor, model: nn.Module, parts: Iterable[Callable[[], Tensor]]) -> float:
    """Make the gradients of the sum of the parts' losses, always added up in one order; return that sum."""
    parameters = list(model.parameters())

    def one(part: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        loss = part()
        return loss.item(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(*pool.map(one, parts), strict=True)
    for parameter, *shares in zip(parameters, *gradients, strict=True):
        parameter.grad = shares[0]
        for share in shares[1:]:
            parameter.grad.add_(share)
    return float(sum(losses))


def update(pool: Executor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let every optimizer take its step."""
    list(pool.map(lambda optimizer: optimizer.step(), optimizers))
