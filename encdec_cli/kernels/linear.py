"""Linear maps in training on a CPU, and their gradients: products with matrices that are packed on the way.

Unlike oneDNN's, which are made anew for every new number of rows and kept, they are the same for all shapes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from encdec_cli.kernels.build import COLUMNS, function, panel
from encdec_cli.kernels.matrix import KINDS, Struct, alike, can_pack, shares, together
from encdec_cli.kernels.operators import operators as known_operators

_TILE = 32
"""Rows, and columns, that matrix units take at once."""


def can_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the operators take x [..., inputs], weight [outputs, inputs] and bias [outputs]."""
    if not alike(x, weight, bias) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.is_contiguous()):
        return False
    return can_pack(x.dtype, weight.shape[1]) and can_pack(x.dtype, weight.shape[0])


def operators() -> Any:
    """Return the operators of torch that map and differentiate.

    `linear(x, weight, bias)` maps x [..., inputs] by weight [outputs, inputs]; of its output's gradient `outer` [...,
    outputs], `linear_by_input(outer, weight)` makes that of x, and `linear_by_weight(outer, x)` those of weight and
    bias.
    """
    return known_operators(
        ("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _flops),
        ("linear_by_input(Tensor outer, Tensor weight) -> Tensor", _by_input, _flops),
        ("linear_by_weight(Tensor outer, Tensor x) -> (Tensor, Tensor)", _by_weight, _flops_by_weight),
    )


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * math.prod(weight) // x[-1]


def _flops_by_weight(outer: Sequence[int], x: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(outer) * x[-1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _by_rows(x, weight, bias, turned=False)


def _by_input(outer: Tensor, weight: Tensor) -> Tensor:
    return _by_rows(outer, weight, None, turned=True)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """Return x [..., inputs] times a matrix, given as [outputs, inputs] or (`turned`) as [inputs, outputs]."""
    x, weight = x.contiguous(), weight.contiguous()
    inputs, outputs = weight.shape if turned else (weight.shape[1], weight.shape[0])
    out, rows = x.new_empty((*x.shape[:-1], outputs)), x.numel() // inputs
    matrix, _kept = _room(x.dtype, inputs, outputs, bias is not None)
    places = (x.data_ptr(), rows, weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
    call, bf16 = partial(function("map_rows"), *places, ctypes.addressof(matrix)), x.dtype == torch.bfloat16
    together([partial(call, *part, turned, bf16) for part in shares(matrix.panels, rows * weight.numel())])
    return out


def _by_weight(outer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    outer, x = outer.reshape(-1, outer.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
    (rows, width), outputs, bf16 = outer.shape, x.shape[1], x.dtype == torch.bfloat16
    at_once = function("words_at_once")(bf16) * 4 // x.itemsize
    matrix, _kept = _room(x.dtype, min(_whole(rows, _TILE), at_once), outputs, False)
    kept = torch.empty(_whole(width, _TILE) * matrix.panels * panel() if rows > at_once else 0, dtype=torch.float32)
    parts = shares(matrix.panels, rows * width * outputs)
    sums = torch.zeros((len(parts), _whole(width, COLUMNS)), dtype=torch.float32)
    out = x.new_empty((width, outputs))
    given = (outer.data_ptr(), rows, width, x.data_ptr(), out.data_ptr())
    call, place = function("map_columns"), ctypes.addressof(matrix)
    to = [(own.data_ptr(), kept.data_ptr(), place, *part) for own, part in zip(sums, parts, strict=True)]
    together([partial(call, *given, *each, bf16) for each in to])
    return out, sums[0, :width].to(x.dtype)


def _whole(count: int, size: int) -> int:
    """Return how many there are if the last of those sizes is whole, too."""
    return -(-count // size) * size


def _room(dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> tuple[Struct, list[Tensor]]:
    """Return a matrix that is still to be packed, and the memory for it."""
    panels, depth = -(-outputs // panel()), -(-inputs * dtype.itemsize // 4)
    kept = [torch.empty(panels * depth * panel(), dtype=torch.int32)]
    if bias:
        kept.append(torch.empty(panels * panel(), dtype=torch.float32))
    places = dict(zip(("weights", "bias"), (one.data_ptr() for one in kept), strict=False))
    return Struct(kind=KINDS[dtype], depth=depth, outputs=outputs, panels=panels, **places), kept
