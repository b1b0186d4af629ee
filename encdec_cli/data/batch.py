"""Examples of like length as padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from encdec_cli.data.store import Ragged
from encdec_cli.text.vocabulary import BOS, EOS, PAD

Sequences = Sequence[Sequence[int]] | Sequence[npt.NDArray[np.integer]]


@dataclass
class Batch:
    """Padded token ids of several examples, int64."""

    source: Tensor
    """`[rows, src_len]`: tokens, EOS, then PAD."""
    target: Tensor | None
    """`[rows, tgt_len]`: BOS, tokens, EOS, then PAD; None where targets are not known."""
    rows: list[int]
    """The number of each example where it comes from."""
    seen: Tensor | None = None
    """`target` as the decoder is to read it, with `<unk>` for some tokens; None where that is the target itself."""
    links: Tensor | None = None
    """`[rows, tgt_len - 1, src_len]` fp32: where each target token after BOS comes from; None where nobody asks."""

    @property
    def source_mask(self) -> Tensor:
        """`[rows, src_len]`, True where there is a token."""
        return self.source != PAD

    @property
    def known_target(self) -> Tensor:
        """`target` where it must be known, as in training. Raises ValueError otherwise."""
        if self.target is None:
            raise ValueError("a batch without targets")
        return self.target

    @property
    def decoder_input(self) -> Tensor:
        """`[rows, tgt_len - 1]`: what a decoder reads to predict `known_target[:, 1:]`; nothing follows EOS."""
        return before(self.known_target, self.seen)

    @property
    def target_lengths(self) -> Tensor:
        """`[rows]`: tokens to predict, EOS included."""
        return (self.known_target[:, 1:] != PAD).sum(1)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on a device, without waiting for a copy from `pinned` memory."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """Return the batch in memory from which a GPU copies while it computes."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        target, seen, links = (None if t is None else change(t) for t in (self.target, self.seen, self.links))
        return Batch(change(self.source), target, self.rows, seen, links)

    def take(self, begin: int, end: int) -> Batch:
        """Return the examples `begin … end - 1`, padded no longer than they need; no copies."""
        source, target = self.source[begin:end], self.known_target[begin:end]
        read, written = (int((side != PAD).sum(1).max()) for side in (source, target))
        seen = None if self.seen is None else self.seen[begin:end, :written]
        links = None if self.links is None else self.links[begin:end, : written - 1, :read]
        return Batch(source[:, :read], target[:, :written], self.rows[begin:end], seen, links)


def before(target: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return what is read before each token of target `[rows, len]` after the first, `[rows, len - 1]`.

    seen: what is to be read for `target`; None: that itself.
    """
    return (target if seen is None else seen)[:, :-1].masked_fill(target[:, 1:] == PAD, PAD)


def collate(sources: Ragged | Sequences, targets: Ragged | Sequences | None, rows: Sequence[int]) -> Batch:
    """Make a batch of sequences of ids (without BOS and EOS); `rows` says where each comes from.

    What `Store.gather` returns is taken as it is, without a loop over the examples.
    """
    target = None if targets is None else _pad(_ragged(targets), begin=True)
    return Batch(_pad(_ragged(sources), begin=False), target, list(rows))


def _ragged(sequences: Ragged | Sequences) -> Ragged:
    if isinstance(sequences, Ragged):
        return sequences
    lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    return Ragged(np.concatenate(parts) if parts else np.zeros(0, np.int64), lengths)


def _pad(ragged: Ragged, begin: bool) -> Tensor:
    """Return `[rows, longest + EOS (+ BOS)]`."""
    count = len(ragged.lengths)
    ends = ragged.lengths + int(begin)
    padded = np.full((count, int(ends.max(initial=0)) + 1), PAD, dtype=np.int64)
    places = np.arange(padded.shape[1])
    if begin:
        padded[:, 0] = BOS
    # Row by row in memory, as the flat tokens are: one masked assignment puts each where it belongs.
    padded[(places >= int(begin)) & (places < ends[:, None])] = ragged.tokens
    padded[np.arange(count), ends] = EOS
    return torch.from_numpy(padded)
