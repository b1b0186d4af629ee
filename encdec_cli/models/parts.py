"""Tensor parallelism: every layer shared out over processes, each of which computes some heads and inner columns.

Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3: an attention and a feed-forward are two linear maps
with something between them that knows nothing of other heads or columns. Of the first map each process has some
outputs, of the second the inputs that belong to them, and the sum over the processes is what one would compute.
Whatever stands between the layers is the same in all of them, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from encdec_cli.errors import UsageError
from encdec_cli.models.linear import Linear, linear
from encdec_cli.models.model import Model

Span = tuple[int, int]
"""Begin and end of some rows or columns."""


def held(tensor: Any) -> Tensor:
    """Return what this process has in memory of a tensor: its own rows, if it is shared out, else all of it."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor takes seconds to import
    return own


@dataclass(frozen=True)
class Piece:
    """Which numbers of a tensor a process has: those whose index lies, in each dimension, in one of its spans."""

    shape: tuple[int, ...]
    """Of the whole."""
    spans: tuple[tuple[Span, ...], ...]
    """For each dimension, in the order in which the process has them."""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Piece:
        """Return all of a tensor."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of what the process has."""
        return tuple(sum(end - begin for begin, end in spans) for spans in self.spans)

    def narrow(self, dim: int, begin: int, end: int) -> Piece:
        """Return what is left of the piece when it is cut to `begin … end - 1` of its own rows, or columns."""
        kept, start = [], 0
        for first, last in self.spans[dim]:
            low, high = max(begin - start, 0), min(end - start, last - first)
            if low < high:
                kept.append((first + low, first + high))
            start += last - first
        return Piece(self.shape, (*self.spans[:dim], tuple(kept), *self.spans[dim + 1 :]))

    def of_means(self, size: Sequence[int]) -> Piece:
        """Return the piece of what has one row, or column, where the process has `size` and the tensor more."""
        means = [one == 1 != own for one, own in zip(size, self.size, strict=True)]
        shape = tuple(1 if mean else one for mean, one in zip(means, self.shape, strict=True))
        return Piece(shape, tuple(((0, 1),) if mean else own for mean, own in zip(means, self.spans, strict=True)))

    def overlaps(self, other: Piece) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield where the numbers stand that both pieces have: in the other one, and in this."""
        pairs = zip(other.spans, self.spans, strict=True)
        for found in product(*(list(_common(theirs, own)) for theirs, own in pairs)):
            yield tuple(there for there, _ in found), tuple(here for _, here in found)


def _common(one: Sequence[Span], other: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """Yield where what both have stands, counted in the spans of each."""
    before = 0
    for begin, end in one:
        already = 0
        for first, last in other:
            low, high = max(begin, first), min(end, last)
            if low < high:
                yield (
                    slice(before + low - begin, before + high - begin),
                    slice(already + low - first, already + high - first),
                )
            already += last - first
        before += end - begin


@dataclass(frozen=True)
class Part:
    """The place of a process among those that share every layer."""

    place: int
    places: int
    add: Callable[[Tensor], object]
    """Replaces a tensor by its sum over all of them, who ask for the same sums in the same order."""

    def of(self, size: int, what: str) -> int:
        """Return an equal share. Raises UsageError if there is none."""
        if size % self.places:
            raise UsageError(
                f"parallel.tensor: {self.places} processes cannot share {size} {what} equally; choose a number that "
                f"divides {size}."
            )
        return size // self.places


@dataclass(frozen=True)
class Cut:
    """How a tensor is shared out: each of some equal blocks of a dimension into equal parts, one for each process."""

    dim: int
    blocks: int = 1
    """Such as 3 where queries, keys and values of all heads stand one after the other."""

    def of(self, whole: Tensor, part: Part) -> Tensor:
        """Return the part of a process, a copy."""
        blocks = torch.unflatten(whole, self.dim, (self.blocks, part.places, -1)).select(self.dim + 1, part.place)
        return blocks.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole of the parts of all processes."""
        blocks = [torch.unflatten(part, self.dim, (self.blocks, -1)) for part in parts]
        return torch.stack(blocks, self.dim + 1).flatten(self.dim, self.dim + 2)

    def piece(self, size: Sequence[int], part: Part) -> Piece:
        """Return which numbers of the whole a process has, whose part is of this size."""
        width, shape = size[self.dim] // self.blocks, list(size)
        shape[self.dim] *= part.places
        starts = [(block * part.places + part.place) * width for block in range(self.blocks)]
        spans = [((0, size),) for size in shape]
        return Piece(
            tuple(shape),
            (*spans[: self.dim], tuple((start, start + width) for start in starts), *spans[self.dim + 1 :]),
        )


@runtime_checkable
class Divisible(Protocol):
    """A module that can become a part of itself."""

    def divide(self, part: Part) -> None:
        """Keep what a process computes at its place, by a `ColumnParallelLinear` and the `RowParallelLinear` after it.

        Raises UsageError where the sizes cannot be shared.
        """


class ColumnParallelLinear(Linear):
    """Some outputs of a linear map, for the whole input, whose gradient is then the sum over all processes.

    Args:
        whole: the map, which is left alone.
        part: the place of this process.
        blocks: see `Cut`.
    """

    def __init__(self, whole: Linear, part: Part, blocks: int = 1) -> None:
        nn.Module.__init__(self)
        self.part = part
        cut = Cut(0, blocks)
        self.weight = _cut(whole.weight, cut, part)
        self.bias = None if whole.bias is None else _cut(whole.bias, cut, part)
        self.cuts = {name: cut for name, _ in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs], the same in all processes, to this process's [..., outputs / places]."""
        copied: Tensor = _Copy.apply(x, self.part)  # type: ignore[no-untyped-call]
        return linear(copied, self.weight, self.bias)


class RowParallelLinear(Linear):
    """A linear map of whose inputs each process has some, summed over all processes; the bias is added once."""

    def __init__(self, whole: Linear, part: Part) -> None:
        nn.Module.__init__(self)
        self.part = part
        self.cuts = {"weight": Cut(1)}
        self.weight = _cut(whole.weight, self.cuts["weight"], part)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map this process's x [..., inputs / places] to [..., outputs], the same in all processes."""
        total: Tensor = _Reduce.apply(linear(x, self.weight), self.part)  # type: ignore[no-untyped-call]
        return total if self.bias is None else total + self.bias


class _Copy(torch.autograd.Function):
    """The paper's f: the same forwards, a sum backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        total = outer.clone(memory_format=torch.contiguous_format)
        ctx.part.add(total)
        return total, None


class _Reduce(torch.autograd.Function):
    """The paper's g: a sum forwards, the same backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        part.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return outer, None


def _cut(whole: Tensor, cut: Cut, part: Part) -> nn.Parameter:
    own = cut.of(whole.detach(), part)
    return nn.Parameter(own, requires_grad=whole.requires_grad)


def divide(model: Model, part: Part) -> None:
    """Leave a model what a process computes of it. Raises UsageError where it cannot be shared."""
    check_can_divide(type(model))
    for module in list(model.modules()):
        if isinstance(module, Divisible):
            module.divide(part)


def check_can_divide(kind: type[Model]) -> None:
    """Raise UsageError if a model does not say how it is shared out."""
    if not kind.can_divide:
        raise UsageError(
            f"parallel.tensor: this model ({kind.__name__}) does not say how its layers are shared out "
            "(Model.can_divide); set it to 1."
        )


def parts_of(model: nn.Module) -> dict[str, tuple[Cut, Part]]:
    """Return by name the parameters of which this process has a part; none if nothing is divided."""
    return {
        f"{name}.{own}": (cut, module.part)
        for name, module in model.named_modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        for own, cut in module.cuts.items()
    }
