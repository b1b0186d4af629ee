"""Linear layers whose weights are packed for decoding on a CPU, in 8 bits if that is asked for.

In 8 bits, weights are quantised once for each output, activations for each row as they come, both symmetric, so a row
does not depend on its batch mates (vector-wise quantisation: Dettmers et al. 2022, section 2,
https://arxiv.org/abs/2208.07339). Products of integers are exact, whatever the size of the batch.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli.kernels.matrix import Matrix, can_pack
from encdec_cli.models.linear import Linear
from encdec_cli.models.model import Model

LEVELS = 127
"""The largest 8-bit number in use; -128 has no opposite."""
_SMALLEST = 1e-20


@runtime_checkable
class Fusable(Protocol):
    """A module that can be computed as a whole once its matrices are packed."""

    def fuse(self) -> None:
        """Make ready for it, if there is a kernel."""


class PackedLinear(nn.Module):
    """A linear map by a matrix that was packed for it."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]."""
        return self.matrix.product(x)


class QuantisedLinear(nn.Module):
    """A linear map by a matrix of 8 bits, in floats, for processors and shapes that `Matrix` does not know.

    Args:
        levels: [outputs, inputs] int8.
        scales: [outputs], what one level of an output's weights stands for.
        bias: [outputs], or None.
    """

    def __init__(self, levels: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._levels = levels.float()
        self._scales = scales
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs], of x's type."""
        flat = x.reshape(-1, x.shape[-1])
        # In the type of x, so that the last product is one of equal types; the levels make good what it is rounded by.
        scale = flat.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST).div_(LEVELS)
        products = F.linear((flat.float() / scale.float()).round_(), self._levels)
        products = products.mul_(self._scales).to(x.dtype).mul_(scale)
        if self._bias is not None:
            products.add_(self._bias)
        return products.view(*x.shape[:-1], -1)


@torch.no_grad()
def quantised(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the map by weight [outputs, inputs], in 8 bits, and bias [outputs]."""
    scales = weight.float().abs().amax(1).clamp_(min=_SMALLEST).div_(LEVELS)
    levels = (weight.float() / scales[:, None]).round_().to(torch.int8)
    if can_pack(torch.int8, weight.shape[1]):
        return PackedLinear(Matrix(levels, bias, scales))
    return QuantisedLinear(levels, scales, bias)


def packed(model: Model) -> Model:
    """Return a copy of a model that is packed, or the model itself where that brings nothing."""
    if model.compiled or not _brings_something(model):
        return model
    copy = deepcopy(model)
    pack(copy)
    return copy


def pack(model: Model, int8: bool = False) -> None:
    """Pack the matrices of a model, the output layer among them, if it is on a CPU; then it can learn no more."""
    if not _brings_something(model, int8):
        return
    model.untie()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is not Linear:  # another class may compute something else
                continue
            if int8:
                setattr(module, name, quantised(child.weight, child.bias))
            elif can_pack(child.weight.dtype, child.weight.shape[1]):
                setattr(module, name, PackedLinear(Matrix(child.weight, child.bias)))
    for module in model.modules():
        if isinstance(module, Fusable):
            module.fuse()


def _brings_something(model: Model, int8: bool = False) -> bool:
    some = next(model.parameters())
    return some.device.type == "cpu" and (int8 or can_pack(some.dtype, 1 << 5))
