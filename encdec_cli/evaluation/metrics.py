"""What a metric is: statistics of each segment that add up, and numbers computed from their sum.

Because the statistics of segments add up, one definition serves the score, its bootstrap interval and both
paired tests (encdec_cli.evaluation.significance).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from encdec_cli import __version__
from encdec_cli.errors import DataError, UsageError
from encdec_cli.text.lines import suspicious_row

FloatArray = NDArray[np.floating]
"""Statistics [segments, k], their sums [samples, k], or scores [samples, numbers]."""

_EXCERPT = 40


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a signature tells besides the metric's own options."""

    references: int
    """Reference streams."""
    resamples: int = 0
    """Bootstrap resamples behind the interval (and behind the paired bootstrap); 0 if there is none."""
    trials: int = 0
    """Trials of the paired approximate randomization test; 0 if it was not run."""
    seed: int | None = None
    """Seed of either; None if neither was run."""


@dataclass(kw_only=True)
class Metric(ABC):
    """A metric: a dataclass whose fields are its options, as in `--metric bleu,tokenize=zh`."""

    higher_is_better: ClassVar[bool] = True
    """Whether a larger number means a better output."""
    needs_model: ClassVar[bool] = False
    """Whether the statistics come from the model's probabilities instead of from its output."""
    no_resampling: ClassVar[str] = ""
    """Why segments cannot be resampled, as a sentence; empty if they can be."""
    as_sacrebleu: ClassVar[bool] = False
    """Whether intervals and p-values follow sacreBLEU to the digit (see significance.py)."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the numbers that this metric gives."""

    @abstractmethod
    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return the statistics [segments, k] of hypotheses against one sequence of references per stream."""

    @abstractmethod
    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the numbers [samples, numbers] that belong to sums of statistics [samples, k]."""

    @abstractmethod
    def explain(self) -> str:
        """Say in one sentence what the numbers are."""

    def model_statistics(self, log_probs: FloatArray, tokens: FloatArray) -> FloatArray:
        """Return statistics [segments, k] from log-probability and token count of each segment's reference.

        Only for metrics that need the model. Both arguments are [segments]; log-probabilities are natural.
        """
        raise UsageError(f"{', '.join(self.names)}: this metric reads text, not the model's probabilities.")

    def pairwise(self, texts: Sequence[str]) -> FloatArray:
        """Return the first number of each text (row) with each text (column) as its reference, [texts, texts]."""
        hypotheses = [text for text in texts for _ in texts]
        statistics = self.statistics(hypotheses, [list(texts) * len(texts)])
        return self.scores(statistics)[:, 0].reshape(len(texts), len(texts))

    def against_mean(self, texts: Sequence[str], weights: FloatArray) -> FloatArray:
        """Return the first number of each text with the mean of all texts as its reference, [texts].

        Only for metrics that count n-grams: an n-gram's count is averaged over the texts. weights: [texts], sum 1.
        """
        raise UsageError(
            f"{self.names[0]}: this metric has no n-gram counts to average; those that have are chrf, bleu."
        )

    def signature(self, setting: Setting) -> str:
        """Return every choice that the numbers depend on, in sacreBLEU's form `key:value|key:value`."""
        return "|".join([*setting_pairs(setting), *option_pairs(self), f"encdec:{__version__}"])

    def warnings(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Return sentences on what in these texts makes the numbers doubtful."""
        return []

    def doubts(self, statistics: FloatArray) -> list[str]:
        """Return sentences on what in the statistics [segments, k] makes the numbers doubtful."""
        return []


def score(metric: Metric, statistics: FloatArray) -> tuple[float, ...]:
    """Return the corpus scores of statistics [segments, k], one for each of the metric's names."""
    return tuple(float(value) for value in metric.scores(statistics.sum(axis=0, keepdims=True))[0])


def try_out(metric: Metric) -> None:
    """Raise at once what would else stop a long run at its end: a tokenizer that lacks its package or its model."""
    if not metric.needs_model:
        metric.statistics(["a"], [["a"]])


def setting_pairs(setting: Setting) -> list[str]:
    """Return the first parts of a signature, in sacreBLEU's order and words."""
    pairs = [f"nrefs:{setting.references}"]
    if setting.resamples:
        pairs.append(f"bs:{setting.resamples}")
    if setting.trials:
        pairs.append(f"ar:{setting.trials}")
    if setting.seed is not None:
        pairs.append(f"seed:{setting.seed}")
    return pairs


def option_pairs(metric: Metric) -> list[str]:
    """Return `option:value` for every field of a metric."""
    pairs = []
    for field in fields(metric):
        value = vars(metric)[field.name]
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        pairs.append(f"{field.name}:{shown}")
    return pairs


def check_lengths(name_a: str, lines_a: Sequence[str], name_b: str, lines_b: Sequence[str]) -> None:
    """Raise DataError if either text is empty or if they differ in the number of lines."""
    for name, lines in ((name_a, lines_a), (name_b, lines_b)):
        if not lines:
            raise DataError(f"{name} has no lines: there is nothing to evaluate.")
    if len(lines_a) == len(lines_b):
        return
    row = suspicious_row([len(line) for line in lines_a], [len(line) for line in lines_b])
    count = f"{len(lines_a)} line{'s' if len(lines_a) > 1 else ''}"
    counts = f"{name_a} has {count} but {name_b} has {len(lines_b)}, and line must stand against line"
    if row == min(len(lines_a), len(lines_b)):
        raise DataError(f"{counts}; the first suspicious row is {row + 1}, where the shorter one has ended.")
    raise DataError(
        f"{counts}; the first suspicious row is {row + 1}: {_excerpt(lines_a[row])} against {_excerpt(lines_b[row])}."
    )


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…")


def tokenised_warning(hypotheses: Sequence[str]) -> list[str]:
    """Return a warning if most hypotheses, or a hundred of them, end in a full stop that stands alone."""
    written = [line.rstrip() for line in hypotheses if line.strip()]
    apart = sum(line.endswith(" .") for line in written)
    if apart >= 100 or (apart and 2 * apart > len(written)):
        return [
            f"{apart} of {len(written)} hypotheses end in ' .', as tokenised text does; "
            "scores are comparable only on plain text, so undo the tokenisation first."
        ]
    return []
