"""Corpora of which models write a part: what the models are to read, and how their outputs become training pairs.

The models write before the data are prepared (`training/synthesis.py`); here it is only said what, and read back.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from encdec_cli import atomic
from encdec_cli.config import Chosen, Component
from encdec_cli.corpora.corpus import Corpus, known_split
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.registry import corpora
from encdec_cli.text.example import Example
from encdec_cli.text.lines import read_lines

Trouble = Literal["empty", "truncated", "max-length", "loop", "length", "copy"]
"""A status or flag of an output, as in the records of `encdec generate --json`."""


@dataclass(kw_only=True)
class Synthetic(Corpus):
    """A corpus whose training pairs are, some or all, written by models; its held-out splits are real."""

    writes_sources: ClassVar[bool] = False
    """Whether the models read targets and write sources."""

    corpus: Annotated[Component, Chosen(corpora, example="files")]
    """The corpus of the real pairs, a section of its own such as `{name: files, train: …}`."""
    models: list[Path]
    """Bundles or runs of the models that write; several are an ensemble."""
    strategy: str = ""
    """How they search, as `--strategy` takes it; empty is as the first one's recipe has it."""
    rerank: str = ""
    """What orders the outputs of the search anew, as `--rerank` takes it; empty for nothing."""
    drop: list[Trouble] = field(default_factory=lambda: ["empty", "truncated", "max-length", "loop"])
    """An output with one of these statuses or flags of `generate --json` is left out; others are `length`, `copy`."""
    real: int = 1
    """How often each real pair is seen in an epoch; 0 leaves them out."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("models: empty; name the bundle or run that writes.")
        if self.real < 0:
            raise UsageError(f"real: {self.real} must be 0 or more.")
        self.written: Path | None = None
        """The folder of what the models have written; who lets them write sets it."""
        self._dropped: Counter[str] = Counter()

    @abstractmethod
    def asked(self) -> Iterator[Example]:
        """Yield what the models are to read, always the same in the same order."""

    @abstractmethod
    def pair(self, asked: Example, output: str) -> Example:
        """Return the training pair of one of `asked` and the output that the models wrote for it."""

    def read(self, split: str) -> Iterator[Example]:
        """Yield the real examples of a split, and of training those that were written after them."""
        if known_split(split) != "train":
            yield from self.corpus.config.read(split)
            return
        if self.written is None:
            raise UsageError("data: the training pairs are still to be written; `encdec train` lets the models write.")
        for _ in range(self.real):
            yield from self.corpus.config.read("train")
        self._dropped.clear()
        for path in sorted(self.written.glob("*.jsonl")):
            for line in read_lines(path):
                record = json.loads(line)
                trouble = next((word for word in record["troubles"] if word in self.drop), None)
                if trouble:
                    self._dropped[trouble] += 1
                else:
                    yield self.pair(Example(record["source"], record["target"], record["record"]), record["output"])

    @abstractmethod
    def asked_mark(self) -> str:
        """Return a text that changes when what is `asked` may have changed; cheap to make."""

    def identities(self) -> list[str]:
        """Return what changes with the files of each model."""
        return list(map(_identity, self.models))

    def mark(self) -> str:
        """Return a digest of all that decides what the models write."""
        return _digest(self.asked_mark(), *self.identities(), self.strategy, self.rerank)

    def fingerprint(self) -> str:
        """Return a digest of what the models write and of the real corpus."""
        return _digest(self.mark(), self.corpus.cls.__module__, self.corpus.config.fingerprint())

    def notes(self) -> list[str]:
        """Return the real corpus's notes, and how many outputs were left out and why."""
        counts = ", ".join(f"{count:,} {trouble}" for trouble, count in self._dropped.most_common())
        left_out = [f"train: outputs left out: {counts}."] if counts else []
        return [*self.corpus.config.notes(), *left_out]


def _digest(*facts: str) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _identity(path: Path) -> str:
    """Return what changes with a model: the SHA-256 of its manifest."""
    for folder in (path / "bundle", path):
        if (folder / atomic.MANIFEST).is_file():
            return atomic.sha256(folder / atomic.MANIFEST)
    raise BundleError(f"data.models: {path} is neither a bundle nor a run that has one; name the model that writes.")
