"""The examples of one split as token ids: written as a stream of shards, read by number from mapped files."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from encdec_cli.data.shard import SIDES, Ids, Ints, Shard, Side, read_shard, write_shard
from encdec_cli.errors import BundleError

SHARD_TOKENS = 64 << 20
"""A shard is cut at this many tokens of both sides even if it has few examples: the memory of the writer."""


@dataclass(frozen=True)
class Ragged:
    """Sequences of several lengths, one after the other."""

    tokens: Ids
    """All tokens, flat."""
    lengths: Ints
    """The number of tokens of each sequence; their sum is the number of tokens."""


def write_shards(
    folder: Path,
    split: str,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    sides: tuple[Side, Side],
    shard_size: int = 1_000_000,
) -> str:
    """Write `{split}-00000.safetensors` and so on into a folder that `atomic.new_folder` is filling.

    Returns a SHA-256 of lengths and tokens of both sides in order: the same however the examples are cut into shards.

    Args:
        pairs: source and target ids (no BOS, no EOS); consumed as a stream, one shard in memory at a time.
        sides: the source and the target vocabulary; ids take two bytes where they fit.
        shard_size: the most examples in one shard.
    """
    writer = _Writer(folder, split, sides)
    for source, target in pairs:
        writer.add(source, target)
        if writer.examples >= shard_size or writer.tokens >= SHARD_TOKENS:
            writer.flush()
    return writer.finish()


class _Writer:
    def __init__(self, folder: Path, split: str, sides: tuple[Side, Side]) -> None:
        self._folder, self._split, self._sides = folder, split, sides
        self._shards = 0
        self._count = 0
        self._digests = [hashlib.sha256() for _ in range(4)]
        self._empty()

    def _empty(self) -> None:
        self._ids = [array(_typecode(side.size)) for side in self._sides]
        self._offsets = [array("q", [0]) for _ in self._sides]

    @property
    def examples(self) -> int:
        return len(self._offsets[0]) - 1

    @property
    def tokens(self) -> int:
        return len(self._ids[0]) + len(self._ids[1])

    def add(self, source: Sequence[int], target: Sequence[int]) -> None:
        for ids, offsets, new in zip(self._ids, self._offsets, (source, target), strict=True):
            ids.extend(new)
            offsets.append(len(ids))

    def flush(self) -> None:
        """Write what has been collected as one shard."""
        tensors: dict[str, Ids] = {}
        for number, name in enumerate(SIDES):
            tokens = np.frombuffer(self._ids[number], dtype=f"u{self._ids[number].itemsize}")
            offsets = np.frombuffer(self._offsets[number], dtype=np.int64)
            tensors[f"{name}.tokens"], tensors[f"{name}.offsets"] = tokens, offsets
            # Of fixed widths, so that neither the cut into shards nor the width on disk changes the hash.
            self._digests[2 * number].update(np.diff(offsets).astype("<i8").data)
            self._digests[2 * number + 1].update(tokens.astype("<u4").data)
        metadata = {"format": "1", "split": self._split, "count": str(self.examples)}
        for name, side in zip(SIDES, self._sides, strict=True):
            metadata |= {f"{name}.vocabulary": str(side.size), f"{name}.vocabulary.sha256": side.sha256}
        write_shard(self._folder / f"{self._split}-{self._shards:05d}.safetensors", tensors, metadata)
        self._shards += 1
        self._count += self.examples
        self._empty()

    def finish(self) -> str:
        if self.examples:
            self.flush()
        total = hashlib.sha256(str(self._count).encode())
        for digest in self._digests:
            total.update(digest.digest())
        return total.hexdigest()


def _typecode(vocabulary: int) -> str:
    return "H" if vocabulary <= 1 << 16 else "I"


class Store:
    """The examples of one split, by number.

    Attributes:
        source_lengths: tokens of every source (no EOS), int32 `[examples]`, in memory.
        target_lengths: the same for the targets.
        sides: size and SHA-256 of the two vocabularies; None if the split has no example.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)], dtype=np.int64)
        self.source_lengths, self.target_lengths = (self._lengths(side) for side in range(2))
        self.sides = self._shards[0].sides if self._shards else None

    @classmethod
    def open(cls, folder: Path, split: str) -> Store:
        """Map every shard of a split; a split without shards is empty. Raises BundleError naming the file."""
        pattern = re.compile(rf"{re.escape(split)}-\d{{5,}}\.safetensors")
        paths = sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name)), key=lambda path: path.name)
        shards = []
        for number, path in enumerate(paths):
            if path.name != f"{split}-{number:05d}.safetensors":
                raise BundleError(f"{folder}: shard {number} of '{split}' is missing, found {path.name} instead.")
            shards.append(read_shard(path, split))
            if shards[-1].sides != shards[0].sides:
                raise BundleError(f"{path}: made with another vocabulary than {paths[0].name}; the folder is mixed up.")
        return cls(shards)

    def _lengths(self, side: int) -> npt.NDArray[np.int32]:
        parts = [np.diff(shard.offsets[side]).astype(np.int32) for shard in self._shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def target_counts(self, size: int) -> Ints:
        """Return how often each token of a vocabulary of `size` stands in the targets (without EOS), `[size]`."""
        counts = (np.bincount(shard.tokens[1], minlength=size) for shard in self._shards)
        return sum(counts, np.zeros(size, np.int64))

    def gather(self, indices: npt.ArrayLike) -> tuple[Ragged, Ragged]:
        """Return the sources and the targets of many examples, in the order asked for, without a loop over them."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < len(self)):
            raise IndexError(f"example {int(wanted.min())} or {int(wanted.max())} of {len(self)}")
        return self._gather(wanted, 0), self._gather(wanted, 1)

    def _gather(self, wanted: Ints, side: int) -> Ragged:
        lengths = (self.source_lengths, self.target_lengths)[side][wanted].astype(np.int64)
        if len(self._shards) == 1:
            shard = self._shards[0]
            return Ragged(shard.tokens[side][_ranges(shard.offsets[side][wanted], lengths)], lengths)
        ends = np.cumsum(lengths)
        dtype = self._shards[0].tokens[side].dtype if self._shards else np.dtype("<u2")
        tokens = np.empty(int(lengths.sum()), dtype)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            shard, rows = self._shards[number], wanted[mine] - self._starts[number]
            places = _ranges((ends - lengths)[mine], lengths[mine])
            tokens[places] = shard.tokens[side][_ranges(shard.offsets[side][rows], lengths[mine])]
        return Ragged(tokens, lengths)


def _ranges(begins: Ints, lengths: Ints) -> Ints:
    """Return `begins[0], begins[0] + 1, …` for as many as `lengths[0]`, then the same for the next, flat."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))
