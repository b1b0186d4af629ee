"""The random numbers of dropout, and dropout itself in one pass, with the addition that follows it; see `dropout.c`."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from encdec_cli.kernels import library
from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import shares, together

_COST = 8
"""What an element costs, in multiplications of a product."""
_BLOCK = 64
"""Threads have whole blocks of elements."""


def draw(count: int, generator: torch.Generator | None) -> Tensor:
    """Return what `random_` makes of a tensor of int64 [count], and leave the generator (None: torch's) as it does."""
    words = torch.empty(count, dtype=torch.int64)
    if generator is None or not _knows_torch():
        return words.random_(generator=generator)
    return _drawn(words, generator)


def _drawn(words: Tensor, generator: torch.Generator) -> Tensor:
    state = generator.get_state()
    function("draw")(state.data_ptr(), words.data_ptr(), len(words))
    generator.set_state(state)
    return words


@cache
def _knows_torch() -> bool:
    """Return whether the generator of this torch is the one that the kernel knows."""
    ours, its = (torch.Generator().manual_seed(1) for _ in range(2))
    if library() is None or ours.get_state().numel() != 5056:  # bytes
        return False
    words, more = torch.empty(700, dtype=torch.int64).random_(generator=its), torch.empty(3, dtype=torch.int64)
    alike = torch.equal(_drawn(torch.empty_like(words), ours), words)
    return alike and torch.equal(more.random_(generator=its), torch.empty_like(more).random_(generator=ours))


def dropped(x: Tensor, words: Tensor, how: tuple[int, float], added: Tensor | None = None) -> Tensor:
    """Return x times a factor where the lowest 15 bits of an element's 16 are below a threshold, else 0, plus `added`.

    Each operation is rounded, as torch does it.

    Args:
        x: float32 or bfloat16, dense, on a CPU.
        words: int64, of 4 elements each.
        how: threshold and factor.
        added: of the shape and type of x, dense.
    """
    out, size = torch.empty_like(x), x.element_size()
    calls = []
    for first, last in shares(-(-x.numel() // _BLOCK), _COST * x.numel()):
        start, end = first * _BLOCK, min(last * _BLOCK, x.numel())
        more = None if added is None else added.data_ptr() + start * size
        places = (x.data_ptr() + start * size, words.data_ptr() + start * 2, more, end - start)
        rest = (*how, -1, out.data_ptr() + start * size, x.dtype == torch.bfloat16)
        calls.append(partial(function("dropout"), *places, *rest))
    together(calls)
    return out
