"""Dropout that costs little on a CPU (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from encdec_cli import kernels
from encdec_cli.kernels.dropout import draw, dropped
from encdec_cli.models.parts import Part

LANES = 2**15
"""Each element draws 15 random bits: keep probabilities are multiples of 1 / LANES."""

_STREAM = 0x9E3779B97F4A7C1
"""How far apart the seeds of two parts are on a GPU; those of micro-batches are neighbours."""

_generator: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Let dropout on a CPU follow from `seed`, in this thread alone."""
    token = _generator.set(torch.Generator().manual_seed(seed))
    try:
        yield
    finally:
        _generator.reset(token)


def repeatable(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Note where the random numbers of this thread stand; in a block of what is returned they come once more."""
    ours = _generator.get()
    state = None if ours is None else ours.get_state()
    general = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again() -> Iterator[None]:
        token = _generator.set(None if state is None else torch.Generator().set_state(state))
        try:
            with torch.random.fork_rng([] if on_device is None else [device]):
                torch.set_rng_state(general)
                if on_device is not None:
                    torch.cuda.set_rng_state(on_device, device)
                yield
        finally:
            _generator.reset(token)

    return again


def keep_probability(p: float, dtype: torch.dtype) -> tuple[int, float]:
    """Return how many of the LANES values keep an element, and the factor of what is kept.

    The factor is a number that `dtype` can hold, and the threshold follows it, so that the expectation is exact
    to 1 / LANES even in bf16 (where 1 / 0.9 becomes 1.109375, which is exact for p = 0.0986).
    """
    factor = float(torch.tensor(1 / (1 - p), dtype=dtype))
    kept = min(LANES - 1, max(1, round(LANES / factor)))
    return kept, factor


def _words(count: int) -> Tensor:
    """Return random words for so many elements: a lane of 16 bits each, whose lowest 15 are used."""
    return draw((count + 3) // 4, _generator.get())


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor of `shape` with the factor where an element is kept and 0 where it is dropped."""
    # Measured on Zen 4, forward + backward of a million elements, one thread: F.dropout 10.2 ms in either dtype,
    # this 2.9 ms in bf16 and 4.4 ms in fp32. Four elements share one draw, and integer arithmetic on 16-bit lanes
    # avoids booleans, whose comparison and conversion cost more than the random numbers.
    kept, factor = keep_probability(p, dtype)
    count = shape.numel()
    lanes = _words(count).view(torch.int16)[:count]
    lanes.bitwise_and_(LANES - 1).sub_(kept).bitwise_right_shift_(15)  # all ones where kept, zero where dropped
    if dtype.itemsize == 2:
        bits = int(torch.tensor(factor, dtype=dtype).view(torch.int16))
        return lanes.bitwise_and_(bits).view(dtype).view(shape)
    if dtype == torch.float32:
        bits = int(torch.tensor(factor, dtype=dtype).view(torch.int32))
        return lanes.to(torch.int32).bitwise_and_(bits).view(dtype).view(shape)
    return lanes.to(dtype).mul_(-factor).view(shape)


def dropout(x: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """Zero each element with probability `p` and scale the rest up; the draw follows `drawing`, else torch's seed.

    onto: what the result is added to, of the shape of x.
    """
    if p == 0:
        return x if onto is None else onto + x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # which has random numbers of its own
        found = F.dropout(x, p)
    elif kernels.learnable(x, onto) and (onto is None or onto.shape == x.shape):
        return _Dropout.apply(x, p, onto)  # type: ignore[no-untyped-call, no-any-return]
    else:
        found = x * keep_mask(x.shape, p, x.dtype)
    return found if onto is None else onto + found


class _Dropout(torch.autograd.Function):
    """The same by a kernel, bit by bit: what is kept for the gradient are the random words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, onto: Tensor | None) -> Tensor:
        words, ctx.how = _words(x.numel()), keep_probability(p, x.dtype)
        ctx.save_for_backward(words)
        return dropped(x, words, ctx.how, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (words,) = ctx.saved_tensors
        by_x, _, by_onto = ctx.needs_input_grad
        inner = dropped(outer.contiguous(), words, ctx.how) if by_x else None
        return inner, None, outer if by_onto else None


def dropout_of_part(x: Tensor, p: float, part: Part | None, dim: int) -> Tensor:
    """Drop elements of one of the equal parts along `dim` that processes share; None: of all.

    On a CPU the draw is that of one process for this part of the whole; on a GPU it is one of its own.
    """
    if p == 0 or part is None:
        return dropout(x, p)
    if x.device.type != "cpu":
        with apart(part, x.device):
            return F.dropout(x, p)
    size, shape = x.shape[dim], list(x.shape)
    shape[dim] *= part.places
    return x * keep_mask(torch.Size(shape), p, x.dtype).narrow(dim, part.place * size, size)


@contextmanager
def apart(part: Part | None, device: torch.device) -> Iterator[None]:
    """Let a GPU draw other numbers for each part inside the block, and after it go on with the same for all."""
    if part is None or device.type != "cuda":
        yield
        return
    # Seed and offset, eight bytes each: every part draws as many numbers.
    before = torch.cuda.get_rng_state(device)
    own = before.clone()
    own.view(torch.int64)[0] += part.place * _STREAM % (1 << 62)
    torch.cuda.set_rng_state(own, device)
    yield
    after = torch.cuda.get_rng_state(device)
    after.view(torch.int64)[0] = before.view(torch.int64)[0]
    torch.cuda.set_rng_state(after, device)


class Dropout(nn.Module):
    """Dropout while training, nothing otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.part: Part | None = None
        """Which of the columns these are, if processes share them."""

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `x`, with elements dropped if this module is in training mode, added to `onto` if that is given."""
        p = self.p if self.training else 0.0
        if self.part is None:
            return dropout(x, p, onto)
        found = dropout_of_part(x, p, self.part, -1)
        return found if onto is None else onto + found
