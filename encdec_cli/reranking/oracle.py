"""The output that is nearest to the reference: what a search has found, if only one knew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from encdec_cli.config import parse_component
from encdec_cli.errors import DataError, UsageError
from encdec_cli.evaluation.metrics import Metric, try_out
from encdec_cli.generation.lines import Candidate
from encdec_cli.registry import metrics
from encdec_cli.reranking.reranker import Reranker
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class Oracle(Reranker):
    """Order outputs by a metric against the reference, which each line must bring.

    It tells how good an n-best list is at best, and chooses the targets of sequence-level interpolation (Kim and Rush
    2016, https://arxiv.org/abs/1606.07947, section 3.3).
    """

    metric: str = "chrf"
    """What orders them: a metric's first number for a single segment, with options as `--metric` takes them."""

    def __post_init__(self) -> None:
        if self._metric.needs_model or self._metric.no_resampling:
            raise UsageError(f"metric: {self.metric} gives no number for a single segment; use chrf, bleu or f1.")
        try_out(self._metric)

    def __call__(self, example: Example, candidates: Sequence[Candidate]) -> list[float]:
        """Return the score of each candidate; of a metric that is better when lower, its negative."""
        if example.target is None:
            raise DataError("the reranker 'oracle' compares with references; give records with a target, with --json.")
        texts = [candidate.text for candidate in candidates]
        scores = self._metric.scores(self._metric.statistics(texts, [[example.target] * len(texts)]))[:, 0]
        sign = 1.0 if self._metric.higher_is_better else -1.0
        return [sign * float(score) for score in scores]

    @cached_property
    def _metric(self) -> Metric:
        metric: Metric = parse_component(self.metric, metrics, "metric")
        return metric
