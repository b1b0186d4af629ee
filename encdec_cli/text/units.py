"""Tokenizers whose tokens are seen in the text: words between white space, or single characters."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from encdec_cli.atomic import json_bytes
from encdec_cli.errors import BundleError, DataError
from encdec_cli.text.options import TokenizerOptions, evenly, without_surrogates
from encdec_cli.text.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, Vocabulary, with_special

T = TypeVar("T", bound="Units")


class Units:
    """A tokenizer that cuts text into units and looks each one up; a unit it has not learned is UNK."""

    kind: ClassVar[str]
    joint: ClassVar[str]

    def __init__(self, vocabulary: Vocabulary, symbols: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.symbols = tuple(symbols)
        # Text that spells `<s>` is not a beginning of a sentence.
        self._ids = {token: id for id, token in enumerate(vocabulary.tokens) if id >= len(SPECIAL)}

    @abstractmethod
    def units(self, text: str) -> list[str]:
        """Cut a text into its units."""

    @classmethod
    def train(cls: type[T], lines: Iterable[str], options: TokenizerOptions) -> T:
        """Learn the most frequent units, in alphabetical order where equally frequent. DataError without text."""
        cutter = cls(Vocabulary(SPECIAL), options.symbols)
        counts: Counter[str] = Counter()
        for line in evenly(lines):
            counts.update(cutter.units(without_surrogates(line)))
        for token in (*SPECIAL, *options.symbols):
            counts.pop(token, None)
        if not counts:
            raise DataError("tokenizer: there is no text to train it on; check the training files.")
        ranked = sorted(counts, key=lambda unit: (-counts[unit], unit))
        return cls(Vocabulary(with_special((*options.symbols, *ranked))[: options.size]), options.symbols)

    @classmethod
    def from_bytes(cls: type[T], content: bytes) -> T:
        """Return the tokenizer that `to_bytes` wrote. Raises BundleError if the bytes are damaged."""
        try:
            value: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"tokenizer: not valid JSON ({error}); the file is damaged.") from error
        if not (isinstance(value, dict) and value.get("kind") == cls.kind):
            raise BundleError(f"tokenizer: expected a JSON object of the kind '{cls.kind}'; the file is damaged.")
        lists = (value.get("tokens"), value.get("symbols"))
        if not all(isinstance(x, list) and all(isinstance(item, str) for item in x) for x in lists):
            raise BundleError("tokenizer: 'tokens' and 'symbols' must be lists of strings; the file is damaged.")
        return cls(Vocabulary(tuple(value["tokens"])), value["symbols"])

    def to_bytes(self) -> bytes:
        """Return the tokenizer as JSON."""
        return json_bytes({"kind": self.kind, "tokens": self.vocabulary.tokens, "symbols": self.symbols})

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""
        return [self._ids.get(unit, UNK) for unit in self.units(without_surrogates(text))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; PAD, BOS and EOS are skipped, UNK is written `<unk>`."""
        return self.joint.join(self.vocabulary.token(int(id)) for id in ids if id not in (PAD, BOS, EOS))


class Word(Units):
    """Words between white space, joined by one space; for text that is tokenized already, such as phonemes."""

    kind = "word"
    joint = " "

    def units(self, text: str) -> list[str]:
        """Cut at white space."""
        return text.split()


class Character(Units):
    """Single characters, and symbols such as `<turn>` whole; exact for every character it has seen."""

    kind = "character"
    joint = ""

    def __init__(self, vocabulary: Vocabulary, symbols: Sequence[str] = ()) -> None:
        super().__init__(vocabulary, symbols)
        longest_first = sorted(self.symbols, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)

    def units(self, text: str) -> list[str]:
        """Cut into symbols and characters."""
        return self._pattern.findall(text)
