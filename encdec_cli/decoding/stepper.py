"""From models and a batch of sources to the scores of the next token, one step at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from encdec_cli.decoding.scorer import Scores, normalise
from encdec_cli.errors import UsageError
from encdec_cli.models.model import Croppable, Model
from encdec_cli.text.vocabulary import BOS, PAD, UNK

NEVER_WRITTEN = (PAD, BOS, UNK)


class Stepper:
    """One model, or an ensemble (the mean of the models' probabilities), over one batch of sentences.

    Args:
        models: with the same target vocabulary, on the device of `source`, in evaluation mode.
        source: [sentences, src_len] ids.
        mask: [sentences, src_len]; True where there is a token.
        beam: rows for each sentence; the rows of a sentence stand together.
    """

    @torch.inference_mode()
    def __init__(
        self,
        models: Sequence[Model],
        source: Tensor,
        mask: Tensor,
        beam: int = 1,
    ) -> None:
        if not models:
            raise ValueError("a Stepper needs at least one model")
        self.sentences = source.shape[0]
        """Sentences at the start; `keys` has one entry for each of them."""
        self.rows = self.sentences * beam
        """Rows that `step` expects now."""
        self.length = 0
        """Tokens of every row that have been read, BOS included."""
        self.beam = beam
        self.device = source.device
        self._source, self._mask = source, mask
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
        return self.scores(self.read(tokens[:, None])[:, 0])

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read some tokens of every row; return what `scores` takes, after each of them.

        tokens: [rows, new] int64; returns [rows, new, vocab].
        """
        flat = self._logits(0, tokens) if len(self._members) == 1 else self._mean(tokens)
        self.length += tokens.shape[1]
        return flat.view(*tokens.shape, -1)

    def scores(self, logits: Tensor) -> Scores:
        """Return the scores of the next token after one of the tokens that were read. logits: [rows, vocab]."""
        return Scores(logits.contiguous(), NEVER_WRITTEN, normalised=len(self._members) > 1)

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

    def _logits(self, member: int, tokens: Tensor) -> Tensor:
        """Return the logits [rows x new, vocab] after each of tokens [rows, new]."""
        model, state = self._members[member]
        hidden = model.decode(tokens, state).flatten(0, 1)
        logits = model.project(hidden)
        # Scores writes into the logits; a model whose hidden states are its logits must not lose them.
        return logits.clone() if logits.data_ptr() == hidden.data_ptr() else logits.contiguous()

    def _mean(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities [rows x new, vocab] of the mean of all models' probabilities."""
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
