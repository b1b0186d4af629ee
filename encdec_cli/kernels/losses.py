"""The loss of rows of logits and its gradient in one call; see `losses.c`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import shares, together

_COST = 64
"""What a logit costs, in multiplications of a product."""


def cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, prior: Tensor | None, scale: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of rows, fp32, and `weight` times its gradient, of the type of the logits.

    The gradient is computed in fp32, exponentials to 1e-7, and rounded once. Arguments as of `training.loss`: logits
    [n, vocab], dense; target [n] int64; prior [vocab]; scale [n]. Raises IndexError for a target that is no token.
    """
    scale = None if scale is None else scale.float().contiguous()

    def some(first: int, *given: int | None) -> partial[None]:
        its = None if scale is None else scale.data_ptr() + 4 * first
        return partial(function("cross_entropy"), *given, its, smoothing, weight)

    return _row_by_row(logits, target, prior, some, 1)


def agreement(
    logits: Tensor, target: Tensor, smoothing: float, prior: Tensor | None, pull: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Return half of the cross-entropy of each two rows, plus `pull` times both divergences of them, and its gradient.

    Arguments as of `cross_entropy`, but that the number of rows is even.
    """

    def some(_first: int, *given: int | None) -> partial[None]:
        return partial(function("agreement"), *given, smoothing, pull, weight)

    return _row_by_row(logits, target, prior, some, 2)


def _row_by_row(
    logits: Tensor, target: Tensor, prior: Tensor | None, some: Callable[..., partial[None]], group: int
) -> tuple[Tensor, Tensor]:
    """Return summed loss and gradient.

    some: is given the number of a row, where its logits are, how many groups of rows and how many tokens there are, and
    where targets and the prior are; returns the call that is then given where to write, and the type. group: rows that
    have a loss together.
    """
    vocab = logits.shape[1]
    if not len(target):
        return logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
    if not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise IndexError(f"a target from {int(target.min())} to {int(target.max())} among {vocab} logits")
    target, prior = target.long().contiguous(), None if prior is None else prior.float().contiguous()
    losses, gradient = torch.empty(len(target) // group, dtype=torch.float32), torch.empty_like(logits)
    calls = []
    for first, last in shares(len(losses), _COST * logits.numel()):
        row = first * group
        start = row * vocab * logits.element_size()
        given = (logits.data_ptr() + start, last - first, vocab, target.data_ptr() + 8 * row)
        call = some(row, *given, None if prior is None else prior.data_ptr())
        places = (losses.data_ptr() + 4 * first, gradient.data_ptr() + start)
        calls.append(partial(call, *places, logits.dtype == torch.bfloat16))
    together(calls)
    return losses.sum(), gradient
