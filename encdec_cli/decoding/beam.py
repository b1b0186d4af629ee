"""Beam search; with a beam of 1 it is greedy search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from encdec_cli.decoding.force import as_targets
from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Candidates
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import EOS


@dataclass(kw_only=True)
class Beam(Strategy):
    """Beam search: at every step keep the `beam` best ways to go on.

    A step looks at the 2 x beam best continuations of a sentence. Those among the first `beam` that end become
    hypotheses, the best `beam` of the others go on. A sentence is done when it has `beam` hypotheses, or at its
    maximum, where unfinished ones fill the places that are left.
    """

    beam: int = 5
    """Hypotheses kept for each sentence; 1 is greedy search."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by log-probability / length ** length_penalty, with EOS counted in the length (as in
    fairseq); 0 ranks by log-probability. GNMT's ((5 + length) / 6) ** alpha, https://arxiv.org/abs/1609.08144,
    is weaker on short outputs."""
    coverage_penalty: float = 0.0
    """Weight of GNMT's coverage penalty (equation 14 of https://arxiv.org/abs/1609.08144) in the final ranking of the
    hypotheses: those that leave parts of the source unread fall behind. 0.01 to 0.03 suits length_penalty 1, GNMT's own
    0.2 a length_penalty near 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1:
            raise ValueError(f"beam is {self.beam}; a search keeps at least 1 hypothesis.")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; a finite number is needed, such as 1.0.")
        if not (math.isfinite(self.coverage_penalty) and self.coverage_penalty >= 0):
            raise ValueError(f"coverage_penalty is {self.coverage_penalty}; it must be 0 or more, such as 0.02.")

    @torch.inference_mode()
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first. `stepper` must have `beam` rows a sentence."""
        if stepper.beam != self.beam:
            raise ValueError(f"the stepper has {stepper.beam} rows a sentence, the search needs {self.beam}")
        frontier = Frontier(stepper, limits, rules)
        # At first the rows of a sentence are alike, so only one of them counts.
        totals = torch.full((stepper.sentences, self.beam), -torch.inf, device=stepper.device)
        totals[:, 0] = 0
        while not frontier.done:
            totals = self._advance(frontier, totals, frontier.step().best(2 * self.beam, totals))
        found = frontier.best()
        return self._by_coverage(stepper, found) if self.coverage_penalty else found

    def _by_coverage(self, stepper: Stepper, found: list[list[Hypothesis]]) -> list[list[Hypothesis]]:
        """Add the coverage penalty to every score, and rank anew: one pass over what was found."""
        penalties = stepper.coverage_penalty(as_targets(found, self.beam, stepper.device)).view(-1, self.beam).tolist()
        ranked = []
        for hypotheses, row in zip(found, penalties, strict=True):
            both = zip(hypotheses, row, strict=False)
            scored = [replace(one, score=one.score + self.coverage_penalty * penalty) for one, penalty in both]
            ranked.append(sorted(scored, key=lambda one: (not one.finished, -one.score)))
        return ranked

    def _advance(self, frontier: Frontier, totals: Tensor, best: Candidates) -> Tensor:
        """Collect what ends and let the rest go on; return the new totals [sentences, beam]."""
        ends = best.tokens == EOS
        ending = (ends & (best.totals > -torch.inf))[:, : self.beam]
        # A stable sort keeps the order of rank within those that end and those that do not.
        order = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.beam]
        going = Candidates(*(column.gather(1, order) for column in vars(best).values()))
        stuck = (going.totals[:, 0] == -torch.inf) & (totals[:, 0] > -torch.inf)
        home = torch.arange(self.beam, device=order.device)
        # The one place where the search waits for the device.
        any_ending, any_stuck, any_moved = torch.stack(
            (ending.any(), stuck.any(), (going.parents != home).any())
        ).tolist()
        retired: list[int] = []
        if any_ending:
            retired = self._finish(frontier, best, ending)
        over = frontier.full() + (stuck.nonzero().flatten().tolist() if any_stuck else [])
        for slot in dict.fromkeys(over):
            if slot not in retired:
                self._cut(frontier, slot, totals[slot], best.parents[slot, : self.beam][ending[slot]])
                retired.append(slot)
        if retired:
            going.totals[retired] = -torch.inf
        kept = frontier.retire(retired)
        if kept is None:
            kept = torch.arange(totals.shape[0], device=order.device)
        else:
            going = Candidates(*(column[kept] for column in vars(going).values()))
            any_moved = True
        rows = (kept[:, None] * self.beam + going.parents).flatten() if any_moved else None
        if not frontier.done:
            frontier.extend(rows, going.tokens.flatten())
        return going.totals

    def _finish(self, frontier: Frontier, best: Candidates, ending: Tensor) -> list[int]:
        """Keep the hypotheses that end in this step; return the sentences that have enough."""
        slots, ranks = ending.nonzero().unbind(1)
        rows = slots * self.beam + best.parents[slots, ranks]
        length = frontier.written + 1
        frontier.finish(rows, best.totals[slots, ranks] / length**self.length_penalty)
        return [slot for slot in dict.fromkeys(slots.tolist()) if len(frontier.found(slot)) >= self.beam]

    def _cut(self, frontier: Frontier, slot: int, totals: Tensor, ended: Tensor) -> None:
        """Fill up the hypotheses of a sentence that may not go on. totals: [beam]; ended: [n] rows that end here."""
        alive = totals > -torch.inf
        alive[ended] = False
        ranks = alive.nonzero().flatten()[: self.beam - len(frontier.found(slot))]
        length = max(1, frontier.written)
        frontier.cut(slot * self.beam + ranks, totals[ranks] / length**self.length_penalty)
