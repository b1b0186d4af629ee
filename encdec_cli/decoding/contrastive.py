"""Contrastive search: a probable token that does not repeat what the decoder has been through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from encdec_cli.decoding.frontier import Frontier
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Candidates, pack
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import EOS


@dataclass(kw_only=True)
class Contrastive(Strategy):
    """Contrastive search: of the `top_k` best tokens, take a probable one whose state is unlike all states before.

    Su et al. 2022, "A Contrastive Framework for Neural Text Generation", https://arxiv.org/abs/2202.06417, equation 5:
    the token v with the highest (1 - penalty_alpha) p(v) - penalty_alpha max_j cos(h_v, h_j), where h_v is the
    decoder's last hidden state once it has read v, and h_j those of the tokens before, BOS included. Several models:
    the mean of their probabilities, and the mean of their similarities. The last token that may be read is followed by
    EOS if that is the most probable. One output a sentence; its score is its log-probability by the models.
    """

    beam: int = 1
    """Outputs for each sentence: no other number is possible."""
    penalty_alpha: float = 0.6
    """Weight of the likeness to earlier states, from 0 to 1; 0 is greedy search."""
    top_k: int = 4
    """Tokens that are tried at each step; 1 is greedy search. A step costs as much as one of a beam of this size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam != 1:
            raise ValueError(f"beam is {self.beam}; contrastive search gives one output a sentence, so it must be 1.")
        if not 0 <= self.penalty_alpha <= 1:
            raise ValueError(f"penalty_alpha is {self.penalty_alpha}; it must be at least 0 and at most 1.")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1 token must be tried.")

    @property
    def rows(self) -> int:
        """A row for each token that is tried."""
        return self.top_k

    @torch.inference_mode()
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return one output for each sentence. `stepper` must have `top_k` rows a sentence."""
        if stepper.beam != self.top_k:
            raise ValueError(f"the stepper has {stepper.beam} rows a sentence, the search needs {self.top_k}")
        frontier = Frontier(stepper, limits, rules)
        # Before the first token all rows of a sentence are BOS, and the first of them is chosen.
        tried = torch.full((stepper.sentences, self.top_k), -torch.inf, device=stepper.device)
        tried[:, 0] = 0
        past = torch.empty((stepper.sentences, 0, 0), device=stepper.device)
        while not frontier.done:
            scores = frontier.step()
            states = _states(stepper).view(len(tried), self.top_k, -1)
            chosen = self._choose(tried, states, past)
            state = states.gather(1, chosen[:, None, None].expand(-1, -1, states.shape[2]))
            past = torch.cat((past, state), 1) if frontier.written else state
            only = torch.full_like(tried, -torch.inf).scatter_(1, chosen[:, None], 0)
            best = scores.best(self.top_k, only)
            rows = torch.arange(len(tried), device=tried.device) * self.top_k + chosen
            kept = frontier.retire(self._collect(frontier, rows, best))
            if kept is not None:
                rows, past, best = rows[kept], past[kept], Candidates(*(column[kept] for column in vars(best).values()))
            if not frontier.done:
                frontier.extend(rows.repeat_interleave(self.top_k), best.tokens.flatten())
            tried = best.totals
        return frontier.best()

    def _choose(self, tried: Tensor, states: Tensor, past: Tensor) -> Tensor:
        """Return the place of the best token that has been tried, [sentences]; of equals, the most probable.

        tried: [sentences, top_k] log-probabilities; states: [sentences, top_k, dim]; past: [sentences, written, dim].
        """
        values = (1 - self.penalty_alpha) * tried.exp()
        if past.shape[1]:
            values = values - self.penalty_alpha * (states @ past.transpose(1, 2)).amax(-1)
        values = values.masked_fill(tried == -torch.inf, -torch.inf)
        return pack(values, torch.arange(self.top_k, device=tried.device)).argmax(1)

    def _collect(self, frontier: Frontier, rows: Tensor, best: Candidates) -> list[int]:
        """Keep the outputs that end; return their sentences. rows: [sentences]; best: what may follow them."""
        last = frontier.tokens[rows, -1] if frontier.written else torch.zeros_like(rows)
        ended, stuck, eos_is_next = torch.stack(
            (last == EOS, best.totals[:, 0] == -torch.inf, best.tokens[:, 0] == EOS)
        ).tolist()
        full, over = frontier.full(), []
        for slot in frontier.open:
            if ended[slot]:
                keep = frontier.finish_written
            elif stuck[slot] or (slot in full and not eos_is_next[slot]):
                keep = frontier.cut
            elif slot in full:
                keep = frontier.finish
            else:
                continue
            keep(rows[slot : slot + 1])
            over.append(slot)
        return over


def _states(stepper: Stepper) -> Tensor:
    """Return a vector for each row, [rows, dim]; products of two of them are the mean of the models' cosines."""
    units = [normalize(hidden.float(), dim=-1) for hidden in stepper.hidden]
    return torch.cat(units, -1) / math.sqrt(len(units))
