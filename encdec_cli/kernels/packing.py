"""Sequences of different lengths one after the other, without padding between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of some rows stand, in a padded batch and packed."""

    mask: Tensor
    """[rows, len], True for the first tokens of each row, at least one."""
    _found: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row, [rows] int64."""
        return self.mask.sum(1)

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins when they are packed, and the end, [rows + 1] int64."""
        return torch.cat((self.lengths.new_zeros(1), self.lengths.cumsum(0)))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @cached_property
    def places(self) -> Tensor:
        """Where each token stands in the flat padded batch, [tokens] int64."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def positions(self) -> Tensor:
        """Where each token stands in its row, [tokens] int64."""
        return self.places % self.mask.shape[1]

    def of_positions(self, table: Tensor) -> Tensor:
        """Return of table [positions, ...] what belongs to each token, [tokens, ...]; the same for the same table."""
        known = self._found.get(table.data_ptr())
        if known is None:
            known = self._found[table.data_ptr()] = table[self.positions]
        return known

    def pack(self, x: Tensor) -> Tensor:
        """Return the tokens of x [rows, len, ...] as one row, [1, tokens, ...]."""
        packed: Tensor = _Pack.apply(x.flatten(0, 1), self.places)  # type: ignore[no-untyped-call]
        return packed[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Return x [1, tokens, ...] as [rows, len, ...], with zeros for padding."""
        flat: Tensor = _Unpack.apply(x[0], self.places, self.mask.numel())  # type: ignore[no-untyped-call]
        return flat.view(*self.mask.shape, *x.shape[2:])


@dataclass(frozen=True, eq=False)
class Packing:
    """Which packed queries attend to which packed keys: those of a row to those of the same row."""

    queries: Rows
    keys: Rows

    @cached_property
    def sizes(self) -> list[int]:
        """How many pairs of a query and a key of its row there are, and most queries and keys of a row."""
        return [int(self.queries.lengths @ self.keys.lengths), self.queries.longest, self.keys.longest]

    @cached_property
    def among_queries(self) -> Packing:
        """The queries as keys of their own."""
        return Packing(self.queries, self.queries)


def _spread(x: Tensor, places: Tensor, count: int) -> Tensor:
    flat = x.new_zeros((count, *x.shape[1:]))
    flat[places] = x
    return flat


class _Pack(torch.autograd.Function):
    """`index_select`, whose gradient torch would add up one row after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _spread(outer, places, ctx.count), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return _spread(x, places, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return outer.index_select(0, places), None, None
