"""Sentences as ids to their hypotheses: what is decoded together, in this process or in another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from encdec_cli.bundle.bundle import Bundle, load_alike
from encdec_cli.data.batch import Batch, collate
from encdec_cli.decoding import coverage
from encdec_cli.decoding.attention import Head, align
from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.force import as_targets
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy, length_of
from encdec_cli.decoding.stepper import NEVER_WRITTEN, Stepper
from encdec_cli.generation.rules import RuleBook
from encdec_cli.models.model import Model
from encdec_cli.models.packed import pack
from encdec_cli.text.example import Example


@dataclass
class Job:
    """One sentence to decode."""

    source: list[int]
    """Ids without EOS, as the first model reads them."""
    other_sources: list[list[int]] = field(default_factory=list)
    """The same sentence as each further model of an ensemble reads it."""
    prefix: list[int] = field(default_factory=list)
    """Ids that the output begins with."""
    constraints: list[list[list[int]]] = field(default_factory=list)
    """What the output must hold: for each constraint its alternatives, each as ids."""


def read_sources(bundles: Sequence[Bundle], example: Example) -> tuple[list[list[int]], bool]:
    """Return the source's ids as each model reads them, without EOS, and whether any was cut."""
    whole = [bundle.source.encode(bundle.task.source(example)) for bundle in bundles]
    kept = [ids[: bundle.longest_source] for ids, bundle in zip(whole, bundles, strict=True)]
    return kept, kept != whole


def longest_output(bundles: Sequence[Bundle]) -> int | None:
    """Return the most tokens before EOS that all models can write; None if there is no limit."""
    positions = [bundle.model.max_positions for bundle in bundles]
    limits = [most - 1 for most in positions if most is not None]
    return min(limits, default=None)  # BOS has a position too


@contextmanager
def threads(exact: bool) -> Iterator[None]:
    """Compute on one thread where no bit may depend on their number; that of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if exact else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Search:
    """Models and a way to search, ready to decode.

    Args:
        bundles: one model, or an ensemble of models that write the same ids.
        strategy: how to search.
        n_best: most hypotheses of a sentence that are wanted.
        ensemble: how several models are averaged.
        head: what tells, of the first model, where the tokens of a hypothesis come from; None: nobody asks.
        coverage: whether to tell how much of the source each hypothesis has left unread, by the first model.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        strategy: Strategy,
        n_best: int = 1,
        ensemble: Ensemble = MEAN,
        head: Head | None = None,
        coverage: bool = False,
    ) -> None:
        self.models = [bundle.model for bundle in bundles]
        self.device = bundles[0].device
        self.strategy = strategy
        self.n_best = n_best
        self.ensemble = ensemble
        self.head = head
        self.coverage = coverage
        self._most = longest_output(bundles)
        self.rules = RuleBook(strategy, bundles[0], self._most)
        self.helper: Model | None = None
        """What helps the strategy, if it asks for a helper."""
        path = strategy.helper()
        if path is not None:
            self.helper = load_alike("draft", path, bundles[0]).model
            pack(self.helper)
            batches = [collate([[]], None, [0]) for _ in bundles]
            self._stepper(batches, 1, NEVER_WRITTEN)  # a state that cannot be cropped is told of here, once

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> list[list[Hypothesis]]:
        """Decode some sentences together; return the hypotheses of each, best first."""
        read = zip(*([job.source, *job.other_sources] for job in jobs), strict=True)
        batches = [collate(ids, None, range(len(jobs))).to(self.device) for ids in read]
        prefixes = [job.prefix for job in jobs]
        limits = self._limits(jobs)
        stepper = self._stepper(batches, int(limits.maximum.max()), self.rules.forbidden(prefixes))
        found = self.strategy(stepper, limits, self.rules.rules(prefixes, batches[0].source))
        found = [hypotheses[: self.n_best] for hypotheses in found]
        if self.head is not None or self.coverage:
            self._look_back(batches[0], found)
        return found

    def _stepper(self, batches: Sequence[Batch], longest: int, forbidden: Sequence[int]) -> Stepper:
        """Return what gives the scores. batches: as each model reads them; longest: most tokens of any output."""
        sources = [batch.source.to(self.device) for batch in batches]
        masks = [batch.source_mask.to(self.device) for batch in batches]
        helper = None if self.helper is None else Stepper([self.helper], sources[0], masks[0])
        return self.strategy.stepper((self.models, sources, masks), self.ensemble, forbidden, helper, longest)

    def _look_back(self, batch: Batch, found: list[list[Hypothesis]]) -> None:
        """Let the first model read every hypothesis once more, to see what it looks at."""
        most = self.n_best
        known = (batch.source, batch.source_mask, as_targets(found, most, self.device), most)
        # A sentence may have fewer hypotheses than rows.
        rows = [(one, place * most + rank) for place, some in enumerate(found) for rank, one in enumerate(some)]
        if self.head is not None:
            places = align(self.models[0], self.head, *known).tolist()
            for hypothesis, row in rows:
                hypothesis.alignment = places[row][: len(hypothesis.tokens)]
        if self.coverage:
            shares = coverage.unread(self.models[0], *known).tolist()
            for hypothesis, row in rows:
                hypothesis.unread = shares[row]

    def _limits(self, jobs: Sequence[Job]) -> Limits:
        minimum, maximum = (
            torch.tensor([length_of(formula, len(job.source)) for job in jobs])
            for formula in (self.strategy.min_length, self.strategy.max_length)
        )
        if self.rules.outputs:
            minimum, maximum = torch.ones_like(minimum), torch.full_like(maximum, self.rules.outputs.longest)
        maximum = maximum.maximum(torch.tensor([max(1, len(job.prefix)) for job in jobs]))
        if self._most is not None:
            maximum = maximum.clamp(max=self._most)
        return Limits(minimum.minimum(maximum), maximum, [job.constraints for job in jobs])
