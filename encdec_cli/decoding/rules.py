"""Rules: what may change the scores of the next token during a search."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rule(Protocol):
    """Something that is called at every step and returns the scores that the search then uses."""

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Return new scores; the given ones may be overwritten.

        scores: [rows, vocab] float32 log-probabilities; -inf takes a token from the candidates.
        prefix: [rows, written] int64, the tokens so far, without BOS.
        sentences: [rows] int64, for which sentence of the batch each row is written.
        """
