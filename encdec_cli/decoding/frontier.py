"""The hypotheses that are being written: their tokens so far, and which sentences still need more of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_cli.decoding.hypothesis import Hypothesis, Limits, rank
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.scorer import Scores
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import BOS, EOS

SHRINK = 0.2
"""Share of finished sentences at which the others move together; moving costs a copy of every cache."""
ROUND = 40
"""Rows are kept at multiples of about this, because matrix kernels are made anew for every new size."""


class Frontier:
    """The rows of a running search, and the hypotheses that have left it.

    What the rows of a sentence search for together is a slot: one for each sentence, or one for each of its groups
    if they search side by side. A slot that has what it needs is marked by `retire`; its rows go on unused until
    enough sentences are done, and then all of them leave at once.

    Args:
        stepper: the models and their state; has `stepper.beam` rows for each sentence.
        limits: bounds for each sentence.
        rules: what may change the scores that the search sees; the scores of tokens stay the models'.
        groups: parts of equal size into which the rows of a sentence fall; each keeps hypotheses of its own.
    """

    def __init__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule] = (), groups: int = 1) -> None:
        sentences, rows, device = stepper.sentences, stepper.rows, stepper.device
        self.stepper = stepper
        self.beam = stepper.beam
        self.width = stepper.beam // groups
        """Rows of a slot, and the most hypotheses that are kept for it."""
        self.tokens = torch.empty((rows, 0), dtype=torch.int64, device=device)
        """[rows, written]"""
        self.sentences = torch.arange(sentences, device=device).repeat_interleave(self.beam)
        """[rows]; for which sentence of the batch each row is written."""
        self.token_scores = torch.empty((rows, 0), dtype=torch.float32, device=device)
        """[rows, written]"""
        self.results: list[list[Hypothesis]] = [[] for _ in range(sentences * groups)]
        """What has been found for each slot of the batch."""
        self._rules = rules
        self._groups = groups
        self._origin = list(range(sentences * groups))
        self._open = set(self._origin)
        self._minimum = limits.minimum.to(device)
        self._maximum: list[int] = limits.maximum.repeat_interleave(groups).tolist()
        self._last_minimum = int(limits.minimum.max()) if sentences else 0
        self._first_maximum = min(self._maximum, default=0)

    @property
    def written(self) -> int:
        """Tokens in every row."""
        return self.tokens.shape[1]

    @property
    def done(self) -> bool:
        """Whether every slot has what it needs."""
        return not self._open

    @property
    def open(self) -> list[int]:
        """The slots that need more."""
        return sorted(self._open)

    def step(self) -> Scores:
        """Read the last token of every row and return the scores of the next, after every rule.

        There is no EOS where it is too early.
        """
        last = self.tokens[:, -1] if self.written else self.tokens.new_full((self.stepper.rows,), BOS)
        self._own = self.stepper.step(last)
        if self.written < self._last_minimum:
            self._own.forbid(EOS, (self._minimum > self.written).repeat_interleave(self.beam))
        if not self._rules:
            return self._own
        log_probs = self._own.log_probs()
        for rule in self._rules:
            log_probs = rule(log_probs, self.tokens, self.sentences)
        return Scores(log_probs.contiguous(), normalised=True)

    def full(self) -> list[int]:
        """Return the open slots that may not have another token."""
        if self.written < self._first_maximum:
            return []
        return [slot for slot in self.open if self.maximum(slot) <= self.written]

    def maximum(self, slot: int) -> int:
        """Return the most tokens before EOS that a slot may write."""
        return self._maximum[self._origin[slot]]

    def found(self, slot: int) -> list[Hypothesis]:
        """Return the hypotheses that a slot has so far."""
        return self.results[self._origin[slot]]

    def finish(self, rows: Tensor, scores: Tensor | None = None) -> None:
        """Keep some rows as hypotheses that end here, with EOS as their next token.

        rows, scores: [n]; None stands for the log-probability by the models, here and below.
        """
        token_scores = torch.cat((self.token_scores[rows], self._own.of(rows, EOS)[:, None]), 1)
        self._keep(rows, scores, self.tokens[rows], token_scores, finished=True)

    def finish_written(self, rows: Tensor, scores: Tensor | None = None) -> None:
        """Keep some rows as hypotheses whose last token is EOS. rows, scores: [n]."""
        self._keep(rows, scores, self.tokens[rows, :-1], self.token_scores[rows], finished=True)

    def cut(self, rows: Tensor, scores: Tensor | None = None) -> None:
        """Keep some rows as hypotheses that end here without EOS. rows, scores: [n]."""
        self._keep(rows, scores, self.tokens[rows], self.token_scores[rows], finished=False)

    def retire(self, slots: Sequence[int]) -> Tensor | None:
        """Mark slots as done.

        Returns None, or the slots [n] of the sentences to go on with, if it is time for the others to leave;
        `extend` must then be given rows of those sentences only.
        """
        self._open.difference_update(slots)
        if self.done or not slots:
            return None
        sentences = len(self._origin) // self._groups
        busy = {slot // self._groups for slot in self._open}
        size = self._rounded(len(busy))
        if size > (1 - SHRINK) * sentences:
            return None
        idle = [sentence for sentence in range(sentences) if sentence not in busy]
        staying = sorted([*busy, *idle[: size - len(busy)]])
        kept = [sentence * self._groups + group for sentence in staying for group in range(self._groups)]
        self._open = {place for place, slot in enumerate(kept) if slot in self._open}
        self._origin = [self._origin[slot] for slot in kept]
        self._first_maximum = min(self.maximum(slot) for slot in self._open)
        self._minimum = self._minimum[torch.tensor(staying, device=self.stepper.device)]
        return torch.tensor(kept, device=self.stepper.device)

    def extend(self, rows: Tensor | None, tokens: Tensor) -> None:
        """Let new row i be old row rows[i] and its new token.

        rows: [new_rows], None if every row stays where it is; tokens: [new_rows].
        """
        log_probs = self._own.of(torch.arange(len(tokens), device=tokens.device) if rows is None else rows, tokens)
        if rows is not None:
            self.stepper.reorder(rows)
            self.tokens, self.token_scores = self.tokens[rows], self.token_scores[rows]
            self.sentences = self.sentences[rows]
        self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)
        self.token_scores = torch.cat((self.token_scores, log_probs[:, None]), 1)

    def best(self) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, at most `beam`: finished ones first, then by score."""
        starts = range(0, len(self.results), self._groups)
        joined = [[one for found in self.results[i : i + self._groups] for one in found] for i in starts]
        return [sorted(found, key=rank) for found in joined]

    def _keep(self, rows: Tensor, scores: Tensor | None, tokens: Tensor, token_scores: Tensor, finished: bool) -> None:
        scores = token_scores.sum(1) if scores is None else scores
        columns = (column.tolist() for column in (rows, scores, tokens, token_scores))
        for row, score, written, past in zip(*columns, strict=True):
            found = self.results[self._origin[row // self.width]]
            found.append(Hypothesis(written, score, past, finished))
            if len(found) > self.width:
                found.sort(key=rank)
                found.pop()

    def _rounded(self, sentences: int) -> int:
        """Return how many sentences to keep in the batch for the sake of round matrix sizes."""
        unit = max(1, ROUND // self.beam)
        if sentences >= unit:
            return -(-sentences // unit) * unit
        return 1 << (sentences - 1).bit_length() if sentences else 0


class Walk(Frontier):
    """A frontier whose rows never change places: each of them is one output, whatever the others do.

    All that a strategy does is to choose the next token of every row:

        while not walk.done:
            walk.move(choose(walk.step()))
        return walk.best()
    """

    def __init__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule] = ()) -> None:
        super().__init__(stepper, limits, rules)
        self.origin = torch.arange(stepper.rows, device=stepper.device)
        """[rows]; which row of the batch this was at the start."""
        self._ended = torch.zeros(stepper.rows, dtype=torch.bool, device=stepper.device)

    def step(self) -> Scores:
        """Return the scores of every row's next token, after every rule."""
        self._scores = super().step()
        return self._scores

    def move(self, tokens: Tensor) -> None:
        """Write the next token of every row; a row ends with EOS, at its maximum, or where no token is possible.

        tokens: [rows]. An output's score is its log-probability by the models alone.
        """
        self._collect(tokens)
        whole = self._ended.view(-1, self.beam).all(1).nonzero().flatten().tolist()
        kept = self.retire([slot for slot in whole if slot in self._open])
        rows = None
        if kept is not None:
            rows = (kept[:, None] * self.beam + torch.arange(self.beam, device=kept.device)).flatten()
            tokens = tokens[rows]
            self.origin, self._ended = self.origin[rows], self._ended[rows]
        if not self.done:
            self.extend(rows, tokens)

    def _collect(self, tokens: Tensor) -> None:
        every = torch.arange(len(tokens), device=tokens.device)
        possible = self._scores.of(every, tokens) > -torch.inf
        finished = (tokens == EOS) & possible & ~self._ended
        stopped = ~possible & ~self._ended
        for slot in self.full():
            block = slice(slot * self.beam, (slot + 1) * self.beam)
            stopped[block] = ~self._ended[block] & ~finished[block]
        if bool(finished.any()):
            self.finish(finished.nonzero().flatten())
        if bool(stopped.any()):
            self.cut(stopped.nonzero().flatten())
        self._ended = self._ended | finished | stopped
