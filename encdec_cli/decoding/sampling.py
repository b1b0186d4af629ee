"""Sampling: outputs drawn from the model's probabilities, the same for the same line wherever it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.decoding import filters
from encdec_cli.decoding.draw import draw, streams, uniform
from encdec_cli.decoding.frontier import Walk
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Scores
from encdec_cli.decoding.stepper import Stepper


@dataclass(kw_only=True)
class Sampling(Strategy):
    """Draw `beam` outputs for each sentence, and return them by log-probability, the highest first.

    In this order: `temperature`, `top_k`, `top_p`, `min_p`, `typical`, `epsilon`. Each sees what those before it have
    left, renormalised, and leaves at least one token. Scores are log-probabilities of the model itself: not divided
    by the temperature, not renormalised after the filters.
    """

    beam: int = 1
    """Samples for each sentence."""
    temperature: float = 1.0
    """Log-probabilities are divided by it; below 1 is bolder, 0 takes the best token always."""
    top_k: int = 0
    """Draw among this many best tokens; 0 draws among all (https://arxiv.org/abs/1805.04833)."""
    top_p: float = 1.0
    """Draw among the fewest best tokens whose mass is at least this (https://arxiv.org/abs/1904.09751)."""
    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the best one's (https://arxiv.org/abs/2407.01082)."""
    typical: float = 1.0
    """Draw among the fewest tokens of at least this mass whose surprise is nearest to the entropy (locally typical
    sampling, https://arxiv.org/abs/2202.00666)."""
    epsilon: float = 0.0
    """Leave out tokens whose probability is below this (https://arxiv.org/abs/2210.15191)."""
    seed: int = 1
    """Another seed, other samples. A sample depends on the seed, the source and its place among the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1:
            raise ValueError(f"beam is {self.beam}; at least 1 sample is needed.")
        if not (self.temperature == 0 or 1e-30 <= self.temperature <= 1e30):  # float32 divides by it
            raise ValueError(f"temperature is {self.temperature}; it must be 0, or from 1e-30 to 1e30.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or 0 for all tokens.")
        for key, mass in (("top_p", self.top_p), ("typical", self.typical)):
            if not 0 < mass <= 1:
                raise ValueError(f"{key} is {mass}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and at most 1.")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; it must be at least 0 and below 1.")

    @torch.inference_mode()
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the samples of each sentence. `stepper` must have `beam` rows a sentence."""
        if stepper.beam != self.beam:
            raise ValueError(f"the stepper has {stepper.beam} rows a sentence, sampling needs {self.beam}")
        walk = Walk(stepper, limits, rules)
        numbers = streams(self.seed, stepper.keys, self.beam, stepper.device)
        while not walk.done:
            scores = walk.step()
            walk.move(self._choose(scores, uniform(numbers[walk.origin], walk.written)))
        return walk.best()

    def _choose(self, scores: Scores, chance: Tensor) -> Tensor:
        """Return the next token of every row, [rows]. chance: [rows]."""
        if self.temperature == 0:
            return scores.top(1)[1].squeeze(1)
        weights, tokens = self._best(scores) if self.top_k or self.top_p < 1 else self._all(scores)
        if self.min_p:
            weights = filters.min_p(weights, self.min_p)
        if self.typical < 1:
            weights = filters.typical(weights, tokens, self.typical)
        if self.epsilon:
            weights = filters.epsilon(weights, self.epsilon)
        return tokens.gather(1, draw(weights, chance)).squeeze(1)

    def _weights(self, log_probs: Tensor) -> Tensor:
        """Return unnormalised probabilities at the temperature, the highest 1. log_probs: [rows, n]."""
        highest = log_probs.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        return ((log_probs - highest) / self.temperature).exp_()

    def _all(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return the weights of all tokens, and the tokens, both [rows, vocab]."""
        weights = self._weights(scores.log_probs())
        return weights, torch.arange(scores.shape[1], device=weights.device).expand_as(weights)

    def _best(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return the weights (0 where filtered) and tokens that `top_k` and `top_p` leave, best first, [rows, n]."""
        if self.top_k:
            log_probs, tokens = scores.top(self.top_k)
            weights = self._weights(log_probs).double()
            if self.top_p < 1:
                weights, _ = filters.fewest(weights, weights.sum(-1, keepdim=True), self.top_p)
            return weights, tokens
        total = self._weights(scores.log_probs()).sum(-1, keepdim=True, dtype=torch.float64)
        for k in (filters.FIRST_LOOK, scores.shape[1]):
            log_probs, tokens = scores.top(k)
            weights, reached = filters.fewest(self._weights(log_probs).double(), total, self.top_p)
            if k >= scores.shape[1] or bool(reached.all()):
                break
        return weights, tokens
