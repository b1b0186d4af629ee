"""Examples of like length as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
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

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on a device."""
        target = None if self.target is None else self.target.to(device)
        return Batch(self.source.to(device), target, self.rows)

    def take(self, begin: int, end: int) -> Batch:
        """Return the examples `begin … end - 1`, padded no longer than they need; no copies."""
        source, target = self.source[begin:end], self.known_target[begin:end]
        longest = [int((side != PAD).sum(1).max()) for side in (source, target)]
        return Batch(source[:, : longest[0]], target[:, : longest[1]], self.rows[begin:end])


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
