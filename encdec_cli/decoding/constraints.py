"""Which phrases the hypotheses of a batch hold so far, and how many tokens they still need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.text.vocabulary import PAD

Phrase = Sequence[int]
Constraint = Sequence[Phrase]
"""Alternatives: an output meets the constraint if it holds one of them, its tokens side by side."""


@dataclass
class Progress:
    """How far some hypotheses are with the phrases of their sentences."""

    nodes: Tensor
    """[...] int64; which node of its sentence's automaton each of them has reached."""
    met: Tensor
    """[..., constraints] bool; which constraints it has met."""

    def at(self, rows: Tensor) -> Progress:
        """Return the progress of some rows, in the shape of `rows`."""
        return Progress(self.nodes[rows], self.met[rows])


class Automata:
    """An automaton for each sentence that finds all its phrases at once (Aho and Corasick 1975).

    A node stands for the longest end of an output that begins some phrase, so a phrase that breaks off falls back to
    whatever has begun within it: after "a a a", two tokens of "a a b" are written, not none.
    See https://doi.org/10.1145/360825.360855. The tables of all sentences are joined, so that a step reads the tokens
    of a whole batch at once.

    Args:
        constraints: those of each sentence; at least one sentence has some, and no phrase is empty.
        device: where the hypotheses are.
    """

    def __init__(self, constraints: Sequence[Sequence[Constraint]], device: torch.device) -> None:
        automata = [_Automaton(one) for one in constraints]
        width = max(len(one.alphabet) for one in automata)
        most = max(map(len, constraints))
        alphabets: list[list[int]] = []
        moves: list[list[int]] = []
        missing: list[list[int]] = []
        whole: list[list[int]] = []
        roots: list[int] = []
        for one in automata:
            root, padding = len(moves), width - len(one.alphabet)
            rows = [row + [0] * (most - len(row)) for row in one.missing]
            roots.append(root)
            alphabets.append([PAD] * padding + one.alphabet)
            # The last column is for every token that is in no phrase.
            moves += [[root] * padding + [root + node for node in row] + [root] for row in one.moves]
            missing += rows
            whole += rows[:1] * len(rows)
        self.alphabets = torch.tensor(alphabets, device=device)
        """[sentences, n] int64; the tokens of each sentence's phrases in order, padded with PAD on the left."""
        self._moves = torch.tensor(moves, device=device)
        self._missing = torch.tensor(missing, device=device)
        """[nodes, constraints]; the fewest tokens that meet a constraint from a node on, 0 where it is met."""
        self._whole = torch.tensor(whole, device=device)
        """[nodes, constraints]; the same from the root on."""
        self._roots = torch.tensor(roots, device=device)

    def start(self, beam: int) -> Progress:
        """Return the progress of `beam` empty hypotheses for each sentence, [sentences x beam]."""
        nodes = self._roots.repeat_interleave(beam)
        return Progress(nodes, self._missing[nodes] == 0)

    def read(self, sentences: Tensor, progress: Progress, tokens: Tensor) -> Progress:
        """Return the progress after one more token.

        sentences: [n]; progress: of [n, hypotheses]; tokens: [n, hypotheses] int64.
        """
        alphabets = self.alphabets[sentences]
        other = alphabets.shape[1]
        column = torch.searchsorted(alphabets, tokens.contiguous()).clamp(max=other - 1)
        column = torch.where(alphabets.gather(1, column) == tokens, column, other)
        nodes = self._moves[progress.nodes, column]
        return Progress(nodes, progress.met | (self._missing[nodes] == 0))

    def missing(self, progress: Progress) -> Tensor:
        """Return how many tokens are missing: [...] int64, 0 where all constraints are met.

        Those of the unmet constraints, one after the other, less the beginning of the one that is farthest. That the
        others may have begun within it does not count: what brings one to its end may break them off. So there is
        always a token after which less is missing.
        """
        whole, unmet = self._whole[progress.nodes], ~progress.met
        return (whole * unmet).sum(-1) - ((whole - self._missing[progress.nodes]) * unmet).amax(-1)


class _Automaton:
    """The tables of one sentence; node 0 is the root, where no phrase has begun."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        phrases = list(dict.fromkeys(tuple(phrase) for constraint in constraints for phrase in constraint))
        longest = max(map(len, phrases), default=0)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for length in range(1, longest + 1):
            for phrase in phrases:
                if len(phrase) >= length:
                    nodes.setdefault(phrase[:length], len(nodes))
        self.alphabet = sorted({token for phrase in phrases for token in phrase})
        """The tokens of all phrases."""
        self.moves: list[list[int]] = []
        """[nodes][alphabet]; where each token leads."""
        self.missing = _missing(constraints, nodes, longest)
        """[nodes][constraints]; the fewest tokens that would meet the constraint from here; 0 where it is met."""
        # Shorter prefixes come first, so whatever a node falls back to is ready before it.
        for prefix, node in nodes.items():
            fallback = next((nodes[prefix[i:]] for i in range(1, len(prefix)) if prefix[i:] in nodes), 0)
            inherited = self.moves[fallback] if node else [0] * len(self.alphabet)
            self.moves.append(
                [nodes.get((*prefix, token), other) for token, other in zip(self.alphabet, inherited, strict=True)]
            )
            self.missing[node] = list(map(min, self.missing[node], self.missing[fallback]))


def _missing(constraints: Sequence[Constraint], nodes: dict[tuple[int, ...], int], longest: int) -> list[list[int]]:
    """Return `_Automaton.missing` as far as a node is itself the beginning of phrases."""
    missing = [[longest] * len(constraints) for _ in nodes]
    for number, constraint in enumerate(constraints):
        for phrase in constraint:
            for length in range(len(phrase) + 1):
                row = missing[nodes[tuple(phrase[:length])]]
                row[number] = min(row[number], len(phrase) - length)
    return missing
