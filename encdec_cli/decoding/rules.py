"""Rules: what may change the scores of the next token during a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from encdec_cli.text.vocabulary import EOS, PAD


class Rule(Protocol):
    """Something that is called at every step and returns the scores that the search then uses."""

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Return new scores; the given ones may be overwritten.

        scores: [rows, vocab] float32 log-probabilities; -inf takes a token from the candidates.
        prefix: [rows, written] int64, the tokens so far, without BOS.
        sentences: [rows] int64, for which sentence of the batch each row is written.
        """


class NoRepeatNgram:
    """No n tokens stand in an output twice in the same order (https://arxiv.org/abs/1705.04304, section 2.5).

    Args:
        n: tokens of an n-gram; with 1 no token is written twice.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Forbid every token that would write an n-gram of the prefix again."""
        return _forbid_last(scores, prefix, prefix.unfold(1, self.n, 1)) if prefix.shape[1] >= self.n else scores


class NoRepeatSourceNgram:
    """No n tokens of a source stand in its output in the same order.

    Args:
        n: tokens of an n-gram.
        source: [sentences, src_len], the ids of the target vocabulary, padded with PAD; EOS does not count.
    """

    def __init__(self, n: int, source: Tensor) -> None:
        # Padding is never written, so n-grams that hold it forbid nothing that could be.
        tokens = source.masked_fill(source == EOS, PAD)
        self._ngrams = torch.nn.functional.pad(tokens, (0, n)).unfold(1, n, 1)

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Forbid every token that would write an n-gram of the row's source."""
        return _forbid_last(scores, prefix, self._ngrams[sentences])


class Banned:
    """None of some phrases is written.

    Args:
        phrases: tokens of each, at least one.
        device: where the scores are.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], device: torch.device) -> None:
        lengths = sorted({len(phrase) for phrase in phrases})
        self._groups = [
            torch.tensor([phrase for phrase in phrases if len(phrase) == length], device=device) for length in lengths
        ]

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Forbid every token that would complete a phrase."""
        for phrases in self._groups:
            scores = _forbid_last(scores, prefix, phrases.expand(len(prefix), -1, -1))
        return scores


def _forbid_last(scores: Tensor, prefix: Tensor, ngrams: Tensor) -> Tensor:
    """Take the last token of every n-gram whose other tokens have just been written. ngrams: [rows, count, n]."""
    written, others = prefix.shape[1], ngrams.shape[2] - 1
    if written < others:
        return scores
    begun = (ngrams[..., :-1] == prefix[:, None, written - others :]).all(-1)
    rows, places = begun.nonzero(as_tuple=True)
    scores[rows, ngrams[rows, places, -1]] = -torch.inf
    return scores


class RepetitionPenalty:
    """Tokens that have been written become less likely (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, 4.1).

    The paper divides logits by the penalty. Here log-probabilities, which are never above 0, are multiplied by it, as
    Hugging Face does in beam search.

    Args:
        penalty: above 0; 1 changes nothing, below 1 tokens are favoured that have been written.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Multiply the scores of all tokens of the prefix, once each."""
        return scores.scatter(1, prefix, scores.gather(1, prefix) * self.penalty)


class Boosted:
    """Phrases are favoured: an output ranks higher by a bonus for each time that it holds one.

    On the way a share of the bonus is lent: with j of a phrase's m tokens written, j / m of it. What was lent is taken
    back by whatever token breaks the phrase off, EOS too. So a finished output has gained, exactly, the bonuses of the
    phrases it holds (overlapping ones count); this is shaping by a potential (Ng, Harada and Russell 1999).

    Args:
        phrases: tokens of each, at least one, and its bonus in nats; one below 0 makes it rarer.
        device: where the scores are.
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]], device: torch.device) -> None:
        def tensor(values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # A place (j, k) is where token j of phrase k is due: the j tokens before it have just been written.
        places = sorted((j, k) for k, (tokens, _) in enumerate(phrases) for j in range(len(tokens)))
        longest = places[-1][0] + 1
        self._contexts = [tensor([phrases[k][0][:j] for i, k in places if i == j]) for j in range(longest)]
        self._phrase = tensor([k for _, k in places])
        self._bonus = tensor([bonus for _, bonus in phrases], torch.float32)
        lengths = tensor([len(tokens) for tokens, _ in phrases])[self._phrase]
        before = tensor([j for j, _ in places])
        self._lent = before / lengths
        self._last = (before + 1 == lengths).float()
        self._next = (before + 1) / lengths * (1 - self._last)
        # A token may be due at several places of a phrase: what is lent then is the share of the farthest.
        moves = torch.stack((self._phrase, tensor([phrases[k][0][j] for j, k in places])), 1)
        distinct, self._move = torch.unique(moves, dim=0, return_inverse=True)
        self._move_token = distinct[:, 1]
        self._move_bonus = self._bonus[distinct[:, 0]]

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Add what each token begins, continues or completes; take back what it breaks off."""
        rows = len(prefix)
        due = torch.cat([self._due(prefix, contexts) for contexts in self._contexts], 1).float()
        phrase, move = self._phrase.expand(rows, -1), self._move.expand(rows, -1)
        lent = due.new_zeros(rows, len(self._bonus)).scatter_reduce(1, phrase, due * self._lent, "amax")
        share = due.new_zeros(rows, len(self._move_token)).scatter_reduce(1, move, due * self._next, "amax")
        share = share.scatter_add(1, move, due * self._last)
        scores = scores - (lent @ self._bonus)[:, None]
        return scores.index_add_(1, self._move_token, share * self._move_bonus)

    @staticmethod
    def _due(prefix: Tensor, contexts: Tensor) -> Tensor:
        """Return which of some contexts the rows end with, [rows, n]. contexts: [n, j]."""
        start = prefix.shape[1] - contexts.shape[1]
        if start < 0:
            return prefix.new_zeros(len(prefix), len(contexts), dtype=torch.bool)
        return (prefix[:, None, start:] == contexts).all(-1)
