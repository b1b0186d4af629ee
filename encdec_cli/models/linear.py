"""The one linear layer of the package, so that a bundle can be loaded with another kind of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MUCH = 1 << 22
"""From this many multiplications on oneDNN is used: it makes a kernel for each new shape, which costs about a ms."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., inputs] to [..., outputs] by weight [outputs, inputs] and bias [outputs]."""
    # Measured with one thread on Zen 5, 640 rows, ms by torch / by oneDNN: 256 x 256 in fp32 0.87 / 0.38, in bf16
    # 0.19 / 0.19; 256 x 1024 3.6 / 1.6 and 0.81 / 0.81; 256 x 8000 28 / 13 and 8.2 / 6.2. For fp32 torch calls MKL,
    # which does not use the wide registers of processors of another maker.
    if x.device.type == "cpu" and not torch.is_grad_enabled() and _ONEDNN is not None and _is_large(x, weight):
        product: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in _TYPES and x.numel() * len(weight) >= MUCH


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
