"""The one linear layer of the package, so that a bundle can be loaded with another kind of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from encdec_cli.kernels.linear import can_map, operators
from encdec_cli.kernels.matrix import can_pack

MUCH = 1 << 22
"""From this many multiplications on oneDNN is used: it makes a kernel for each new shape, which costs 0.4 ms."""
ENOUGH = 1 << 20
"""From this many on our own products are used, if there are enough rows too: to pack the matrix takes a while."""
ROWS = 32
"""Enough rows: with fewer, to pack the matrix takes longer than oneDNN to make a kernel for one more shape."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., inputs] to [..., outputs] by weight [outputs, inputs] and bias [outputs]."""
    # Measured with one thread on Zen 5, 640 rows, ms by torch / by oneDNN: 256 x 256 in fp32 0.87 / 0.38, in bf16
    # 0.19 / 0.19; 256 x 1024 3.6 / 1.6 and 0.81 / 0.81; 256 x 8000 28 / 13 and 8.2 / 6.2. For fp32 torch calls MKL,
    # which does not use the wide registers of processors of another maker.
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the compiler makes products of its own
        return F.linear(x, weight, bias)
    much, learning = x.numel() * len(weight), torch.is_grad_enabled()
    enough = much >= ENOUGH and x.numel() >= x.shape[-1] * ROWS
    ours = enough and can_map(x, weight, bias)
    if not ours and (much < MUCH or _ONEDNN is None or x.dtype not in _TYPES[: 1 if learning else 2]):
        return F.linear(x, weight, bias)
    mapped: Tensor = _Linear.apply(x, weight, bias, ours) if learning else _map(x, weight, bias, ours)  # type: ignore[no-untyped-call]
    return mapped


def any_rows(dtype: torch.dtype, width: int) -> bool:
    """Return whether a CPU's map of this width takes any number of rows alike: oneDNN makes a kernel for each."""
    return dtype not in (torch.float32, torch.bfloat16) or can_pack(dtype, width)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None, ours: bool) -> Tensor:
    mapped: Tensor = operators().linear(x, weight, bias) if ours else _product(x, weight, bias)
    return mapped


class _Linear(torch.autograd.Function):
    """The same with its gradients, by products of our own or, each as another linear map, of oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ours: bool) -> Tensor:
        by_x, by_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        ctx.ours = ours
        return _map(x, weight, bias, ours)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, _ = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if by_x:
            of_x = operators().linear_by_input(outer, weight) if ctx.ours else _product(outer, weight.t())
        if ctx.ours and by_weight:
            of_weight, of_bias = operators().linear_by_weight(outer, x)
        elif by_weight:
            of_weight = _transposed_product(outer.reshape(-1, outer.shape[-1]), x.reshape(-1, x.shape[-1]))
        if by_bias and of_bias is None:
            of_bias = outer.reshape(-1, outer.shape[-1]).sum(0)
        return of_x, of_weight, of_bias if by_bias else None, None


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b, [n, m], for a [rows, n] and b [rows, m]."""
    # The first factor is copied to be transposed, the second is not: so it is the smaller one.
    if a.shape[1] <= b.shape[1]:
        return _product(a.t(), b.t())
    return _product(b.t(), a.t()).t().contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _ONEDNN(x, weight, None if bias is None else bias.contiguous(), "none", [], "")
    return product


def _onednn() -> Any:
    # A private interface of torch, used in this one place.
    return torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


def _types() -> tuple[torch.dtype, ...]:
    # It has no kernels for bf16 on processors without AVX-512.
    bf16 = _ONEDNN is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)


_ONEDNN = _onednn()
_TYPES = _types()


class Linear(nn.Module):
    """A linear map with the weight [outputs, inputs] and, unless switched off, a bias [outputs].

    The weight starts Xavier-uniform (Glorot and Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html)
    times `gain`, the bias at zero. A loader may put any module with the same call in its place.
    """

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]."""
        return linear(x, self.weight, self.bias)
