"""The parts of a joined map, such as queries, keys and values, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_heads(joined: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Return the parts of joined [rows, len, parts x heads x head_dim], [rows, heads, len, head_dim] each."""
    if torch.is_grad_enabled() and joined.requires_grad and not torch.compiler.is_compiling():
        split: tuple[Tensor, ...] = _Split.apply(joined, parts, heads)  # type: ignore[no-untyped-call]
        return split
    return _parts(joined, parts, heads)


def _parts(joined: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    rows, length, _ = joined.shape
    return joined.view(rows, length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class _Split(torch.autograd.Function):
    """Views, whose gradients are not copied where they already stand side by side, as those of our kernel do."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
        ctx.shape = joined.shape
        return _parts(joined, parts, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        whole = _side_by_side(outer)
        if whole is None:
            whole = torch.stack(outer).permute(1, 3, 0, 2, 4).reshape(ctx.shape)
        return whole, None, None


def _side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Return what the parts, [rows, heads, len, head_dim] each, are the parts of; None if they stand elsewhere."""
    rows, heads, length, width = parts[0].shape
    part, whole = heads * width, len(parts) * heads * width
    start, memory = parts[0].storage_offset(), parts[0].untyped_storage()._cdata
    for number, one in enumerate(parts):
        if one.untyped_storage()._cdata != memory or one.storage_offset() != start + number * part:
            return None
        if one.stride() != (length * whole, width, whole, 1):
            return None
    return parts[0].as_strided((rows, length, whole), (length * whole, whole, 1))
