"""Exact match, token F1 and distinct-n: metrics that need nothing but the texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(kw_only=True)
class Exact(Metric):
    """The share of hypotheses that equal one of their references, in percent."""

    lowercase: bool = False
    strip: bool = True
    """Ignore blanks at both ends."""

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return ("exact",)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return [segments, 2]: one for a match, and a one to count the segment."""
        rows = []
        for hypothesis, *targets in zip(hypotheses, *references, strict=True):
            plain = self._plain(hypothesis)
            rows.append([float(any(plain == self._plain(target) for target in targets)), 1.0])
        return np.array(rows, dtype=np.float64)

    def _plain(self, text: str) -> str:
        text = text.lower() if self.lowercase else text
        return text.strip() if self.strip else text

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the share of matches [samples, 1] in percent."""
        return _mean_percent(totals)

    def explain(self) -> str:
        """Say what the number is."""
        return "hypotheses that equal one of their references, in percent"


@dataclass(kw_only=True)
class TokenF1(Metric):
    """F1 of the bags of whitespace tokens, as for SQuAD. https://aclanthology.org/D16-1264"""

    lowercase: bool = False
    normalize: bool = False
    """SQuAD's own: lowercase, without punctuation and the words a, an, the."""

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return ("f1",)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return [segments, 2]: the F1 with the best reference as a fraction, and a one to count the segment."""
        rows = []
        for hypothesis, *targets in zip(hypotheses, *references, strict=True):
            written = self._tokens(hypothesis)
            rows.append([max(_f1(written, self._tokens(target)) for target in targets), 1.0])
        return np.array(rows, dtype=np.float64)

    def _tokens(self, text: str) -> list[str]:
        if self.normalize:
            text = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))
        return (text.lower() if self.lowercase else text).split()

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the mean F1 [samples, 1] in percent."""
        return _mean_percent(totals)

    def explain(self) -> str:
        """Say what the number is."""
        return "F1 in percent of the tokens shared with the best reference, whatever their order; mean over segments"


def _f1(hypothesis: list[str], reference: list[str]) -> float:
    if not hypothesis or not reference:
        return float(hypothesis == reference)
    shared = (Counter(hypothesis) & Counter(reference)).total()
    return 2 * shared / (len(hypothesis) + len(reference))


def _mean_percent(totals: FloatArray) -> FloatArray:
    return np.asarray(100.0 * totals[:, :1] / totals[:, 1:], dtype=np.float64)


@dataclass(kw_only=True)
class Distinct(Metric):
    """How varied the output is: different n-grams among all n-grams. https://aclanthology.org/N16-1014"""

    no_resampling: ClassVar[str] = (
        "distinct-n has no interval and no test: a resample holds segments twice, "
        "so that it always has fewer different n-grams than the text itself."
    )

    orders: int = 2
    """Give distinct-1 to distinct-n."""
    lowercase: bool = False

    def __post_init__(self) -> None:
        if self.orders < 1:
            raise UsageError(f"distinct: orders is {self.orders}; it must be at least 1.")

    @property
    def names(self) -> tuple[str, ...]:
        """distinct-1, distinct-2, …"""
        return tuple(f"distinct-{order}" for order in range(1, self.orders + 1))

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return [segments, 2 * orders]: for each order the n-grams seen here first, and all n-grams here."""
        seen: set[tuple[str, ...]] = set()
        rows = []
        for hypothesis in hypotheses:
            tokens = (hypothesis.lower() if self.lowercase else hypothesis).split()
            row = []
            for order in range(1, self.orders + 1):
                found = [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]
                row += [len(set(found) - seen), len(found)]
                seen.update(found)
            rows.append(row)
        return np.array(rows, dtype=np.float64)

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the shares [samples, orders] in percent; 0 where there is no n-gram at all."""
        different, every = totals[:, 0::2], totals[:, 1::2]
        return np.asarray(100.0 * different / np.maximum(every, 1.0), dtype=np.float64)

    def explain(self) -> str:
        """Say what the numbers are."""
        return "different n-grams of whitespace tokens in percent of all n-grams of the output; needs no reference"
