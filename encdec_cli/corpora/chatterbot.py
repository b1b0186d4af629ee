"""Small talk: the English conversations of the chatterbot-corpus package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from encdec_cli.corpora.corpus import Corpus, known_split, share
from encdec_cli.errors import DataError, UsageError
from encdec_cli.text.example import Example

_PACKAGE = "chatterbot-corpus"
_MODULE = "chatterbot_corpus"


@dataclass
class Chatterbot(Corpus):
    """The turns before as the source, the next turn as the target.

    A model of this corpus memorises small talk, and the splits say so: `valid` is a sample of the training
    examples themselves (how much has been memorised), `test` holds questions, 5 in 100, that training has never
    seen (what carries over; expect little). Which example belongs where depends on its last question alone.
    """

    language: str = "english"
    """Folder of the package's data."""

    def check(self) -> None:
        """Raise UsageError for an unknown language, and without the package."""
        self._folder()

    def read(self, split: str) -> Iterator[Example]:
        """Yield an example for every turn but the first of each conversation."""
        known_split(split)
        seen: set[tuple[str, str]] = set()
        for turns in self._conversations():
            for count in range(1, len(turns)):
                before, answer = turns[:count], turns[count]
                key = ("\t".join(before), answer)
                if key not in seen and split in _splits(before[-1]):
                    seen.add(key)
                    yield Example(key[0], answer, {"turns": before})

    def _conversations(self) -> Iterator[list[str]]:
        for path in sorted(self._folder().glob("*.yml")):
            try:
                content = yaml.safe_load(path.read_bytes())
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                raise DataError(f"{path}: cannot be read ({error}); install {_PACKAGE} again.") from error
            entries = content.get("conversations") if isinstance(content, dict) else None
            for entry in entries if isinstance(entries, list) else []:
                if _is_conversation(entry):
                    yield [" ".join(turn.split()) for turn in entry]

    def _folder(self) -> Path:
        spec = find_spec(_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError("the corpus 'chatterbot' needs an extra: pip install 'encdec-cli[corpora]'.")
        data = Path(spec.submodule_search_locations[0]) / "data"
        known = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        if self.language not in known:
            raise UsageError(f"language: no '{self.language}' among {', '.join(known)}.")
        return data / self.language

    def fingerprint(self) -> str:
        """Return a digest of the installed version and the language."""
        try:
            installed = version(_PACKAGE)
        except PackageNotFoundError:
            installed = "not installed"
        return hashlib.sha256(f"{installed} {self.language}".encode()).hexdigest()


def _is_conversation(entry: Any) -> bool:
    return isinstance(entry, list) and all(isinstance(turn, str) and turn.strip() for turn in entry)


def _splits(question: str) -> tuple[str, ...]:
    place = share(question.lower())
    if place < 500:
        return ("test",)
    return ("train", "valid") if place < 1500 else ("train",)
