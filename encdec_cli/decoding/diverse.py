"""Diverse beam search: groups of beams, each of which avoids the tokens of those before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.decoding.beam import Beam, unfinished
from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import MOST_NATS
from encdec_cli.decoding.scorer import Candidates, Scores, rank
from encdec_cli.text.vocabulary import EOS

NO_TOKEN = -1


@dataclass(kw_only=True)
class Diverse(Beam):
    """Diverse beam search: `groups` searches side by side, each of `beam` / `groups` hypotheses.

    Vijayakumar et al. 2016, "Diverse Beam Search", https://arxiv.org/abs/1610.02424, with their Hamming diversity:
    the groups take their steps one after the other, and a token costs `diversity_strength` for each hypothesis of the
    groups before that goes on with it in the same step. EOS costs nothing. What is paid counts in the step alone and
    in no score; fairseq and Hugging Face carry it along.
    """

    groups: int = 0
    """Groups among which the `beam` hypotheses are shared out evenly; 1 is plain beam search, 0 is one for each."""
    diversity_strength: float = 0.5
    """What a token costs for each hypothesis of an earlier group that has just taken it, in nats; the paper finds
    0.2 to 0.8 good."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 0 or (self.groups and self.beam % self.groups):
            raise ValueError(
                f"the beam must be a multiple of the groups, but {self.beam} is none of {self.groups} "
                "(0 groups are one for each hypothesis)."
            )
        if not 0 <= self.diversity_strength <= MOST_NATS:
            raise ValueError(
                f"diversity_strength is {self.diversity_strength}; it must be from 0 to {MOST_NATS:,.0f} nats."
            )

    @property
    def _groups(self) -> int:
        return self.groups or self.beam

    def _propose(self, frontier: Frontier, scores: Scores, totals: Tensor) -> Candidates:
        """Return the best ways to go on of each slot, one group after the other, all sentences at once.

        At most `beam - width` tokens cost something, so the 2 x width best of a row, whatever is paid, are among its
        `beam + width` best by the models.
        """
        width = totals.shape[1]
        log_probs, tokens = scores.top(self.beam + width)
        shape = (-1, self._groups, width, log_probs.shape[1])
        values = totals.view(shape[:3])[..., None] + log_probs.view(shape)
        tokens = tokens.view(shape)
        taken = tokens.new_empty((len(tokens), 0))
        proposals = []
        for group in range(self._groups):
            counts = (tokens[:, group, :, :, None] == taken[:, None, None]).sum(-1)
            best = rank(
                values[:, group], self.diversity_strength * counts, tokens[:, group], 2 * width, scores.shape[1]
            )
            going = unfinished(best, best.tokens == EOS, width)
            taken = torch.cat((taken, going.tokens.where(going.totals > -torch.inf, NO_TOKEN)), 1)
            proposals.append(best)
        columns = zip(*(vars(best).values() for best in proposals), strict=True)
        return Candidates(*(torch.stack(column, 1).flatten(0, 1) for column in columns))
