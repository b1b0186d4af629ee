"""What looks wrong with an output: a loop, an odd length, a copy of the source. Cheap, and with few false alarms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.coverage import low_coverage
from encdec_cli.generation.lines import Generated

REPEATED = 8
"""Tokens of a loop that only repeat others."""
TIMES = 3
"""How often at least a loop says the same."""
RARE = 0.001
"""Share of the training pairs that have a shorter target for their source than is usual, and as many a longer one."""
STEADY = 10
"""Added to both lengths before they are divided: the ratio of short sentences scatters widely."""
GRAM = 8
"""Characters of the pieces in which source and output are compared."""
COPIED = 0.8
"""Share of the source's pieces that a copy holds."""
LETTERS = 30
"""Letters of the shortest source that can be copied; names and numbers may well stay what they are."""


def has_loop(tokens: Sequence[int]) -> bool:
    """Tell whether a sequence is written TIMES times or more in a row, so that REPEATED tokens or more only repeat."""
    if len(tokens) - len(set(tokens)) < REPEATED:
        return False
    ids = np.asarray(tokens)
    for period in range(1, len(tokens) // TIMES + 1):
        same = ids[period:] == ids[:-period]
        enough = max(REPEATED, (TIMES - 1) * period)
        if np.count_nonzero(same) >= enough and _longest_run(same) >= enough:
            return True
    return False


def _longest_run(true: npt.NDArray[np.bool_]) -> int:
    """Return the length of the longest stretch of True."""
    ends = np.flatnonzero(~np.concatenate(([False], true, [False])))
    return int(np.diff(ends).max()) - 1


def usual_ratios(sources: npt.NDArray[np.integer], targets: npt.NDArray[np.integer]) -> list[float]:
    """Return the bounds between which the ratio of lengths lies but for RARE of the pairs on each side.

    sources, targets: [pairs], tokens without EOS. A ratio is (target + STEADY) / (source + STEADY).
    """
    ratios = (targets.astype(np.float64) + STEADY) / (sources.astype(np.float64) + STEADY)
    return [float(bound) for bound in np.quantile(ratios, (RARE, 1 - RARE), method="inverted_cdf")]


def is_copy(source: str, output: str) -> bool:
    """Tell whether an output holds COPIED of the source's pieces of GRAM characters, whatever their case and spaces."""
    source, output = (" ".join(text.casefold().split()) for text in (source, output))
    if sum(map(str.isalpha, source)) < LETTERS:
        return False
    pieces = {source[i : i + GRAM] for i in range(len(source) - GRAM + 1)}
    return sum(piece in output for piece in pieces) >= COPIED * len(pieces)


def _loop(bundle: Bundle, result: Generated) -> bool:
    return has_loop(result.candidates[0].tokens) and not has_loop(result.source)


def _length(bundle: Bundle, result: Generated) -> bool:
    usual = bundle.facts.get("length_ratios")
    ratio = (len(result.candidates[0].tokens) + STEADY) / (len(result.source) + STEADY)
    return usual is not None and not usual[0] <= ratio <= usual[1]


def _copy(bundle: Bundle, result: Generated) -> bool:
    return not bundle.task.may_copy() and is_copy(result.example.source, result.candidates[0].text)


def _coverage(bundle: Bundle, result: Generated) -> bool:
    unread = result.candidates[0].unread
    return unread is not None and low_coverage(unread)


FLAGS: dict[str, Callable[[Bundle, Generated], bool]] = {
    "loop": _loop,
    "length": _length,
    "copy": _copy,
    "coverage": _coverage,
}
"""Every flag by its name in a record; `coverage` costs another pass of the model, and is looked for where asked for."""


def flags(bundle: Bundle, result: Generated) -> list[str]:
    """Return the flags that hold for the best output of a line."""
    return [name for name, holds in FLAGS.items() if result.candidates and holds(bundle, result)]
