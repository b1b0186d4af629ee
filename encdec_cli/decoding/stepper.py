"""From models and a batch of sources to the scores of the next token, one step at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from encdec_cli.decoding import coverage
from encdec_cli.decoding.ensemble import MEAN, Ensemble, for_each
from encdec_cli.decoding.scorer import Scores
from encdec_cli.errors import UsageError
from encdec_cli.models.model import Croppable, Model
from encdec_cli.text.vocabulary import BOS, PAD, UNK

NEVER_WRITTEN = (PAD, BOS, UNK)


class Stepper:
    """One model, or an ensemble, over one batch of sentences.

    Args:
        models: with the same target vocabulary, on the device of `source`, in evaluation mode.
        source: [sentences, src_len] ids; or one such tensor for each model, as each has its own source vocabulary.
        mask: likewise; True where there is a token.
        beam: rows for each sentence; the rows of a sentence stand together.
        ensemble: how several models are averaged.
        forbidden: tokens that are never candidates.
    """

    @torch.inference_mode()
    def __init__(
        self,
        models: Sequence[Model],
        source: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        beam: int = 1,
        ensemble: Ensemble = MEAN,
        forbidden: Sequence[int] = NEVER_WRITTEN,
    ) -> None:
        if not models:
            raise ValueError("a Stepper needs at least one model")
        sources, masks = for_each(models, source), for_each(models, mask)
        self.sentences = sources[0].shape[0]
        """Sentences at the start; `keys` has one entry for each of them."""
        self.rows = self.sentences * beam
        """Rows that `step` expects now."""
        self.length = 0
        """Tokens of every row that have been read, BOS included."""
        self.beam = beam
        self.device = sources[0].device
        self.hidden: list[Tensor] = []
        """What each model made of the tokens that were read last, one [rows, dim] a model."""
        self._source, self._mask = sources[0], masks[0]
        self._ensemble = ensemble
        self._forbidden = forbidden
        self._members = [
            (model, model.start(model.encode(ids, real), beam))
            for model, ids, real in zip(models, sources, masks, strict=True)
        ]

    @cached_property
    def keys(self) -> list[int]:
        """A 63-bit hash of each sentence's real ids for the first model, whatever its padding and its batch mates."""
        sources, masks = self._source.cpu().numpy().astype("<i8"), self._mask.cpu().numpy()
        digests = (
            hashlib.blake2b(ids[real].tobytes(), digest_size=8) for ids, real in zip(sources, masks, strict=True)
        )
        return [int.from_bytes(digest.digest(), "little") >> 1 for digest in digests]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Scores:
        """Read one token of every row and return the scores of the next. tokens: [rows] int64."""
        return self.scores(self.read(tokens[:, None])[:, 0])

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read some tokens of every row; return what `scores` takes, after each of them.

        tokens: [rows, new] int64; returns [rows, new, vocab].
        """
        self.hidden = []
        logits = [self._logits(member, tokens) for member in range(len(self._members))]
        flat = logits[0] if len(logits) == 1 else self._ensemble.log_probs(logits)
        self.length += tokens.shape[1]
        return flat.view(*tokens.shape, -1)

    def scores(self, logits: Tensor) -> Scores:
        """Return the scores of the next token after one of the tokens that were read. logits: [rows, vocab]."""
        return Scores(logits.contiguous(), self._forbidden, normalised=len(self._members) > 1)

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length` of every row. Raises UsageError if a model's state cannot."""
        for model, state in self._members:
            if not isinstance(state, Croppable):
                raise UsageError(
                    f"the state of a {type(model).__name__} cannot forget tokens, which this strategy asks of it; give "
                    f"{type(state).__name__} a method `crop(length)`, or choose another strategy."
                )
            state.crop(length)
        self.length = min(self.length, length)

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row rows[i]; whole sentences may leave. rows: [new_rows] int64."""
        for _, state in self._members:
            state.reorder(rows)
        self.rows = rows.shape[0]

    def coverage_penalty(self, target: Tensor) -> Tensor:
        """Return GNMT's coverage penalty, without its weight, of known outputs, by the first model: [rows].

        target: [rows, tgt_len], `beam` rows for each sentence of the start, as `force.as_targets` makes it. Raises
        UsageError for a model without attention.
        """
        model, _ = self._members[0]
        return coverage.penalty(coverage.received(model, self._source, self._mask, target, self.beam))

    def _logits(self, member: int, tokens: Tensor) -> Tensor:
        """Return the logits [rows x new, vocab] after each of tokens [rows, new]."""
        model, state = self._members[member]
        states = model.decode(tokens, state)
        self.hidden.append(states[:, -1])
        hidden = states.flatten(0, 1)
        logits = model.project(hidden)
        # Scores writes into the logits; a model whose hidden states are its logits must not lose them.
        return logits.clone() if logits.data_ptr() == hidden.data_ptr() else logits.contiguous()
