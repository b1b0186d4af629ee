"""Lexically constrained beam search: outputs that hold given words or phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.constraints import Automata, Progress
from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Candidates, Scores, pack
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import EOS

BANKS = 1 << 20
"""More than the tokens that any hypothesis can lack."""


@dataclass(kw_only=True)
class Constrained(Beam):
    """Beam search whose outputs hold the words or phrases that a line asks for.

    Dynamic beam allocation (Post and Vilar 2018, https://arxiv.org/abs/1804.06609), for a whole batch at once (Hu et
    al. 2019, https://aclanthology.org/N19-1090). Candidates are those of beam search, the best token of every row, and
    every token that brings a row nearer to a constraint. They are put in banks by the number of tokens that are still
    missing; the beam takes the best of each bank in turn, the bank that lacks least first. EOS is a candidate only
    where nothing is missing. A sentence without constraints is searched by beam search.
    """

    reads_constraints: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outputs:
            raise ValueError("outputs: the list alone says what is written; leave it out, or search with beam.")

    def _frontier(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> Frontier:
        asked = any(limits.constraints)
        return ConstrainedFrontier(stepper, limits, rules) if asked else super()._frontier(stepper, limits, rules)

    def _propose(self, frontier: Frontier, scores: Scores, totals: Tensor) -> Candidates:
        """Return the candidates of a step, in the order in which the beam takes them. totals: [sentences, beam]."""
        if isinstance(frontier, ConstrainedFrontier):
            return _candidates(frontier, scores, totals)
        return super()._propose(frontier, scores, totals)


class ConstrainedFrontier(Frontier):
    """A frontier that knows how far each row is with the phrases of its sentence."""

    def __init__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> None:
        super().__init__(stepper, limits, rules)
        self.automata = Automata(limits.constraints, stepper.device)
        self.progress = self.automata.start(self.beam)
        """Of [rows]."""

    @property
    def places(self) -> Tensor:
        """[sentences]; which sentences of the batch are still in the search."""
        return self.sentences[:: self.beam]

    def missing(self) -> Tensor:
        """Return the number of tokens that each row still lacks, [rows]."""
        return self.automata.missing(self.progress)

    def step(self) -> Scores:
        """Return the scores of the next token; there is no EOS where a constraint is not met."""
        scores = super().step()
        scores.forbid(EOS, self.missing() > 0)
        return scores

    def extend(self, rows: Tensor | None, tokens: Tensor) -> None:
        """Let new row i be old row rows[i] and its new token; see `Frontier.extend`."""
        super().extend(rows, tokens)
        parents = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
        before = self.progress.at(parents.view(-1, self.beam))
        after = self.automata.read(self.places, before, tokens.view(-1, self.beam))
        self.progress = Progress(after.nodes.flatten(), after.met.flatten(0, 1))

    def cut(self, rows: Tensor, scores: Tensor | None = None) -> None:
        """Keep some rows of a sentence as hypotheses without EOS: those alone that lack the fewest tokens.

        Where others have met all constraints, one that has not is no output. rows, scores: [n].
        """
        if len(rows):
            missing = self.missing()[rows]
            kept = missing == (0 if self.found(int(rows[0]) // self.beam) else int(missing.min()))
            rows, scores = rows[kept], None if scores is None else scores[kept]
        super().cut(rows, scores)


def _candidates(frontier: ConstrainedFrontier, scores: Scores, totals: Tensor) -> Candidates:
    """Return the candidates of a step in the order in which the beam takes them; impossible ones stand last.

    totals: [sentences, beam] log-probabilities of the rows.
    """
    sentences, beam = totals.shape
    best = scores.best(2 * beam, totals)
    home = torch.arange(beam, device=totals.device).expand(sentences, beam)
    wanted = frontier.automata.alphabets[frontier.places]
    each = wanted.shape[1]
    parents = torch.cat((best.parents, home, home.repeat_interleave(each, 1)), 1)
    tokens = torch.cat((best.tokens, scores.top(1)[1].view(sentences, beam), wanted.repeat(1, beam)), 1)
    rows = parents + torch.arange(sentences, device=totals.device)[:, None] * beam
    found = totals.gather(1, parents) + scores.of(rows.flatten(), tokens.flatten()).view_as(tokens)
    missing = frontier.automata.missing(frontier.automata.read(frontier.places, frontier.progress.at(rows), tokens))
    # Tokens of phrases count only if they bring a row nearer; PAD, which fills up, is never possible.
    useless = missing >= frontier.missing()[rows]
    useless[:, : -beam * each] = False
    ids = parents * scores.shape[1] + tokens
    found = found.masked_fill(useless | _repeated(ids), -torch.inf)
    order = pack(found, ids).argsort(dim=1, descending=True)
    banks = missing.masked_fill(found == -torch.inf, BANKS * BANKS)
    order = order.gather(1, take_turns(banks.gather(1, order)))
    return Candidates(found.gather(1, order), parents.gather(1, order), tokens.gather(1, order))


def _repeated(ids: Tensor) -> Tensor:
    """Return where a number has stood before in its row. ids: [sentences, n]; returns the same shape, bool."""
    ordered, order = ids.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    return repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])


def take_turns(banks: Tensor) -> Tensor:
    """Return an order that takes the first of every bank, the lowest bank first, then the second of every bank.

    banks: [sentences, n] int64, that of each candidate, the candidates best first; those of a bank above BANKS, which
    are out of the game, come last. Returns places, [sentences, n].
    """
    ordered, order = banks.sort(dim=1, stable=True)
    place = torch.arange(banks.shape[1], device=banks.device).expand_as(banks)
    first = torch.ones_like(banks, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - place.masked_fill(~first, 0).cummax(dim=1).values
    return order.gather(1, (rank * BANKS + ordered).argsort(dim=1, stable=True))
