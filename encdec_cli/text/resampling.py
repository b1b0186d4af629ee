"""The same text in other subwords: sampled segmentations, which make a model read and write more ways to spell a word.

Kudo 2018 (https://arxiv.org/abs/1804.10959) for a unigram model, BPE-dropout (Provilkov et al. 2020,
https://arxiv.org/abs/1910.13267) for a BPE model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from random import Random
from typing import cast

from encdec_cli.errors import UsageError
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.tokenizer import Tokenizer

_SPACE = "\u2581"
_WORDS = 1 << 17
"""Words whose lattices are remembered."""

Arcs = tuple[list[float], list[tuple[int, int]]]
"""The pieces that may end at a place of a word: their cumulated weights; where each begins, and its id."""


def check_sampling(kind: str, algorithm: str, amount: float) -> None:
    """Raise UsageError if a tokenizer of this kind, learned by this algorithm, cannot draw segmentations."""
    if kind != SentencePiece.kind:
        raise UsageError(
            f"regularize.subword_sampling: a {kind} tokenizer knows one way only to cut a text; use "
            "text.tokenizer: sentencepiece, or leave it out."
        )
    if algorithm == "bpe" and amount >= 1:
        raise UsageError(
            f"regularize.subword_sampling: {amount} is the probability of leaving out a merge with text.algorithm: "
            "bpe; use a number below 1, such as 0.1."
        )


class Resampler:
    """Draws another segmentation for ids of a tokenizer; the text they spell stays the same.

    Bytes, symbols and special tokens stay as they are. Nothing is drawn across the beginning of a word.

    Args:
        tokenizer: SentencePiece; UsageError for any other.
        algorithm: what the pieces were learned with. `unigram`: a word's segmentations are drawn by their
            probability to the power `amount`. `bpe`: each possible merge is left out with probability `amount`, anew
            after each merge.
        amount: above 0, with `bpe` below 1; see `check_sampling`.
        symbols: strings that are always one token.
    """

    def __init__(self, tokenizer: Tokenizer, algorithm: str, amount: float, symbols: Collection[str]) -> None:
        check_sampling(tokenizer.kind, algorithm, amount)
        tokenizer = cast(SentencePiece, tokenizer)
        self._amount = amount
        self._tokens = tokenizer.vocabulary.tokens
        self._scores = {id: score for id, score in tokenizer.scores().items() if self._tokens[id] not in symbols}
        self._ids = {self._tokens[id]: id for id in self._scores}
        self._longest = max(map(len, self._ids), default=0)
        self._lattice = lru_cache(_WORDS)(self._arcs)
        self._segment = self._merged if algorithm == "bpe" else self._drawn

    def __call__(self, ids: Sequence[int], random: Random) -> list[int]:
        """Return other ids for the same text."""
        found: list[int] = []
        for word in self._words(ids):
            found += self._segment(word, random) if word[0] in self._scores else word
        return found

    def _words(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """Yield the pieces of each word, and each of the other tokens alone."""
        word: list[int] = []
        for id in ids:
            apart = id not in self._scores
            if word and (apart or self._tokens[id].startswith(_SPACE)):
                yield word
                word = []
            if apart:
                yield [id]
            else:
                word.append(id)
        if word:
            yield word

    def _drawn(self, word: Sequence[int], random: Random) -> list[int]:
        """Return a segmentation drawn by its probability under the unigram model, to the power `amount`."""
        text = "".join(self._tokens[id] for id in word)
        lattice, place = self._lattice(text), len(text)
        found: list[int] = []
        while place:
            masses, arcs = lattice[place]
            chosen = bisect_right(masses, random.random() * masses[-1], hi=len(masses) - 1)
            place, id = arcs[chosen]
            found.append(id)
        return found[::-1]

    def _arcs(self, text: str) -> list[Arcs]:
        """Return for each place of a text what may end there, weighted by all that may come before."""
        # Forward filtering: the mass of all segmentations of the text up to a place, as a logarithm.
        forward: list[float] = [0.0]
        lattice: list[Arcs] = [([], [])]
        for end in range(1, len(text) + 1):
            arcs: list[tuple[int, int]] = []
            logs: list[float] = []
            for start in range(max(0, end - self._longest), end):
                id = self._ids.get(text[start:end])
                if id is not None and forward[start] > -math.inf:
                    arcs.append((start, id))
                    logs.append(forward[start] + self._amount * self._scores[id])
            highest = max(logs, default=-math.inf)
            weights = [math.exp(log - highest) for log in logs]
            forward.append(highest + math.log(sum(weights)) if weights else -math.inf)
            lattice.append((list(accumulate(weights)), arcs))
        return lattice

    def _merged(self, word: Sequence[int], random: Random) -> list[int]:
        """Return what the merges make of a word's characters if some are left out (algorithm 1 of the paper)."""
        parts = list("".join(self._tokens[id] for id in word))
        if not all(part in self._ids for part in parts):
            return list(word)
        ranks = [self._rank(first + second) for first, second in pairwise(parts)]
        while True:
            best, highest = -1, -math.inf
            for place, rank in enumerate(ranks):
                # A draw for those only that would be the next: the others do not matter.
                if rank > highest and random.random() >= self._amount:
                    best, highest = place, rank
            if best < 0:
                return [self._ids[part] for part in parts]
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
            del ranks[best]
            for place in range(max(0, best - 1), min(best + 1, len(ranks))):
                ranks[place] = self._rank(parts[place] + parts[place + 1])

    def _rank(self, text: str) -> float:
        """Return how early a merge was learned that gives a text; minus infinity if none does."""
        id = self._ids.get(text)
        return -math.inf if id is None else self._scores[id]
