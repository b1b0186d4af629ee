"""Beam search; with a beam of 1 it is greedy search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from encdec_cli import kernels
from encdec_cli.decoding.force import as_targets
from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import MOST_NATS, Hypothesis, Limits, Strategy, rank
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Candidates, Scores
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import EOS

Stop = Literal["first", "bound", "never"]
MOST_PENALTY = 10
"""Of a length; beyond it, scores of long outputs leave what a float can tell apart."""
Normalization = Literal["power", "gnmt"]


@dataclass(kw_only=True)
class Beam(Strategy):
    """Beam search: at every step keep the `beam` best ways to go on.

    A step looks at the 2 x beam best continuations of a sentence. Those among the first `beam` that end become
    hypotheses, of which the best `beam` are kept; the best `beam` of the others go on. A sentence is done when `stop`
    says so, or at its maximum, where unfinished ones fill the places that are left.
    """

    beam: int = 5
    """Hypotheses kept for each sentence; 1 is greedy search."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by log-probability / length ** length_penalty, with EOS counted in the length (as in
    fairseq); 0 ranks by log-probability."""
    normalization: Normalization = "power"
    """What log-probabilities are divided by: length ** length_penalty, or GNMT's ((5 + length) / 6) ** length_penalty
    (https://arxiv.org/abs/1609.08144, equation 14), which is weaker on short outputs."""
    stop: Stop = "first"
    """When a sentence with `beam` hypotheses is done: at once (`first`), when nothing unfinished can beat the worst of
    them any more (`bound`), or only at its maximum length (`never`)."""
    coverage_penalty: float = 0.0
    """Weight of GNMT's coverage penalty (equation 14 of https://arxiv.org/abs/1609.08144) in the final ranking of the
    hypotheses: those that leave parts of the source unread fall behind. 0.01 to 0.03 suits length_penalty 1, GNMT's own
    0.2 a length_penalty near 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1:
            raise ValueError(f"beam is {self.beam}; a search keeps at least 1 hypothesis.")
        if not abs(self.length_penalty) <= MOST_PENALTY:
            raise ValueError(
                f"length_penalty is {self.length_penalty}; it must be from -{MOST_PENALTY} to {MOST_PENALTY}."
            )
        for key, value, known in (
            ("normalization", self.normalization, get_args(Normalization)),
            ("stop", self.stop, get_args(Stop)),
        ):
            if value not in known:
                raise ValueError(f"{key} is '{value}'; one of {', '.join(known)} is expected.")
        if not 0 <= self.coverage_penalty <= MOST_NATS:
            raise ValueError(f"coverage_penalty is {self.coverage_penalty}; it must be 0 or more, such as 0.02.")

    @torch.inference_mode()
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first. `stepper` must have `beam` rows a sentence."""
        if stepper.beam != self.beam:
            raise ValueError(f"the stepper has {stepper.beam} rows a sentence, the search needs {self.beam}")
        frontier = self._frontier(stepper, limits, rules)
        # At first the rows of a slot are alike, so only one of them counts.
        totals = torch.full((stepper.rows // frontier.width, frontier.width), -torch.inf, device=stepper.device)
        totals[:, 0] = 0
        while not frontier.done:
            totals = self._advance(frontier, totals, self._propose(frontier, frontier.step(), totals))
        found = frontier.best()
        return self._by_coverage(stepper, found) if self.coverage_penalty else found

    def _by_coverage(self, stepper: Stepper, found: list[list[Hypothesis]]) -> list[list[Hypothesis]]:
        """Add the coverage penalty to every score, and rank anew: one pass over what was found."""
        penalties = stepper.coverage_penalty(as_targets(found, self.beam, stepper.device)).view(-1, self.beam).tolist()
        ranked = []
        for hypotheses, row in zip(found, penalties, strict=True):
            both = zip(hypotheses, row, strict=False)
            scored = [replace(one, score=one.score + self.coverage_penalty * penalty) for one, penalty in both]
            ranked.append(sorted(scored, key=rank))
        return ranked

    @property
    def _groups(self) -> int:
        """Searches of a sentence that run side by side; a slot of the frontier is one of them."""
        return 1

    def _frontier(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> Frontier:
        return Frontier(stepper, limits, rules, self._groups)

    def _propose(self, frontier: Frontier, scores: Scores, totals: Tensor) -> Candidates:
        """Return the best ways to go on of each slot, in the order of the search. totals: [slots, width]."""
        return scores.best(2 * totals.shape[1], totals)

    def _advance(self, frontier: Frontier, totals: Tensor, best: Candidates) -> Tensor:
        """Collect what ends and let the rest go on; return the new totals [slots, width]."""
        going, ending, (any_ending, any_stuck, any_moved) = parted(best, totals)
        ended = self._finish(frontier, best, ending) if any_ending else []
        retired = self._satisfied(frontier, ended, going.totals)
        over = frontier.full() + (_stuck(going, totals).nonzero().flatten().tolist() if any_stuck else [])
        for slot in dict.fromkeys(over):
            if slot not in retired:
                self._cut(frontier, slot, totals[slot], best.parents[slot, : frontier.width][ending[slot]])
                retired.append(slot)
        if retired:
            going.totals[retired] = -torch.inf
        kept = frontier.retire(retired)
        if kept is None:
            kept = torch.arange(totals.shape[0], device=totals.device)
        else:
            going = Candidates(*(column[kept] for column in vars(going).values()))
            any_moved = True
        rows = (kept[:, None] * frontier.width + going.parents).flatten() if any_moved else None
        if not frontier.done:
            frontier.extend(rows, going.tokens.flatten())
        return going.totals

    def _finish(self, frontier: Frontier, best: Candidates, ending: Tensor) -> list[int]:
        """Keep the hypotheses that end in this step; return their slots."""
        slots, ranks = ending.nonzero().unbind(1)
        rows = slots * frontier.width + best.parents[slots, ranks]
        frontier.finish(rows, best.totals[slots, ranks] / self._divisor(frontier.written + 1))
        return list(dict.fromkeys(slots.tolist()))

    def _satisfied(self, frontier: Frontier, ended: list[int], totals: Tensor) -> list[int]:
        """Return the slots that need no more hypotheses. ended: where one has ended now; totals: of those that go on.

        Log-probabilities only fall, so the best that an unfinished hypothesis can reach is its total of now, divided
        by what is best for it of all lengths that it may still have (unless a rule rewards tokens).
        """
        if self.stop == "never":
            return []
        among = ended if self.stop == "first" else frontier.open
        filled = [slot for slot in among if len(frontier.found(slot)) >= frontier.width]
        if self.stop == "first" or not filled:
            return filled
        highest = totals.amax(1).tolist()
        return [slot for slot in filled if self._reach(frontier, slot, highest[slot]) <= _worst(frontier, slot)]

    def _reach(self, frontier: Frontier, slot: int, total: float) -> float:
        """Return the best score that a hypothesis of this total may end with: the divisor is monotonic in length."""
        lengths = (frontier.written + 2, frontier.maximum(slot) + 1)
        return max(total / self._divisor(length) for length in lengths)

    def _cut(self, frontier: Frontier, slot: int, totals: Tensor, ended: Tensor) -> None:
        """Fill up the hypotheses of a slot that may not go on. totals: [width]; ended: [n] rows that end here."""
        alive = totals > -torch.inf
        alive[ended] = False
        ranks = alive.nonzero().flatten()[: frontier.width - len(frontier.found(slot))]
        frontier.cut(slot * frontier.width + ranks, totals[ranks] / self._divisor(max(1, frontier.written)))

    def _divisor(self, length: int) -> float:
        """Return what the log-probability of an output of this length is divided by."""
        base = length if self.normalization == "power" else (5 + length) / 6
        return float(base**self.length_penalty)


def parted(best: Candidates, totals: Tensor) -> tuple[Candidates, Tensor, list[bool]]:
    """Return what goes on, what ends of the first `width` [slots, width], and what happened.

    That is: whether any ends, whether nothing is left to a slot that had something, whether a row changes its place.
    totals: [slots, width], those so far.
    """
    width, columns = totals.shape[1], (best.totals, best.parents, best.tokens)
    if (
        best.totals.shape[1] >= width
        and kernels.usable(best.totals, totals)
        and all(one.is_contiguous() for one in (*columns, totals))
    ):
        found, ending, bits = kernels.part(columns, totals, width, EOS)
        return Candidates(*found), ending, [bool(bits & bit) for bit in (1, 2, 4)]
    ends = best.tokens == EOS
    ending = (ends & (best.totals > -torch.inf))[:, :width]
    going = unfinished(best, ends, width)
    moved = going.parents != torch.arange(width, device=totals.device)
    # The one place where the search waits for the device, if `stop` is `first`.
    return going, ending, torch.stack((ending.any(), _stuck(going, totals).any(), moved.any())).tolist()


def _stuck(going: Candidates, totals: Tensor) -> Tensor:
    """Return which slots have nothing to go on with, though they had something: [slots] bool."""
    return (going.totals[:, 0] == -torch.inf) & (totals[:, 0] > -torch.inf)


def unfinished(best: Candidates, ends: Tensor, width: int) -> Candidates:
    """Return the first `width` of each slot that do not end, in their order. ends: [slots, k] bool."""
    # A stable sort keeps the order of rank within those that end and those that do not.
    order = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return Candidates(*(column.gather(1, order) for column in vars(best).values()))


def _worst(frontier: Frontier, slot: int) -> float:
    return min(hypothesis.score for hypothesis in frontier.found(slot))
