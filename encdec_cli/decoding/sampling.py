"""Sampling: outputs drawn from the model's probabilities, the same for the same line wherever it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.decoding.draw import draw, streams, uniform
from encdec_cli.decoding.frontier import Walk
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Scores
from encdec_cli.decoding.stepper import Stepper

NUCLEUS = 256
"""Tokens sorted at first for `top_p`; all of them only where these do not hold the mass."""
TOLERANCE = 1e-6
"""A mass that lies this little below `top_p` has reached it: probabilities are float32."""


@dataclass(kw_only=True)
class Sampling(Strategy):
    """Draw `beam` outputs for each sentence, and return them by log-probability, the highest first.

    The temperature is applied first, then `top_k`, then `top_p` on what is left. Scores are log-probabilities
    of the model itself: not divided by the temperature, not renormalised after the filters.
    """

    beam: int = 1
    """Samples for each sentence."""
    temperature: float = 1.0
    """Log-probabilities are divided by it; below 1 is bolder, 0 takes the best token always."""
    top_k: int = 0
    """Draw among this many best tokens; 0 draws among all (https://arxiv.org/abs/1805.04833)."""
    top_p: float = 1.0
    """Draw among the fewest best tokens whose mass is at least this (https://arxiv.org/abs/1904.09751)."""
    seed: int = 1
    """Another seed, other samples. A sample depends on the seed, the source and its place among the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1:
            raise ValueError(f"beam is {self.beam}; at least 1 sample is needed.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")

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
        if self.top_k == 0 and self.top_p == 1:
            return draw(self._weights(scores.log_probs()), chance).squeeze(1)
        weights, tokens = self._filtered(scores)
        return tokens.gather(1, draw(weights, chance)).squeeze(1)

    def _weights(self, log_probs: Tensor) -> Tensor:
        """Return unnormalised probabilities at the temperature, the highest 1. log_probs: [rows, n]."""
        highest = log_probs.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        return ((log_probs - highest) / self.temperature).exp_()

    def _filtered(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return weights (0 where filtered) and tokens, best first, both [rows, n]."""
        vocab = scores.shape[1]
        whole = self._weights(scores.log_probs()).sum(-1, keepdim=True, dtype=torch.float64) if not self.top_k else None
        for k in (self.top_k,) if self.top_k else (NUCLEUS, vocab):
            log_probs, tokens = scores.top(k)
            weights = self._weights(log_probs).double()
            mass = weights.cumsum(-1)
            total = mass[:, -1:] if whole is None else whole
            goal = (self.top_p - TOLERANCE) * total
            if k >= vocab or self.top_k or bool((mass[:, -1:] >= goal).all()):
                break
        # A token stays if those before it have not reached the goal; the first always stays.
        before = mass - weights
        before[:, 0] = -1
        weights = weights.masked_fill(before >= goal, 0) if self.top_p < 1 else weights
        return weights, tokens
