"""Outputs that are given in part: a prefix of each sentence's own, or a list of all outputs that are allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_cli.decoding.rules import Rule
from encdec_cli.text.vocabulary import EOS, PAD

RADIX = 1 << 32
"""Larger than every token id: (node, token) is the integer node * RADIX + token."""


class Forced:
    """Every output begins with its sentence's prefix, whatever other rules say; they apply to what follows.

    A forced token keeps the score that the models give it, and what a bonus adds.

    Args:
        prefixes: tokens for each sentence; none where nothing is forced.
        rules: the other rules.
        device: where the scores are.
        bonus: the one of the rules that favours phrases: what it lends within a prefix it takes back after it.
    """

    def __init__(
        self,
        prefixes: Sequence[Sequence[int]],
        rules: Sequence[Rule],
        device: torch.device,
        bonus: Rule | None = None,
    ) -> None:
        longest = max(map(len, prefixes))
        self._tokens = torch.tensor([[*prefix, *[PAD] * (longest - len(prefix))] for prefix in prefixes], device=device)
        self._lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        self._rules = rules
        self._bonus = bonus

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Leave one candidate to the rows that are still within their prefix."""
        written = prefix.shape[1]
        if written >= self._tokens.shape[1]:
            return self._others(scores, prefix, sentences)
        rows = (self._lengths[sentences] > written).nonzero().flatten()
        tokens = self._tokens[sentences[rows], written]
        own = scores if self._bonus is None else self._bonus(scores.clone(), prefix, sentences)
        own = own[rows, tokens]
        scores = self._others(scores, prefix, sentences)
        scores[rows] = -torch.inf
        scores[rows, tokens] = own
        return scores

    def _others(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        for rule in self._rules:
            scores = rule(scores, prefix, sentences)
        return scores


class OneOf:
    """Every output is one of a list: the search walks down the tree of their tokens.

    The tree is one sorted list of edges, (node, token); edge i leads to node i + 1, and 0 is the root.

    Args:
        outputs: tokens of each, without EOS; at least one output.
        device: where the scores are.
    """

    def __init__(self, outputs: Sequence[Sequence[int]], device: torch.device) -> None:
        self.longest = max(map(len, outputs))
        """Tokens of the longest output."""
        table = torch.full((len(outputs), self.longest + 1), PAD)
        for row, output in enumerate(outputs):
            table[row, : len(output) + 1] = torch.tensor([*output, EOS])
        nodes, edges = torch.zeros(len(outputs), dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        for column in table.unbind(1):
            real = column != PAD
            # Deeper nodes have higher numbers, so the edges stay sorted.
            new, places = torch.unique(nodes[real] * RADIX + column[real], return_inverse=True)
            nodes[real] = len(edges) + places + 1
            edges = torch.cat((edges, new))
        self._edges = edges.to(device)

    def begins(self, prefix: Sequence[int]) -> bool:
        """Tell whether an output begins with these tokens."""
        tokens = torch.tensor([list(prefix)], dtype=torch.int64, device=self._edges.device)
        return bool(self._nodes(tokens) <= len(self._edges))

    def __call__(self, scores: Tensor, prefix: Tensor, sentences: Tensor) -> Tensor:
        """Forbid every token after which no output is left."""
        nodes = self._nodes(prefix)
        first = torch.searchsorted(self._edges, nodes * RADIX)
        counts = torch.searchsorted(self._edges, (nodes + 1) * RADIX) - first
        rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(counts)
        nth = torch.arange(len(rows), device=prefix.device) - (counts.cumsum(0) - counts)[rows]
        tokens = self._edges[first[rows] + nth] % RADIX
        allowed = torch.full_like(scores, -torch.inf)
        allowed[rows, tokens] = scores[rows, tokens]
        return allowed

    def _nodes(self, prefix: Tensor) -> Tensor:
        """Return the node that each row has come to, [rows]; one without edges where a row has left the tree."""
        nodes = prefix.new_zeros(len(prefix))
        for column in prefix.unbind(1):
            edge = nodes * RADIX + column
            place = torch.searchsorted(self._edges, edge).clamp(max=len(self._edges) - 1)
            nodes = torch.where(self._edges[place] == edge, place + 1, len(self._edges) + 1)
        return nodes
