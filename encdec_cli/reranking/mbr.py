"""Minimum Bayes risk: the output that is nearest to all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from encdec_cli.config import parse_component
from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, try_out
from encdec_cli.evaluation.ngrams import sums
from encdec_cli.generation.lines import Candidate
from encdec_cli.registry import metrics
from encdec_cli.reranking.reranker import Reranker
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class MinimumBayesRisk(Reranker):
    """Order outputs by their expected utility: the mean score of an output with every output as its reference.

    The mean over samples estimates the expectation under the model (Eikema and Aziz 2020,
    https://arxiv.org/abs/2005.10283); an output that was drawn twice counts twice.
    """

    metric: str = "chrf"
    """The utility: a metric's first number for a single segment, with options as `--metric` takes them."""
    weights: Literal["uniform", "probability"] = "uniform"
    """What each output counts as a reference: all alike, which suits samples, or by the model's probability, which
    suits the n-best list of a beam."""
    aggregate: bool = False
    """Compare with one reference that has the mean of all n-gram counts, instead of with every output: time grows
    with the number of outputs, not with its square (https://arxiv.org/abs/2402.04251; chrf and bleu only)."""

    def __post_init__(self) -> None:
        utility = self._utility
        if utility.needs_model or utility.no_resampling:
            raise UsageError(f"metric: {self.metric} gives no number for a single segment; use chrf, bleu or f1.")
        try_out(utility)
        if self.aggregate:
            utility.against_mean(["a"], np.ones(1))

    def __call__(self, example: Example, candidates: Sequence[Candidate]) -> list[float]:
        """Return the expected utility of each candidate; of a metric that is better when lower, its negative."""
        places = {text: place for place, text in enumerate(dict.fromkeys(one.text for one in candidates))}
        rows = [places[one.text] for one in candidates]
        utilities = self._expected(list(places), sums(np.array(rows), self._weights(candidates)))
        sign = 1.0 if self._utility.higher_is_better else -1.0
        return [sign * utilities[row] for row in rows]

    @cached_property
    def _utility(self) -> Metric:
        metric: Metric = parse_component(self.metric, metrics, "metric")
        return metric

    def _expected(self, texts: Sequence[str], weights: FloatArray) -> list[float]:
        if self.aggregate:
            return [float(score) for score in self._utility.against_mean(texts, weights)]
        # Added up exactly, so that the order of the candidates cannot part what is equal.
        return [math.fsum(row) for row in (self._utility.pairwise(texts) * weights).tolist()]

    def _weights(self, candidates: Sequence[Candidate]) -> FloatArray:
        """Return the weight of each candidate, [candidates], sum 1."""
        if self.weights == "uniform":
            return np.full(len(candidates), 1 / len(candidates))
        log_probs = np.array([math.fsum(candidate.token_scores) for candidate in candidates])
        chances = np.exp(log_probs - log_probs.max())
        return np.asarray(chances / chances.sum())
