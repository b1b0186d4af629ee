"""What became of the examples of a split: kept, cut, or left out and why; and how long they are."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

from encdec_cli.errors import DataError

_LONGEST = 5


class Statistics:
    """Counts of one split while it is prepared."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.read = 0
        """Examples that the corpus gave."""
        self.kept = 0
        self.truncated = 0
        self.tokens = [0, 0]
        """Source and target tokens of what was kept, EOS not counted."""
        self._dropped: Counter[str] = Counter()
        self._lengths: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._longest: list[tuple[int, int, int, int]] = []

    def drop(self, reason: str) -> None:
        """Count an example that is left out."""
        self._dropped[reason] += 1

    def keep(self, source: int, target: int) -> None:
        """Count an example that is kept, with its tokens after any cut."""
        self.kept += 1
        self.tokens[0] += source
        self.tokens[1] += target

    def measure(self, source: int, target: int) -> None:
        """Note the lengths, with EOS, of the example read last, before any cut."""
        for counter, length in zip(self._lengths, (source, target), strict=True):
            counter[(length - 1).bit_length()] += 1
        entry = (max(source, target), -self.read, source, target)
        if len(self._longest) < _LONGEST:
            heapq.heappush(self._longest, entry)
        elif entry > self._longest[0]:
            heapq.heapreplace(self._longest, entry)

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON values; `to` in `lengths` is the longest length that a row counts."""
        powers = sorted({*self._lengths[0], *self._lengths[1]})
        return {
            "read": self.read,
            "kept": self.kept,
            "truncated": self.truncated,
            "dropped": dict(self._dropped),
            "source_tokens": self.tokens[0],
            "target_tokens": self.tokens[1],
            "lengths": [
                {"to": 1 << power, "source": self._lengths[0][power], "target": self._lengths[1][power]}
                for power in powers
            ],
            "longest": [
                {"example": -number, "source": source, "target": target}
                for _, number, source, target in sorted(self._longest, reverse=True)
            ],
        }

    def sentences(self) -> list[str]:
        """Return what a user should know: what was left out or cut."""
        found = []
        if self._dropped:
            found.append(f"{self.split}: left out {self._dropped.total():,} of {self.read:,} examples ({self._why()}).")
        if self.truncated:
            found.append(f"{self.split}: cut {self.truncated:,} of {self.read:,} examples that were too long.")
        return found

    def _why(self) -> str:
        return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(self._dropped.items()))

    def check_usable(self) -> None:
        """Raise DataError if nothing can be used of a split that has examples, or that training needs."""
        if self.read and self._dropped.total() == self.read:
            raise DataError(
                f"data: none of the {self.read:,} {self.split} examples can be used ({self._why()}); "
                "look at the data and text sections of the recipe."
            )
        if self.split == "train" and not self.read:
            raise DataError(
                "data: the corpus gave no training example; check the paths of the data section, and that the files "
                "are not empty."
            )
