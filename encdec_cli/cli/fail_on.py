"""`--fail-on`: lines that are written all the same, and make the command fail in the end."""

from __future__ import annotations

from collections.abc import Iterable

from encdec_cli.cli import schema


class FailOn:
    """Counts the lines that have one of the named troubles or flags.

    Args:
        words: what stands after the flag, separated by commas; None where it was not given.

    Raises UsageError for a word that is neither.
    """

    def __init__(self, words: str | None) -> None:
        from encdec_cli.errors import UsageError
        from encdec_cli.registry import nearest

        known = schema.troubles()
        self._counts = dict.fromkeys((word.strip() for word in words.split(",")), 0) if words is not None else {}
        self._first: dict[str, int] = {}
        for word in self._counts:
            if word not in known:
                raise UsageError(f"--fail-on: no '{word}' among {', '.join(known)}{nearest(word, known)}.")

    @property
    def named(self) -> list[str]:
        """The words."""
        return list(self._counts)

    def asks_for(self, word: str) -> bool:
        """Whether this word was named."""
        return word in self._counts

    def note(self, number: int, found: Iterable[str]) -> None:
        """Count line `number` for each of its troubles and flags that was named."""
        for word in found:
            if word in self._counts:
                self._counts[word] += 1
                self._first.setdefault(word, number)

    def check(self) -> None:
        """Raise CheckError if a line was counted."""
        from encdec_cli.errors import CheckError

        told = [f"{self._counts[word]:,} {word} (first: line {first:,})" for word, first in self._first.items()]
        if told:
            raise CheckError(f"--fail-on: {', '.join(told)}; every line has been written.")
