"""How large a micro-batch may be that processes compute together: learnt from one for which memory was not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from encdec_cli import atomic
from encdec_cli.data.batch import Batch
from encdec_cli.errors import BundleError, ResourceError
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.gradients import alone_too_large, is_out_of_memory, shapes_of

_KEY = "most_positions"


class Room:
    """Remembers in the folder of a run how many positions did not fit, for the start after that.

    A layer that processes compute together cannot be left by one of them, so all end when one has no memory. What it
    leaves behind halves the micro-batches of all: equal pieces of each, as many as the one with the most needs.

    Args:
        run: the folder, on a disk that all processes share.
        ranks: all of them.
        say: is given a sentence for the user, in the first process.
    """

    def __init__(self, run: Path, ranks: Ranks, say: Callable[[str], None]) -> None:
        self._run, self._ranks = run, ranks
        self.most: int = ranks.first_does("the start", self._read)
        """Positions of both sides, padding included; 0 if any number has fitted so far."""
        if self.most and ranks.first:
            say(
                f"memory was not enough before: computed in pieces of at most {self.most:,} positions, source and "
                f"target together ({run}/room-*.json; delete them where there is more memory); lower train.tokens next "
                "time"
            )

    def _read(self) -> int:
        found = (self._noted_in(path) for path in self._run.glob("room-*.json"))
        return min((most for most in found if most), default=0)

    @staticmethod
    def _noted_in(path: Path) -> int:
        try:
            found = atomic.read_json(path)
        except BundleError:  # it is worth nothing to a run that may fit now
            return 0
        most = found.get(_KEY) if isinstance(found, dict) else None
        return most if isinstance(most, int) and most > 0 else 0

    def cut(self, batches: Sequence[Batch]) -> list[list[Batch | None]]:
        """Return each micro-batch in pieces, and in as many as every other process does; None for one without rows."""
        if not self.most:
            return [[batch] for batch in batches]
        needed = [-(-len(batch.rows) // max(1, self.most // positions_of_a_row(batch))) for batch in batches]
        counts = self._ranks.most("the pieces of micro-batches", needed)
        return [_pieces(batch, int(count)) for batch, count in zip(batches, counts, strict=True)]

    @contextmanager
    def watched(self, batch: Batch) -> Iterator[None]:
        """Compute `batch` inside the block; ResourceError, and a note for the next start, if memory is not enough."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._noted(batch) from error

    def _noted(self, batch: Batch) -> ResourceError:
        if len(batch.rows) == 1:
            return alone_too_large(batch)
        most = len(batch.rows) * positions_of_a_row(batch) // 2
        # Several processes may have too little at once, each with a file of its own; and what they lack is the news,
        # even where no file can be written.
        with suppress(ResourceError):
            atomic.write_file(self._run / f"room-{self._ranks.rank}.json", atomic.json_bytes({_KEY: most}))
        return ResourceError(
            f"process {self._ranks.rank}: out of memory for {len(batch.rows)} examples ({shapes_of(batch)}); the last "
            f"checkpoint is good: start all processes again, and they compute in pieces of at most {most:,} positions."
        )


def positions_of_a_row(batch: Batch) -> int:
    """Return the lengths of both sides, padding included."""
    return batch.source.shape[1] + batch.known_target.shape[1] - 1


def _pieces(batch: Batch, count: int) -> list[Batch | None]:
    rows = len(batch.rows)
    cuts = [rows * number // count for number in range(count + 1)]
    return [batch.take(begin, end) if begin < end else None for begin, end in pairwise(cuts)]
