"""What a corpus is: a dataclass that reads the examples of each split."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from encdec_cli.errors import UsageError
from encdec_cli.registry import nearest
from encdec_cli.text.example import Example

SPLITS = ("train", "valid", "test")
"""The splits every corpus knows; one that it does not have yields nothing."""


@dataclass
class Corpus:
    """Where examples come from. Subclasses are dataclasses: their fields are keys of the recipe's `data` section."""

    @abstractmethod
    def read(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split, always the same ones in the same order.

        A split that is not there yields nothing. Raises UsageError for a name not in SPLITS, DataError for bad data.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the content may have changed; cheap to make."""

    def check(self) -> None:
        """Raise UsageError, which begins with the key, for what reading needs and a model in use does not."""

    def symbols(self) -> tuple[str, ...]:
        """Return strings of sources or targets, such as a tag, for which tokenizers keep one token each."""
        return ()

    def notes(self) -> list[str]:
        """Return sentences for people about what the reads so far have dropped or mended."""
        return []


def known_split(split: str) -> str:
    """Return `split`. Raises UsageError if there is none of that name."""
    if split not in SPLITS:
        raise UsageError(f"no split '{split}' among {', '.join(SPLITS)}{nearest(split, list(SPLITS))}.")
    return split


def share(text: str) -> int:
    """Return a number from 0 to 9,999 that depends on the text alone: the same on every machine, for ever."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") % 10_000
