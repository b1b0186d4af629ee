"""Sentences as ids to their hypotheses: what is decoded together, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import collate
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy, length_limit
from encdec_cli.decoding.stepper import Stepper


@dataclass
class Job:
    """One sentence to decode."""

    source: list[int]
    """Ids without EOS."""


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

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> list[list[Hypothesis]]:
        """Decode some sentences together; return the hypotheses of each, best first."""
        batch = collate([job.source for job in jobs], None, range(len(jobs)))
        source, mask = batch.source.to(self.device), batch.source_mask.to(self.device)
        stepper = Stepper(self.models, source, mask, self.strategy.rows)
        return self.strategy(stepper, self._limits(jobs), rules=[])

    def _limits(self, jobs: Sequence[Job]) -> Limits:
        maximum = torch.tensor([length_limit(self.strategy.max_length, len(job.source)) for job in jobs])
        for model in self.models:
            if model.max_positions is not None:
                maximum = maximum.clamp(max=model.max_positions - 1)  # BOS has a position too
        return Limits(minimum=torch.ones_like(maximum), maximum=maximum)
