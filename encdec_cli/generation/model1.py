"""IBM Model 1: which words of two languages belong together, learned from pairs of sentences alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ROUNDS = 5
"""Of expectation-maximisation; as many as Model 1 is usually given."""
_NULL = 0
"""Stands before every source, for target tokens that come from none of its tokens; PAD is in no sentence."""

Floats = npt.NDArray[np.float64]


def posteriors(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[Floats]:
    """Return for each pair of sentences, [tgt_len, src_len], how likely each source token made each target token.

    Brown et al. 1993, section 4.1 (https://aclanthology.org/J93-2003). A row sums to at most 1: what is missing is
    the chance of no source token. There must be at least one pair, and no empty sentence.
    """
    size = 1 + max(map(max, targets))
    # One cell for each pair of a source and a target token that stand in one pair of sentences.
    lengths = np.array([len(target) for target in targets])
    widths = np.array([1 + len(source) for source in sources])
    made_by = np.concatenate([np.tile([_NULL, *source], n) for source, n in zip(sources, lengths, strict=True)])
    made = np.repeat(np.concatenate([np.asarray(target) for target in targets]), np.repeat(widths, lengths))
    place = np.repeat(np.arange(lengths.sum()), np.repeat(widths, lengths))
    kinds, kind = np.unique(made_by * size + made, return_inverse=True)
    owner = kinds // size
    chance = np.ones(len(kinds))
    for _ in range(ROUNDS):
        counts = np.bincount(kind, _shares(chance[kind], place))
        chance = counts / np.bincount(owner, counts)[owner]
    cells = np.split(_shares(chance[kind], place), np.cumsum(lengths * widths)[:-1])
    return [part.reshape(n, width)[:, 1:] for part, n, width in zip(cells, lengths, widths, strict=True)]


def _shares(weights: Floats, place: npt.NDArray[np.int64]) -> Floats:
    """Return the weights, so that those of one place sum to 1."""
    return np.asarray(weights / np.bincount(place, weights)[place])
