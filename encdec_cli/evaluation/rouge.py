"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum by the rouge-score package. https://aclanthology.org/W04-1013"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np

from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, Setting, option_pairs, setting_pairs

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile("[a-z0-9]", re.IGNORECASE)


@dataclass(kw_only=True)
class Rouge(Metric):
    """ROUGE F-measures: the mean over segments, each against its best reference, in percent."""

    stemmer: bool = False
    """Porter's stemmer, for English: `cats` then matches `cat`."""
    split: Literal["newline", "sentence", "punkt"] = "newline"
    """What separates sentences for rougeLsum: a newline, a blank after . ! or ?, or NLTK's punkt model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names that rouge-score uses."""
        return ("rouge1", "rouge2", "rougeL", "rougeLsum")

    @cached_property
    def scorer(self) -> RougeScorer:
        """rouge-score's object for these options."""
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  brings NLTK: half a second

        return RougeScorer(self.names, use_stemmer=self.stemmer, split_summaries=self.split == "punkt")

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return [segments, 5]: the four F-measures of each segment as fractions, and a one to count it."""
        divide: Callable[[str], str] = _sentences if self.split == "sentence" else str
        rows = []
        for hypothesis, *targets in zip(hypotheses, *references, strict=True):
            best = self._best([divide(target) for target in targets], divide(hypothesis))
            rows.append([*best, 1.0])
        return np.array(rows, dtype=np.float64)

    def _best(self, targets: list[str], hypothesis: str) -> list[float]:
        try:
            best = self.scorer.score_multi(targets, hypothesis)
        except LookupError as error:
            raise UsageError(
                "rouge: split=punkt needs NLTK's data, which is not installed (python -m nltk.downloader punkt_tab); "
                "split=sentence needs none."
            ) from error
        return [float(best[name].fmeasure) for name in self.names]

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the mean F-measures [samples, 4] in percent."""
        return np.asarray(100.0 * totals[:, :-1] / totals[:, -1:], dtype=np.float64)

    def signature(self, setting: Setting) -> str:
        """Return the options, what is averaged, and the version of rouge-score."""
        choices = ["measure:F1", *option_pairs(self), "average:segments"]
        return "|".join([*setting_pairs(setting), *choices, f"rouge-score:{version('rouge-score')}"])

    def explain(self) -> str:
        """Say what the four numbers are."""
        return (
            "ROUGE F1 in percent, mean over segments, best reference of each: shared words (rouge1), shared pairs of "
            "words (rouge2), longest common subsequence (rougeL), the same sentence by sentence (rougeLsum)"
        )

    def warnings(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Warn if rouge-score, which sees a-z and 0-9 only, is blind to the references."""
        lines = [line for stream in references for line in stream if line.strip()]
        blind = sum(_WORD.search(line) is None for line in lines)
        if 10 * blind <= len(lines):
            return []
        return [
            f"rouge-score sees only the letters a-z and digits, and {blind} of {len(lines)} references have none; "
            "use chrf for this language."
        ]


def _sentences(text: str) -> str:
    return _SENTENCE_END.sub("\n", text)
