"""Which examples make a batch, and in which order batches come: a pure function of (data hash, seed, epoch).

The plan of an epoch does not depend on workers, ranks, accumulation or where a run was resumed. It uses
integer arithmetic of our own (splitmix64, https://doi.org/10.1145/2714064.2660195), because the streams of
numpy's generators may change with its version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from encdec_cli.data.bands import Ints, by_length, cut
from encdec_cli.errors import DataError, UsageError

Keys = npt.NDArray[np.uint64]

WINDOW = 1_000_000
"""Examples that are sorted together; a larger corpus is spread over windows, so that sorting stays cheap."""
_GOLDEN = 0x9E3779B97F4A7C15
_EOS = 1


def keys(text: str, count: int) -> Keys:
    """Return `count` numbers that look random: the splitmix64 stream whose state is the SHA-256 of `text`."""
    return splitmix64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"), count)


def splitmix64(state: int, count: int) -> Keys:
    """Return the first `count` outputs of splitmix64 from a 64-bit state, uint64 `[count]`."""
    # Arrays only: uint64 arithmetic on arrays wraps in silence, on numpy scalars it warns.
    numbers = np.arange(1, count + 1, dtype=np.uint64)
    numbers *= np.array(_GOLDEN, np.uint64)
    numbers += np.array([state], np.uint64)
    numbers ^= numbers >> np.array(30, np.uint64)
    numbers *= np.array(0xBF58476D1CE4E5B9, np.uint64)
    numbers ^= numbers >> np.array(27, np.uint64)
    numbers *= np.array(0x94D049BB133111EB, np.uint64)
    numbers ^= numbers >> np.array(31, np.uint64)
    return numbers


class Sampler:
    """Batches of examples of like length: rows × the longest side with its EOS never exceeds a token budget.

    Every epoch has the same number of batches, cut at the same places of the examples sorted by length: what
    an epoch changes is which of equally long examples stand together, and the order of the batches. So update
    number n is found without going through the updates before it.

    Args:
        lengths_source: tokens of each source without EOS, `[examples]`.
        lengths_target: tokens of each target without EOS, `[examples]`.
        tokens: the budget of one micro-batch, padding included (`train.tokens`).
        data_hash: of the data, from `Prepared.data_hash`.
        seed: `train.seed`.
        window: examples sorted together.

    Raises:
        UsageError: if an example alone is over the budget.
        DataError: if there is no example.
    """

    def __init__(
        self,
        lengths_source: npt.NDArray[np.integer],
        lengths_target: npt.NDArray[np.integer],
        tokens: int,
        data_hash: str,
        seed: int,
        window: int = WINDOW,
    ) -> None:
        self._source = np.asarray(lengths_source, dtype=np.int32)
        self._target = np.asarray(lengths_target, dtype=np.int32)
        self.tokens = tokens
        self._name = f"{data_hash}|{seed}"
        self._check()
        self._windows = self._sort(data_hash, window)
        self._cuts = self._cut()
        self._planned: tuple[int, Ints, Ints] | None = None

    def __len__(self) -> int:
        """Return the number of batches of an epoch; the same in every epoch."""
        return len(self._cuts) - 1

    def _check(self) -> None:
        if not len(self._source):
            raise DataError("no training example; look at the data section of the recipe.")
        longest = np.maximum(self._source, self._target) + _EOS
        worst = int(longest.argmax())
        if longest[worst] > self.tokens:
            raise UsageError(
                f"train.tokens: {self.tokens} tokens cannot hold training example {worst + 1} (counted from 1) with "
                f"its {longest[worst]} tokens; set train.tokens to at least {longest[worst]}, or lower text.max_source "
                "and text.max_target."
            )

    def _sort(self, data_hash: str, window: int) -> list[Ints]:
        """Return the examples of each window, like lengths together: the same in every epoch."""
        number = -(-len(self._source) // window)
        owner = (keys(f"{data_hash}|window", len(self._source)) % np.array([number], np.uint64)).astype(np.int64)
        members = np.argsort(owner, kind="stable")
        parts = np.split(members, np.cumsum(np.bincount(owner, minlength=number))[:-1])
        return [part[self._by_length(part)] for part in parts if len(part)]

    def _by_length(self, members: Ints) -> Ints:
        return by_length(self._source[members] + _EOS, self._target[members] + _EOS, self.tokens)

    def _cut(self) -> Ints:
        """Return where each batch begins in the sorted examples, and the end."""
        cuts = [np.zeros(1, np.int64)]
        for members in self._windows:
            longest = np.maximum(self._source[members], self._target[members]) + _EOS
            cuts.append(cuts[-1][-1] + cut(longest, self.tokens)[1:])
        return np.concatenate(cuts)

    def lengths(self) -> tuple[Ints, Ints, Ints]:
        """Return source and target lengths, EOS counted, of all examples as cut, and where each batch begins."""
        examples = np.concatenate(self._windows)
        source, target = (side[examples].astype(np.int64) + _EOS for side in (self._source, self._target))
        return source, target, self._cuts[:-1]

    def cut(self, number: int) -> Ints:
        """Return examples as long as those of batch `number`, as cut; the first ones have the longest sides."""
        examples = np.concatenate(self._windows)[self._cuts[number] : self._cuts[number + 1]]
        longest = np.unique([int(side[examples].argmax()) for side in (self._source, self._target)])
        return np.concatenate([examples[longest], np.delete(examples, longest)])

    def _plan(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the examples of an epoch, batch after batch as cut, and the order of the batches."""
        if self._planned is None or self._planned[0] != epoch:
            random = keys(f"{self._name}|{epoch}|examples", len(self._source))
            examples = np.concatenate([self._shuffle(members, random) for members in self._windows])
            order = np.argsort(keys(f"{self._name}|{epoch}|batches", len(self)), kind="stable")
            self._planned = (epoch, examples, order)
        return self._planned[1], self._planned[2]

    def _shuffle(self, members: Ints, random: Keys) -> Ints:
        """Shuffle examples of equal lengths among themselves; everything else stays in its place."""
        source, target = self._source[members], self._target[members]
        new = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
        rank = np.concatenate([np.zeros(1, np.uint64), np.cumsum(new, dtype=np.uint64)])
        # One number to sort by: the rank of the lengths in the high bits, chance in the rest.
        bits = max(1, int(rank[-1]).bit_length())
        order = (rank << np.array([64 - bits], np.uint64)) | (random[members] >> np.array([bits], np.uint64))
        return members[np.argsort(order, kind="stable")]

    def batch(self, epoch: int, position: int) -> Ints:
        """Return the example numbers of one batch of an epoch, in `0 … len(self) - 1`."""
        examples, order = self._plan(epoch)
        number = order[position]
        return examples[self._cuts[number] : self._cuts[number + 1]]

    def batches(self, epoch: int) -> list[Ints]:
        """Return every batch of an epoch in the order of training; each example is in exactly one."""
        return [self.batch(epoch, position) for position in range(len(self))]

    def place(self, step: int, accumulate: int = 1) -> tuple[int, int]:
        """Return epoch and position of the first micro-batch of the update after `step` updates."""
        return divmod(step * accumulate, len(self))

    def updates(self, step: int = 0, accumulate: int = 1) -> Iterator[list[Ints]]:
        """Yield the micro-batches of update after update, without end, after the first `step` updates.

        An update takes the next `accumulate` batches, across the end of an epoch where needed, so every update is full
        and no batch is lost. However many processes share it, an update is the same.
        """
        while True:
            numbers = range(step * accumulate, (step + 1) * accumulate)
            yield [self.batch(*divmod(number, len(self))) for number in numbers]
            step += 1
