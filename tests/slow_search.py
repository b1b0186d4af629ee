"""Beam search, diverse beams and diverse siblings once more: one sentence, plain Python, from the words in the docs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from scripted import VOCAB, A, B, C

from encdec_cli.text.vocabulary import EOS

Table = Callable[[tuple[int, ...]], Sequence[float]]


def random_table(seed: int) -> Table:
    """Scores that are a pure function of (seed, prefix), so that no table has to be stored."""

    @cache
    def row(prefix: tuple[int, ...]) -> list[float]:
        key = seed
        for token in (*prefix, 99):
            key = (key * 1000003 + token) % (2**31 - 1)
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(key)).mul(1.5).tolist()

    return row


def log_softmax(row: Sequence[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def divisor(length: int, penalty: float, normalization: str) -> float:
    return length**penalty if normalization == "power" else ((5 + length) / 6) ** penalty


@dataclass
class Group:
    live: list[tuple[tuple[int, ...], float]] = field(default_factory=lambda: [((), 0.0)])
    found: list[tuple[list[int], float, bool]] = field(default_factory=list)
    done: bool = False


@dataclass
class SlowSearch:
    """The keys have the names of the strategies'; `maximum` and `minimum` are those of the sentence."""

    table: Table
    minimum: int
    maximum: int
    beam: int
    length_penalty: float = 1.0
    normalization: str = "power"
    stop: str = "first"
    groups: int = 1
    diversity_strength: float = 0.0
    diversity_rate: float = 0.0

    def __call__(self) -> list[tuple[list[int], float, bool]]:
        groups = [Group() for _ in range(self.groups)]
        for length in range(self.maximum + 1):
            taken: Counter[int] = Counter()
            for group in groups:
                if not group.done:
                    self.step(group, length, taken)
        found = [one for group in groups for one in sorted(group.found, key=rank)[: self.width]]
        return sorted(found, key=rank)

    @property
    def width(self) -> int:
        return self.beam // self.groups

    def score(self, total: float, length: int) -> float:
        return total / divisor(length, self.length_penalty, self.normalization)

    def step(self, group: Group, length: int, taken: Counter[int]) -> None:
        allowed = [A, B, C] if length < self.minimum else [EOS, A, B, C]
        candidates = []
        for prefix, total in group.live:
            row = log_softmax(self.table(prefix))
            for place, token in enumerate(sorted(allowed, key=lambda token, row=row: -row[token])):
                cost = self.diversity_strength * taken[token] + self.diversity_rate * place
                candidates.append((total + row[token] - cost, total + row[token], prefix, token))
        candidates = sorted(candidates, reverse=True)[: 2 * self.width]
        ended = [(prefix, total) for _, total, prefix, token in candidates[: self.width] if token == EOS]
        going = [((*prefix, token), total) for _, total, prefix, token in candidates if token != EOS][: self.width]
        taken.update(prefix[-1] for prefix, _ in going)
        group.found += [(list(prefix), self.score(total, length + 1), True) for prefix, total in ended]
        group.done = self.enough(group, going, length)
        if length == self.maximum and not group.done:
            endings = {prefix for prefix, _ in ended}
            left = [pair for pair in group.live if pair[0] not in endings][: max(0, self.width - len(group.found))]
            group.found += [(list(prefix), self.score(total, max(1, length)), False) for prefix, total in left]
        group.live = going

    def enough(self, group: Group, going: list[tuple[tuple[int, ...], float]], length: int) -> bool:
        if self.stop == "never" or len(group.found) < self.width:
            return False
        if self.stop == "first":
            return True
        worst = sorted((score for _, score, _ in group.found), reverse=True)[self.width - 1]
        lengths = range(length + 2, self.maximum + 2)
        return all(self.score(total, final) <= worst for _, total in going for final in lengths)


def rank(one: tuple[list[int], float, bool]) -> tuple[bool, float]:
    return (not one[2], -one[1])
