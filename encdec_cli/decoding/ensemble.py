"""How the next-token probabilities of several models become one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from encdec_cli.decoding.scorer import normalise
from encdec_cli.models.model import Model

LEAST_SHARE = 1e-12
"""A weight that is a smaller share of the largest is taken for none."""


@dataclass(frozen=True)
class Ensemble:
    """An average over models that share a target vocabulary; the average of a model with itself is the model."""

    average: Literal["probabilities", "log-probabilities"] = "probabilities"
    """The mean of the probabilities, where a token that one model likes stays possible, or the mean of the
    log-probabilities (their geometric mean, normalised again), where a token that one model rules out is out."""
    weights: tuple[float, ...] = ()
    """What each model counts, in any unit; empty lets all count alike."""

    def __post_init__(self) -> None:
        wrong = [weight for weight in self.weights if not (math.isfinite(weight) and weight > 0)]
        if wrong:
            raise ValueError(f"weights: found {wrong[0]}; each weight must be above 0, so leave out a model of none.")
        if self.weights and min(self.weights) < LEAST_SHARE * max(self.weights):
            raise ValueError(f"weights: {min(self.weights)} beside {max(self.weights)} is none; leave that model out.")

    def log_probs(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the log-probabilities of the average, [rows, vocab] float32.

        logits: one [rows, vocab] for each model. Raises ValueError where sizes or the number of weights differ.
        """
        weights = self.weights or (1.0,) * len(logits)
        if len(weights) != len(logits):
            raise ValueError(f"{len(weights)} weights for {len(logits)} models of an ensemble")
        for other in logits[1:]:
            if other.shape != logits[0].shape:
                sizes = f"{logits[0].shape[1]} and {other.shape[1]}"
                raise ValueError(f"an ensemble needs one target vocabulary, found sizes {sizes}")
        if self.average == "probabilities":
            return _arithmetic_mean(weights, logits)
        return _geometric_mean(weights, logits)


MEAN = Ensemble()
"""The plain mean of the models' probabilities."""


def for_each(models: Sequence[Model], given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return what each model is given: the same tensor for all of them, or its own."""
    return [given] * len(models) if isinstance(given, Tensor) else list(given)


def _shares(weights: Sequence[float]) -> list[float]:
    """Return the weights by the largest: equal ones change no digit, and great ones do not add up to infinity."""
    return [weight / max(weights) for weight in weights]


def _arithmetic_mean(weights: Sequence[float], logits: Sequence[Tensor]) -> Tensor:
    shares = _shares(weights)
    total = _log_probs(logits[0], shares[0])
    for share, other in zip(shares[1:], logits[1:], strict=True):
        total = torch.logaddexp(total, _log_probs(other, share))
    return total - math.log(sum(shares))


def _geometric_mean(weights: Sequence[float], logits: Sequence[Tensor]) -> Tensor:
    shares = _shares(weights)
    shares = [share / sum(shares) for share in shares]
    total = shares[0] * _log_probs(logits[0])
    for share, other in zip(shares[1:], logits[1:], strict=True):
        total += share * _log_probs(other)
    # Where no token is possible for all models, none is for the ensemble.
    return total - total.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)


def _log_probs(logits: Tensor, factor: float = 1.0) -> Tensor:
    """Return the logarithms of the probabilities times a factor, [rows, vocab] float32."""
    return logits.float() - (normalise(logits)[0] - math.log(factor))[:, None]
