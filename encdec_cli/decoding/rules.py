"""Rules: what may change the scores of the next token during a search. One small class each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """Something that is called at every step and returns the scores that the search then uses."""

    def __call__(self, scores: Tensor, prefix: Tensor) -> Tensor:
        """Return new scores; the given ones may be overwritten.

        scores: [rows, vocab] float32 log-probabilities; -inf takes a token from the candidates.
        prefix: [rows, written] int64, the tokens so far, without BOS.
        """


@dataclass(kw_only=True)
class NoRepeat:
    """Forbid to write the same n-gram twice, as in https://arxiv.org/abs/1705.04304."""

    size: int
    """Tokens in an n-gram; 1 forbids to write any token twice."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; an n-gram has at least 1 token.")

    def __call__(self, scores: Tensor, prefix: Tensor) -> Tensor:
        """Set to -inf every token that would complete an n-gram of the prefix."""
        if prefix.shape[1] < self.size:
            return scores
        windows = prefix.unfold(1, self.size, 1)  # [rows, places, size]
        context = prefix[:, prefix.shape[1] - self.size + 1 :]
        same = (windows[..., :-1] == context[:, None]).all(-1)
        row, place = same.nonzero(as_tuple=True)
        scores[row, windows[row, place, -1]] = -torch.inf
        return scores
