"""The loss of rows of logits and its gradient in one call; see `losses.c`."""

from __future__ import annotations

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
    rows, vocab = logits.shape
    if not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise IndexError(f"a target from {int(target.min())} to {int(target.max())} among {vocab} logits")
    target, gradient = target.contiguous(), torch.empty_like(logits)
    prior, scale = (None if one is None else one.float().contiguous() for one in (prior, scale))
    losses = torch.empty(rows, dtype=torch.float32)
    calls = []
    for first, last in shares(rows, _COST * logits.numel()):
        start = first * vocab * logits.element_size()
        calls.append(
            partial(
                function("cross_entropy"),
                *(logits.data_ptr() + start, last - first, vocab, target.data_ptr() + 8 * first),
                *(prior.data_ptr() if prior is not None else None, _row(scale, first), smoothing, weight),
                *(losses.data_ptr() + 4 * first, gradient.data_ptr() + start, logits.dtype == torch.bfloat16),
            )
        )
    together(calls)
    return losses.sum(), gradient


def _row(scale: Tensor | None, first: int) -> int | None:
    return None if scale is None else scale.data_ptr() + 4 * first
