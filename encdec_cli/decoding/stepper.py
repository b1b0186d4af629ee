"""From models and a batch of sources to the scores of the next token, one step at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from encdec_cli.decoding.scorer import Scores, normalise
from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import BOS, PAD, UNK

NEVER_WRITTEN = (PAD, BOS, UNK)


class Stepper:
    """One model, or an ensemble (the mean of the models' probabilities), over one batch of sentences.

    Args:
        models: with the same target vocabulary, on the device of `source`, in evaluation mode.
        source: [sentences, src_len] ids.
        mask: [sentences, src_len]; True where there is a token.
        beam: rows for each sentence; the rows of a sentence stand together.
        forbidden: tokens that are never candidates.
    """

    @torch.inference_mode()
    def __init__(
        self,
        models: Sequence[Model],
        source: Tensor,
        mask: Tensor,
        beam: int = 1,
        forbidden: Sequence[int] = NEVER_WRITTEN,
    ) -> None:
        if not models:
            raise ValueError("a Stepper needs at least one model")
        self.sentences = source.shape[0]
        """Sentences at the start; `keys` has one entry for each of them."""
        self.rows = self.sentences * beam
        """Rows that `step` expects now."""
        self.beam = beam
        self.device = source.device
        self._source, self._mask = source, mask
        self._forbidden = forbidden
        self._members = [(model, model.start(model.encode(source, mask), beam)) for model in models]

    @cached_property
    def keys(self) -> list[int]:
        """A 63-bit hash of each sentence's real source ids, whatever its padding and its batch mates."""
        sources, masks = self._source.cpu().numpy().astype("<i8"), self._mask.cpu().numpy()
        digests = (
            hashlib.blake2b(ids[real].tobytes(), digest_size=8) for ids, real in zip(sources, masks, strict=True)
        )
        return [int.from_bytes(digest.digest(), "little") >> 1 for digest in digests]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Scores:
        """Read one token of every row and return the scores of the next. tokens: [rows] int64."""
        if len(self._members) == 1:
            return Scores(self._logits(0, tokens), self._forbidden)
        return Scores(self._mean(tokens), self._forbidden, normalised=True)

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row rows[i]; whole sentences may leave. rows: [new_rows] int64."""
        for _, state in self._members:
            state.reorder(rows)
        self.rows = rows.shape[0]

    def _logits(self, member: int, tokens: Tensor) -> Tensor:
        model, state = self._members[member]
        hidden = model.decode(tokens[:, None], state)[:, -1]
        logits = model.project(hidden)
        # Scores writes into the logits; a model whose hidden states are its logits must not lose them.
        return logits.clone() if logits.data_ptr() == hidden.data_ptr() else logits.contiguous()

    def _mean(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities [rows, vocab] of the mean of all models' probabilities."""
        mean = self._log_probs(0, tokens)
        for member in range(1, len(self._members)):
            log_probs = self._log_probs(member, tokens)
            if mean.shape != log_probs.shape:
                raise ValueError(
                    f"an ensemble needs one target vocabulary, found sizes {mean.shape[1]} and {log_probs.shape[1]}"
                )
            mean = torch.logaddexp(mean, log_probs)
        return mean - math.log(len(self._members))

    def _log_probs(self, member: int, tokens: Tensor) -> Tensor:
        logits = self._logits(member, tokens)
        return logits.float() - normalise(logits)[0][:, None]
