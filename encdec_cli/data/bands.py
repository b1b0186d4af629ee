"""Examples in an order in which neighbours have like lengths on both sides, and the batches that are cut from it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.integer]

_WIDEST = 24
"""Target lengths of one band."""
_MOST = 40
"""Batches of one band: more of a single length have hardly any padding."""


def by_length(source: Lengths, target: Lengths, tokens: int) -> Ints:
    """Return examples in the order that leaves little padding when batches are cut from it.

    Target lengths fall into bands, those with the least padding (a shortest path over where they end); within a band
    examples are sorted by source length, upwards and downwards in turn, so that a batch across two bands holds only
    long sources or only short ones. Equally long examples stand together.

    Args:
        source: tokens of each source with EOS, `[examples]`.
        target: likewise.
        tokens: the budget of a batch.
    """
    band = np.searchsorted(_bands(source, target, tokens), target, side="right")
    rising = np.where(band % 2 == 0, source, -source)
    return np.lexsort((np.where((band + source) % 2 == 0, target, -target), rising, band))


def cut(longest: Lengths, tokens: int) -> Ints:
    """Return where each batch begins, and the end: rows x the longest side in it never exceed the budget.

    longest: the longer side of each example, `[examples]`. A loop over batches only.
    """
    cuts, begin = [0], 0
    while begin < len(longest):
        ahead = np.maximum.accumulate(longest[begin : begin + tokens // int(longest[begin])])
        begin += int(np.searchsorted(ahead * np.arange(1, len(ahead) + 1), tokens, side="right"))
        cuts.append(begin)
    return np.array(cuts, dtype=np.int64)


def _bands(source: Lengths, target: Lengths, tokens: int) -> Ints:
    """Return at which target length each band but the first begins."""
    order = np.lexsort((source, target))
    source, target = source[order], target[order]
    lengths, starts = np.unique(target, return_index=True)
    ends = [*starts.tolist(), len(target)]
    least, begins = [0, *[-1] * len(lengths)], [0] * (len(lengths) + 1)  # padding up to a length; its band's first
    for first in range(len(lengths)):
        for last in range(first + 1, min(len(lengths), first + _WIDEST) + 1):
            some = slice(ends[first], ends[last])
            much = (some.stop - some.start) * int(lengths[last - 1]) > _MOST * tokens
            if much and last > first + 1:
                break
            found = least[first] + (0 if much else _padding(source[some], target[some], tokens))
            if least[last] < 0 or found < least[last]:
                least[last], begins[last] = found, first
    bands, last = [], len(lengths)
    while begins[last]:
        last = begins[last]
        bands.append(int(lengths[last]))
    return np.array(bands[::-1], dtype=np.int64)


def _padding(source: Lengths, target: Lengths, tokens: int) -> int:
    """Return the padding of one band."""
    order = np.argsort(source, kind="stable")
    sides = source[order], target[order]
    cuts = cut(np.maximum(*sides), tokens)
    return int(sum((np.diff(cuts) * np.maximum.reduceat(side, cuts[:-1])).sum() - side.sum() for side in sides))
