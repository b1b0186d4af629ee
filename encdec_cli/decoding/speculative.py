"""Speculative decoding: greedy search where a small model proposes tokens and the large one reads them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.frontier import Walk
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Scores
from encdec_cli.decoding.stepper import NEVER_WRITTEN, Stepper
from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import EOS


@dataclass(kw_only=True)
class Speculative(Strategy):
    """Greedy search, helped by a small draft model: the output is that of the large model alone.

    Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, for greedy search. The search itself knows nothing of the
    draft: it is given a `DraftedStepper`. The score is the log-probability, as of beam search with a length penalty
    of 0.
    """

    one_by_one: ClassVar[bool] = True

    draft: Path
    """Bundle or run of the draft model, which reads and writes the same vocabularies."""
    draft_tokens: int = 4
    """Tokens that the draft model proposes at a time (the paper's gamma)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam != 1:
            raise ValueError(f"beam is {self.beam}; speculative decoding writes 1 output a line.")
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; at least 1 token must be proposed.")

    def helper(self) -> Path:
        """Return the draft."""
        return self.draft

    def stepper(
        self,
        models: tuple[Sequence[Model], Sequence[Tensor], Sequence[Tensor]],
        ensemble: Ensemble,
        forbidden: Sequence[int],
        helper: Stepper | None,
        longest: int,
    ) -> Stepper:
        """Return a stepper to which the draft, given as `helper`, proposes; see `Strategy.stepper`."""
        if helper is None:
            raise ValueError("speculative decoding without its draft")
        return DraftedStepper(*models, Draft(helper, self.draft_tokens, longest), ensemble, forbidden)

    @torch.inference_mode()
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the greedy output of each sentence."""
        walk = Walk(stepper, limits, rules)
        while not walk.done:
            walk.move(walk.step().top(1)[1].squeeze(1))
        return walk.best()


@dataclass
class Draft:
    """What proposes tokens for a batch."""

    stepper: Stepper
    """A small model over the same sentences."""
    tokens: int
    """Proposals at a time."""
    longest: int
    """Most tokens of any output; nothing is proposed beyond."""


class DraftedStepper(Stepper):
    """A stepper that gives the scores of its models, most of them before they are asked for.

    When `step` is given a token that was not foreseen, a draft proposes the next ones and the models read them all in
    one call. As long as the following steps are given the proposed tokens, their scores are there already; then what
    was read in vain is forgotten. So a search decides by the scores of the models, and the draft decides only how
    often they are called. All rows of a batch go on together: a step is foreseen if it is for every row that has not
    ended, so the gain is largest for one sentence at a time.

    Args:
        models: as for `Stepper`, one row a sentence.
        source: as for `Stepper`.
        mask: as for `Stepper`.
        draft: what proposes.
        ensemble: as for `Stepper`.
        forbidden: as for `Stepper`.
    """

    def __init__(
        self,
        models: Sequence[Model],
        source: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        draft: Draft,
        ensemble: Ensemble = MEAN,
        forbidden: Sequence[int] = NEVER_WRITTEN,
    ) -> None:
        super().__init__(models, source, mask, 1, ensemble, forbidden)
        self._draft = draft
        self._ended = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        self._written = torch.empty((self.rows, 0), dtype=torch.int64, device=self.device)
        """[rows, written]; the tokens that `step` was given."""
        self._foreseen = self._written
        """[rows, n]; the tokens that the models have read beyond those."""
        self._ahead = torch.empty((self.rows, 0, 0), device=self.device)
        """[rows, n, vocab]; what the models say after each of them."""
        for stepper in (self, draft.stepper):  # fails at once where a state cannot go back
            stepper.crop(0)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Scores:
        """Read one token of every row and return the scores of the next. tokens: [rows] int64."""
        self._ended |= tokens == EOS
        self._written = torch.cat((self._written, tokens[:, None]), 1)
        if not (self._foreseen.shape[1] and bool(((self._foreseen[:, 0] == tokens) | self._ended).all())):
            self._look_ahead(tokens)
        logits = self._ahead[:, 0]
        self._foreseen, self._ahead = self._foreseen[:, 1:], self._ahead[:, 1:]
        return self.scores(logits)

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row rows[i]; whole sentences may leave. rows: [new_rows] int64."""
        super().reorder(rows)
        self._draft.stepper.reorder(rows)
        self._ended, self._written = self._ended[rows], self._written[rows]
        self._foreseen, self._ahead = self._foreseen[rows], self._ahead[rows]

    def _look_ahead(self, tokens: Tensor) -> None:
        """Let the models read the tokens [rows] and what the draft proposes after them."""
        before = self._written.shape[1] - 1
        self.crop(before)
        proposals = self._propose(min(self._draft.tokens, self._draft.longest - before))
        self._foreseen = torch.cat((tokens[:, None], *proposals), 1)
        self._ahead = self.read(self._foreseen)

    def _propose(self, count: int) -> list[Tensor]:
        """Return what the draft writes after all that is written, at most `count` times [rows, 1]."""
        draft = self._draft.stepper
        draft.crop(self._written.shape[1] - 1)
        proposals: list[Tensor] = []
        unread = self._written[:, draft.length :]
        while len(proposals) < count:
            unread = draft.read(unread)[:, -1].argmax(-1, keepdim=True)
            proposals.append(unread)
            if bool((unread == EOS).all()):
                break
        return proposals
