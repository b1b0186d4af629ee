"""From a corpus to a folder that training can use: tokenizers, shards, held-out text, and the facts about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from encdec_cli import atomic
from encdec_cli.corpora.corpus import SPLITS, Corpus
from encdec_cli.data.prepared import FACTS, FORMAT, Prepared, text_name, tokenizer_name, tokenizer_sides
from encdec_cli.data.statistics import Statistics
from encdec_cli.data.store import write_shards
from encdec_cli.errors import DataError
from encdec_cli.recipe import Text
from encdec_cli.tasks.task import Task
from encdec_cli.text.example import Example
from encdec_cli.text.tokenizer import Tokenizer, TokenizerOptions, train_tokenizer

__all__ = ["Prepared", "is_current", "prepare"]


def is_current(folder: Path, fingerprint: str) -> bool:
    """Return whether a folder holds data prepared from the same recipe and corpus (cheap: nothing is verified)."""
    path = folder / FACTS
    if not (path.is_file() and (folder / atomic.MANIFEST).is_file()):
        return False
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.get("format") == FORMAT and facts.get("fingerprint") == fingerprint


def prepare(
    task: Task,
    corpus: Corpus,
    text: Text,
    fingerprint: str,
    folder: Path,
    say: Callable[[str], None],
    accept: Callable[[str], None],
) -> Prepared:
    """Read every split of a corpus, train the tokenizers, and commit `folder` in one step; then open it.

    Call it where no other process can be writing `folder` (under the lock of its run). The corpus is read
    as a stream, more than once: to train the tokenizers, then to encode. `say` is given sentences for the user;
    `accept` is given the hash of the data before they take the place of others, and may raise.

    Raises:
        DataError: if a split has examples but none that can be used, training has none at all, an example is
            too long and `too_long` is `stop`, or the corpus differs from one reading to the next.
    """
    with atomic.new_folder(folder) as temporary:
        read, tokenizers = _train_tokenizers(task, corpus, text)
        say(f"read {read:,} training examples; {_vocabularies(tokenizers)}")
        for name, content in _tokenizer_files(tokenizers).items():
            (temporary / name).write_bytes(content)
        splits = {split: _Split(split, task, corpus, text, tokenizers) for split in SPLITS}
        for name, split in splits.items():
            split.write(temporary)
            if name == "train":
                _check_same(read, split.statistics.read)
            split.statistics.check_usable()
        notes = [*corpus.notes(), *(note for split in splits.values() for note in split.statistics.sentences())]
        facts = _facts(text, fingerprint, tokenizers, splits, notes)
        accept(facts["data_hash"])
        (temporary / FACTS).write_bytes(atomic.json_bytes(facts))
    for note in notes:
        say(note)
    return Prepared.open(folder)


def _train_tokenizers(task: Task, corpus: Corpus, text: Text) -> tuple[int, tuple[Tokenizer, Tokenizer]]:
    """Return the number of training examples, and the tokenizers of source and target."""
    options = TokenizerOptions(text.vocabulary, text.algorithm, (*task.symbols(), *corpus.symbols()))
    statistics = Statistics("train")
    counts: list[int] = []

    def lines(*sides: int) -> Iterator[str]:
        statistics.clear()
        for number, (_, *pair) in enumerate(_pairs(task, corpus, "train", statistics)):
            # By the Thue–Morse sequence every 2nd, 4th, 8th … line, which is what a tokenizer takes of a very
            # large corpus, is a source as often as a target.
            for side in sides if number.bit_count() % 2 else sides[::-1]:
                yield pair[side]
        counts.append(statistics.read)
        _check_same(counts[0], statistics.read)

    def train(*sides: int) -> Tokenizer:
        try:
            return train_tokenizer(text.tokenizer, lines(*sides), options)
        except DataError:
            if len(counts) == 1:
                statistics.check_usable()  # no example at all: say so rather than that there is no text
            raise

    source = train(0, 1) if text.shared else train(0)
    target = source if text.shared else train(1)
    statistics.check_usable()
    return statistics.read, (source, target)


def _check_same(first: int, again: int) -> None:
    if first != again:
        raise DataError(
            f"data: the corpus gave {first:,} training examples at first and {again:,} when read again; put what "
            "comes from a pipe into a file, and leave the files alone while they are read."
        )


def _pairs(task: Task, corpus: Corpus, split: str, statistics: Statistics) -> Iterator[tuple[Example, str, str]]:
    """Yield each example whose target is known, and the texts of both sides as the model is to see them."""
    for example in corpus.read(split):
        statistics.read += 1
        if example.target is None:
            statistics.drop("target unknown")
        else:
            yield example, task.source(example), task.target(example)


class _Split:
    """One split on its way to the folder."""

    def __init__(
        self,
        split: str,
        task: Task,
        corpus: Corpus,
        text: Text,
        tokenizers: tuple[Tokenizer, Tokenizer],
    ) -> None:
        self.split, self.task, self.corpus, self.text, self.tokenizers = split, task, corpus, text, tokenizers
        self.statistics = Statistics(split)
        self.sha256 = ""

    def write(self, folder: Path) -> None:
        """Write the shards; of a held-out split also the text, every example of it, whatever its length."""
        sides = tokenizer_sides(*self.tokenizers)
        if self.split == "train":
            self.sha256 = write_shards(folder, self.split, self._encoded(None), sides)
        else:
            with (folder / text_name(self.split)).open("wb") as file:
                self.sha256 = write_shards(folder, self.split, self._encoded(file), sides)

    def _encoded(self, file: BinaryIO | None) -> Iterator[tuple[list[int], list[int]]]:
        encode_source, encode_target = (tokenizer.encode for tokenizer in self.tokenizers)
        for example, source, target in _pairs(self.task, self.corpus, self.split, self.statistics):
            if file is not None:
                file.write(_json_line(example))
            if not source.strip():
                self.statistics.drop("source blank")
            elif not target.strip():
                self.statistics.drop("target blank")
            else:
                ids = self._fitting(encode_source(source), encode_target(target))
                if ids is not None:
                    self.statistics.keep(*map(len, ids))
                    yield ids

    def _fitting(self, source: list[int], target: list[int]) -> tuple[list[int], list[int]] | None:
        """Apply the length policy; None if the example is to be left out."""
        text, lengths = self.text, (len(source) + 1, len(target) + 1)
        self.statistics.measure(*lengths)
        if lengths[0] <= text.max_source and lengths[1] <= text.max_target:
            return source, target
        if text.too_long == "stop":
            raise self._too_long(*lengths)
        if text.too_long == "truncate":
            self.statistics.truncated += 1
            return source[: text.max_source - 1], target[: text.max_target - 1]
        self.statistics.drop("source too long" if lengths[0] > text.max_source else "target too long")
        return None

    def _too_long(self, source: int, target: int) -> DataError:
        side, length, most = ("source", source, self.text.max_source)
        if source <= most:
            side, length, most = ("target", target, self.text.max_target)
        return DataError(
            f"data: {self.split} example {self.statistics.read} has a {side} of {length} tokens, more than "
            f"text.max_{side} = {most}; raise that, or set text.too_long to skip or truncate."
        )


def _json_line(example: Example) -> bytes:
    value = {**example.record, "source": example.source, "target": example.target}
    line = json.dumps(value, ensure_ascii=False)
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can hold it
        return json.dumps(value).encode() + b"\n"


def _vocabularies(tokenizers: Sequence[Tokenizer]) -> str:
    source, target = tokenizers
    if source is target:
        return f"one {source.kind} vocabulary of {len(source.vocabulary):,} tokens"
    return f"{source.kind} vocabularies of {len(source.vocabulary):,} and {len(target.vocabulary):,} tokens"


def _tokenizer_files(tokenizers: Sequence[Tokenizer]) -> dict[str, bytes]:
    source, target = tokenizers
    files = {tokenizer_name("source"): source.to_bytes()}
    if source is not target:
        files[tokenizer_name("target")] = target.to_bytes()
    return files


def _facts(
    text: Text, fingerprint: str, tokenizers: Sequence[Tokenizer], splits: dict[str, _Split], notes: list[str]
) -> dict[str, Any]:
    # Only what weights depend on: a test set that is added later must not change the order of training.
    order = hashlib.sha256(splits["train"].sha256.encode())
    for content in _tokenizer_files(tokenizers).values():
        order.update(hashlib.sha256(content).digest())
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "data_hash": order.hexdigest(),
        "tokenizer": {
            "kind": tokenizers[0].kind,
            "shared": text.shared,
            "source_vocabulary": len(tokenizers[0].vocabulary),
            "target_vocabulary": len(tokenizers[1].vocabulary),
        },
        "splits": {name: split.statistics.facts() for name, split in splits.items()},
        "notes": notes,
    }
