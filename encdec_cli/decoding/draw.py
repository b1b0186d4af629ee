"""Random draws that are pure functions of what they are for: no generator, no order, no state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the stride of splitmix64."""


def signed(number: int) -> int:
    """Return the number modulo 2^64 as an int64 holds it."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def mix(numbers: Tensor) -> Tensor:
    """Scatter the bits of int64 numbers: the last part of splitmix64 (https://doi.org/10.1145/2714064.2660195)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ _shifted(numbers, shift)) * signed(factor)
    return numbers ^ _shifted(numbers, 31)


def streams(seed: int, keys: Sequence[int], samples: int, device: torch.device) -> Tensor:
    """Return one stream of numbers for each sample of each key: [keys x samples] int64, samples together."""
    start = mix(torch.tensor([signed(seed)], device=device) + signed(GOLDEN))
    lines = mix(start ^ torch.tensor([signed(key) for key in keys], dtype=torch.int64, device=device))
    return mix(lines[:, None] + torch.arange(1, samples + 1, device=device) * signed(GOLDEN)).flatten()


def uniform(numbers: Tensor, step: int) -> Tensor:
    """Return a number in [0, 1) for each stream at a step. numbers: [n] int64; returns [n] float64."""
    return _shifted(mix(numbers + signed(GOLDEN * (step + 1))), 11).double() * 2.0**-53


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Return a place in each row, by its weight: where the cumulated weights pass the number's share of them.

    weights: [rows, n], not negative; numbers: [rows] in [0, 1). Returns [rows, 1] int64; a place of weight 0
    only where all are 0.
    """
    mass = weights.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:].contiguous()
    place = torch.searchsorted(mass, numbers[:, None] * total, right=True)
    # Rounding may put the number at the very end, where weights may be 0.
    return torch.minimum(place, torch.searchsorted(mass, total))


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers right as if they were unsigned."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
