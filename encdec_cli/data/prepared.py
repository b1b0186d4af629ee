"""A folder of prepared data, opened: stores, tokenizers, held-out text and facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encdec_cli import atomic
from encdec_cli.corpora.corpus import SPLITS
from encdec_cli.data.shard import Side
from encdec_cli.data.store import Store
from encdec_cli.errors import BundleError
from encdec_cli.text.example import Example
from encdec_cli.text.lines import read_lines
from encdec_cli.text.tokenizer import Tokenizer, load_tokenizer

FACTS = "data.json"
FORMAT = 1


def tokenizer_name(side: str) -> str:
    """Return the file of the tokenizer of a side; a shared one is the source's."""
    return f"{side}.tokenizer"


def text_name(split: str) -> str:
    """Return the file of a held-out split's text, one JSON object a line."""
    return f"{split}.jsonl"


@dataclass(frozen=True)
class Prepared:
    """Everything that training and validation read; the files have been checked against their manifest."""

    folder: Path
    facts: dict[str, Any]
    """What `data.json` says: counts, reasons, lengths."""
    source: Tokenizer
    target: Tokenizer
    """The same object as `source` if the tokenizer is shared."""
    stores: dict[str, Store]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Open a folder that `prepare` made. Raises BundleError that names the file and the remedy."""
        try:
            atomic.verify(folder)
            return _open(folder)
        except BundleError as error:
            raise BundleError(
                f"prepared data: {error} Delete the folder {folder}: it is made again from the recipe."
            ) from error

    @property
    def data_hash(self) -> str:
        """What the order of training is derived from: a hash of tokenizers, training examples and their order."""
        return str(self.facts["data_hash"])

    def store(self, split: str) -> Store:
        """Return the examples of `train`, `valid` or `test` as token ids; an absent split is empty."""
        return self.stores[split]

    def count(self, split: str) -> int:
        """Return the number of examples that a split's store holds."""
        return len(self.stores[split])

    def longest(self, *splits: str) -> int:
        """Return the most tokens that an example of some splits has on one side, EOS counted."""
        stores = [self.stores[split] for split in splits]
        sides = [side for store in stores for side in (store.source_lengths, store.target_lengths)]
        return 1 + max(int(side.max(initial=0)) for side in sides)

    def path(self, split: str) -> Path:
        """Return the file with every example of `valid` or `test` as text."""
        return self.folder / text_name(split)

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of `valid` or `test` as text, those too long for the store included."""
        for number, line in enumerate(read_lines(self.path(split)), 1):
            try:
                record = json.loads(line)
                source, target = record.pop("source"), record.pop("target")
            except (ValueError, KeyError, AttributeError) as error:
                raise BundleError(f"{self.path(split)}:{number}: not an example ({error}).") from error
            yield Example(source, target, record)


def _open(folder: Path) -> Prepared:
    path = folder / FACTS
    facts = atomic.read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise BundleError(f"{path}: not prepared data of format {FORMAT}; another version of encdec wrote it.")
    try:
        kind, shared = facts["tokenizer"]["kind"], facts["tokenizer"]["shared"]
        counts = {split: facts["splits"][split]["kept"] for split in SPLITS}
        facts["data_hash"].encode()
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: lacks {error}; the file is damaged.") from error
    source = _tokenizer(folder / tokenizer_name("source"), kind)
    target = source if shared else _tokenizer(folder / tokenizer_name("target"), kind)
    stores = {split: Store.open(folder, split) for split in SPLITS}
    for split, store in stores.items():
        if len(store) != counts[split]:
            raise BundleError(f"{folder}: {len(store)} '{split}' examples, but {FACTS} says {counts[split]}.")
        if store.sides is not None and store.sides != tokenizer_sides(source, target):
            raise BundleError(f"{folder}: the '{split}' shards were made with another vocabulary.")
    return Prepared(folder, facts, source, target, stores)


def tokenizer_sides(source: Tokenizer, target: Tokenizer) -> tuple[Side, Side]:
    """Return what shards note about the vocabularies they are made with."""
    first, second = source.vocabulary, target.vocabulary
    return Side(len(first), first.sha256), Side(len(second), second.sha256)


def _tokenizer(path: Path, kind: str) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}.") from error
    try:
        return load_tokenizer(kind, content)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
