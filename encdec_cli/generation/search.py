"""Sentences as ids to their hypotheses: what is decoded together, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, collate
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy, length_limit
from encdec_cli.decoding.speculative import DraftedStepper, Speculative
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import BundleError


@dataclass
class Job:
    """One sentence to decode."""

    source: list[int]
    """Ids without EOS."""
    constraints: list[list[list[int]]] = field(default_factory=list)
    """What the output must hold: for each constraint its alternatives, each as ids."""


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
        self.draft: Bundle | None = None
        """What proposes tokens, if the strategy asks for a draft."""
        if isinstance(strategy, Speculative):
            self.draft = load_draft(strategy.draft, bundles[0])
            self._stepper(collate([[]], None, [0]), 1)  # a state that cannot be cropped is told of here, once

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> list[list[Hypothesis]]:
        """Decode some sentences together; return the hypotheses of each, best first."""
        batch = collate([job.source for job in jobs], None, range(len(jobs)))
        limits = self._limits(jobs)
        return self.strategy(self._stepper(batch, int(limits.maximum.max())), limits, rules=[])

    def _stepper(self, batch: Batch, longest: int) -> Stepper:
        """Return what gives the scores; longest: most tokens of any output."""
        source, mask = batch.source.to(self.device), batch.source_mask.to(self.device)
        if self.draft is None or not isinstance(self.strategy, Speculative):
            return Stepper(self.models, source, mask, self._beam)
        draft = Stepper([self.draft.model], source, mask)
        return DraftedStepper(self.models, source, mask, draft, self.strategy.draft_tokens, longest)

    @property
    def _beam(self) -> int:
        return self.strategy.beam

    def _limits(self, jobs: Sequence[Job]) -> Limits:
        maximum = torch.tensor([length_limit(self.strategy.max_length, len(job.source)) for job in jobs])
        for model in self.models:
            if model.max_positions is not None:
                maximum = maximum.clamp(max=model.max_positions - 1)  # BOS has a position too
        return Limits(torch.ones_like(maximum), maximum, [job.constraints for job in jobs])


def load_draft(path: Path, bundle: Bundle) -> Bundle:
    """Return the bundle at `path`, whose model is to propose tokens for that of `bundle`.

    Raises BundleError unless it reads and writes the same ids, and as many of them.
    """
    draft = Bundle.load(path, str(bundle.device), next(bundle.model.parameters()).dtype)
    for side, ours, theirs in (("source", bundle.source, draft.source), ("target", bundle.target, draft.target)):
        if ours.vocabulary.sha256 != theirs.vocabulary.sha256:
            raise BundleError(
                f"draft {path}: its {side} vocabulary is another than the model's ({len(theirs.vocabulary)} and "
                f"{len(ours.vocabulary)} tokens); train both on the same prepared data."
            )
    most, least = draft.model.max_positions, bundle.model.max_positions
    if most is not None and (least is None or most < least):
        raise BundleError(
            f"draft {path}: reads {most} positions at most, fewer than the model it is to help; train it with "
            "`positions: sinusoidal` or `rotary`, or with as many positions."
        )
    return draft
