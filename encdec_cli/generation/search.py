"""Sentences as ids to their hypotheses: what is decoded together, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import collate
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy, length_of
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.generation.rules import RuleBook


@dataclass
class Job:
    """One sentence to decode."""

    source: list[int]
    """Ids without EOS."""
    prefix: list[int] = field(default_factory=list)
    """Ids that the output begins with."""


class Search:
    """Models and a way to search, ready to decode.

    Args:
        bundles: one model, or an ensemble of models that read and write the same ids.
        strategy: how to search.
    """

    def __init__(self, bundles: Sequence[Bundle], strategy: Strategy) -> None:
        self.models = [bundle.model for bundle in bundles]
        self.device = bundles[0].device
        self.strategy = strategy
        self.rules = RuleBook(strategy, bundles[0])

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> list[list[Hypothesis]]:
        """Decode some sentences together; return the hypotheses of each, best first."""
        batch = collate([job.source for job in jobs], None, range(len(jobs))).to(self.device)
        prefixes = [job.prefix for job in jobs]
        forbidden = self.rules.forbidden(prefixes)
        stepper = Stepper(self.models, batch.source, batch.source_mask, self.strategy.beam, forbidden)
        return self.strategy(stepper, self._limits(jobs), self.rules.rules(prefixes, batch.source))

    def _limits(self, jobs: Sequence[Job]) -> Limits:
        minimum, maximum = (
            torch.tensor([length_of(formula, len(job.source)) for job in jobs])
            for formula in (self.strategy.min_length, self.strategy.max_length)
        )
        if self.rules.outputs:
            minimum, maximum = torch.ones_like(minimum), torch.full_like(maximum, self.rules.outputs.longest)
        maximum = maximum.maximum(torch.tensor([max(1, len(job.prefix)) for job in jobs]))
        for model in self.models:
            if model.max_positions is not None:
                maximum = maximum.clamp(max=model.max_positions - 1)  # BOS has a position too
        return Limits(minimum.minimum(maximum), maximum)
