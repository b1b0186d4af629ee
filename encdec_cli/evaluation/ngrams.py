"""The n-grams of a few texts, counted once: what every two of them share, and what each shares with their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encdec_cli.evaluation.metrics import FloatArray

_BLOCK = 1 << 22
"""Counts held at once when every text is compared with every other."""
_EPSILON = 1e-16
"""What sacreBLEU's chrF puts in the place of a share of nothing."""


@dataclass(frozen=True)
class Grams:
    """How often each n-gram of one length stands in each text: an entry for each text and n-gram that it holds."""

    texts: int
    """How many texts there are."""
    text: NDArray[np.int64]
    """[entries]; which text."""
    gram: NDArray[np.int64]
    """[entries]; which n-gram, ascending."""
    count: FloatArray
    """[entries]"""

    def totals(self) -> FloatArray:
        """Return the n-grams of each text, [texts]."""
        return sums(self.text, self.count, self.texts)

    def shared(self) -> FloatArray:
        """Return the n-grams that every two texts share, each as often as both hold it, [texts, texts].

        The minimum of two counts is the number of levels 1, 2, … that both reach, and at one level the n-grams that
        both reach are a product of zeros and ones: a matrix product for each level instead of a loop over pairs.
        """
        result = np.zeros((self.texts, self.texts))
        different = int(self.gram.max(initial=-1)) + 1
        width = max(1, _BLOCK // max(1, self.texts))
        for start in range(0, different, width):
            end = min(start + width, different)
            part = slice(*np.searchsorted(self.gram, [start, end]))
            counts = np.zeros((self.texts, end - start), np.float32)
            counts[self.text[part], self.gram[part] - start] = self.count[part]
            level = 1
            while (counts := counts[:, (counts >= level).any(axis=0)]).size:
                reached = (counts >= level).astype(np.float32)
                result += reached @ reached.T
                level += 1
        return result

    def shared_with_mean(self, weights: FloatArray) -> FloatArray:
        """Return the n-grams that each text shares with the mean of all, [texts]. weights: [texts], sum 1."""
        mean = sums(self.gram, self.count * weights[self.text])
        return sums(self.text, np.minimum(self.count, mean[self.gram]), self.texts)


def sums(places: NDArray[np.int64], values: FloatArray, size: int = 0) -> FloatArray:
    """Return the sum of the values at each place, [size or more]. places, values: [n]."""
    return np.asarray(np.bincount(places, values, size), dtype=np.float64)


def count_grams(texts: Sequence[Sequence[str]], longest: int) -> list[Grams]:
    """Return the n-grams of 1 to `longest` characters or words. texts: their characters or words."""
    ids: dict[str, int] = {}
    symbols = np.array([ids.setdefault(symbol, len(ids)) for text in texts for symbol in text], dtype=np.int64)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    room = np.repeat(lengths.cumsum(), lengths) - np.arange(len(symbols))
    starts, grams = np.arange(len(symbols)), np.zeros(len(symbols), np.int64)
    found = []
    for length in range(1, longest + 1):
        inside = room[starts] >= length
        starts = starts[inside]
        # An n-gram is a shorter one and a symbol.
        grams = np.unique(grams[inside] * len(ids) + symbols[starts + length - 1], return_inverse=True)[1].reshape(-1)
        entries, counts = np.unique(grams * len(texts) + owner[starts], return_counts=True)
        found.append(Grams(len(texts), entries % len(texts), entries // len(texts), counts.astype(np.float64)))
    return found


def f_scores(matches: FloatArray, written: FloatArray, wanted: FloatArray, beta: int, smooth: bool) -> FloatArray:
    """Return sacreBLEU's chrF of many pairs of texts at once, in percent.

    Args:
        matches: [orders, …], the n-grams of each length that a pair shares.
        written: the same shape or one that broadcasts to it, those of the hypothesis.
        wanted: likewise, those of the reference.
        beta: how many times recall counts as much as precision.
        smooth: average F over all lengths, as chrF++.py does, instead of precision and recall over those in both.
    """
    written = np.where(wanted > 0, written, 0.0)
    precision, recall = _share(matches, written), _share(matches, wanted)
    factor = beta**2
    if smooth:
        each = _share((1 + factor) * precision * recall, factor * precision + recall)
        return np.asarray(100 * each.mean(axis=0))
    both = (written > 0) & (wanted > 0)
    orders = np.maximum(both.sum(axis=0), 1)
    precision, recall = (precision * both).sum(axis=0) / orders, (recall * both).sum(axis=0) / orders
    whole = factor * precision + recall
    return np.asarray(100 * (1 + factor) * precision * recall / np.where(whole > 0, whole, 1.0))


def _share(part: FloatArray, whole: FloatArray) -> FloatArray:
    """Return part / whole; epsilon where the whole is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), _EPSILON)
