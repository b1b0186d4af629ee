"""Beam search in which the continuations of one hypothesis pay for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import MOST_NATS
from encdec_cli.decoding.scorer import Candidates, Scores, rank


@dataclass(kw_only=True)
class Siblings(Beam):
    """Beam search with diverse siblings: a continuation pays for its rank among those of the same hypothesis.

    Li, Monroe, Jurafsky 2016, "A Simple, Fast Diverse Decoding Algorithm for Neural Generation",
    https://arxiv.org/abs/1611.08562: the best continuation of a hypothesis pays nothing, the next `diversity_rate`,
    the next twice that, and so on (their ranks begin at 1, which takes the same from all). What is paid counts in the
    step alone and in no score.
    """

    diversity_rate: float = 0.5
    """What a continuation pays for each better one of the same hypothesis, in nats; 0 is plain beam search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diversity_rate <= MOST_NATS:
            raise ValueError(f"diversity_rate is {self.diversity_rate}; it must be from 0 to {MOST_NATS:,.0f} nats.")

    def _propose(self, frontier: Frontier, scores: Scores, totals: Tensor) -> Candidates:
        """Return the best ways to go on. Behind 2 x beam better siblings, none is among the 2 x beam best of all."""
        log_probs, tokens = scores.top(2 * self.beam)
        shape = (*totals.shape, log_probs.shape[1])
        values = totals[..., None] + log_probs.view(shape)
        penalties = self.diversity_rate * torch.arange(shape[2], device=totals.device)
        return rank(values, penalties, tokens.view(shape), 2 * self.beam, scores.shape[1])
