"""Perplexity: how surprised the model is by the references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric


@dataclass(kw_only=True)
class Perplexity(Metric):
    """exp of the mean negative log-probability of a target token, the end of sentence included."""

    higher_is_better: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return ("perplexity",)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Raise UsageError: text alone has no perplexity."""
        raise UsageError("perplexity needs the model's probabilities: evaluate a model, not a file of hypotheses.")

    def model_statistics(self, log_probs: FloatArray, tokens: FloatArray) -> FloatArray:
        """Return [segments, 2]: the natural log-probability of the reference and its tokens including EOS."""
        return np.stack([log_probs, tokens], axis=1).astype(np.float64)

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the perplexity [samples, 1]; infinite where a token is impossible."""
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(-totals[:, :1] / totals[:, 1:]), dtype=np.float64)

    def explain(self) -> str:
        """Say what the number is."""
        return (
            "exp of the mean negative log-probability per target token (end of sentence included) that the model gives "
            "to the references; comparable only between models with the same tokenizer; lower is better"
        )
