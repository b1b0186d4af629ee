"""Norms in one pass, and their gradients in another; see `rows.c` and `gradients.c`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from encdec_cli import kernels
from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import shares, together

_COST = 128
"""What a number of a row costs, in multiplications of a product."""
_BLOCK = 64
"""Rows whose part of the gradient by weight and bias is a sum of its own, so that threads do not change the order."""


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor | None:
    """Return LayerNorm (`centred`) or RMSNorm of x [..., width], to be differentiated once; None without a kernel.

    weight, bias: [width].
    """
    if not torch.is_grad_enabled() or not any(one is not None and one.requires_grad for one in (x, weight, bias)):
        return kernels.norm(x, weight, bias, epsilon, centred)
    if x.shape[-1] % kernels.WIDTH or weight.shape != x.shape[-1:] or not kernels.learnable(x, weight, bias):
        return None
    return _Norm.apply(x, weight, bias, epsilon, centred)  # type: ignore[no-untyped-call, no-any-return]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool
    ) -> Tensor | None:
        ctx.save_for_backward(x, weight)
        ctx.how = (epsilon, centred)
        return kernels.norm(x, weight, bias, epsilon, centred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = _gradients(x, weight, outer.contiguous(), ctx.how)
        return by_x, by_weight, by_bias if ctx.needs_input_grad[2] else None, None, None


def _gradients(x: Tensor, weight: Tensor, outer: Tensor, how: tuple[float, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x [..., width], weight [width] and bias [width]; how: epsilon and whether centred."""
    width, by_x, size, bf16 = x.shape[-1], torch.empty_like(x), x.element_size(), x.dtype == torch.bfloat16
    rows = x.numel() // width
    blocks = -(-rows // _BLOCK)
    sums = torch.zeros((max(1, blocks), 2, width), dtype=torch.float32)
    calls = []
    for first, last in shares(blocks, _COST * x.numel()):
        row, end = first * _BLOCK, min(last * _BLOCK, rows)
        start = row * width * size
        given = (x.data_ptr() + start, outer.data_ptr() + start, end - row, width, weight.data_ptr(), *how, _BLOCK)
        places = (by_x.data_ptr() + start, sums[first:].data_ptr())
        calls.append(partial(function("norm_gradient"), *given, *places, bf16))
    together(calls)
    both = torch.empty((2, width), dtype=x.dtype)
    function("add_blocks")(sums.data_ptr(), len(sums), 2 * width, both.data_ptr(), bf16)
    return by_x, both[0], both[1]
