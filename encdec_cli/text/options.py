"""What a tokenizer is trained with, and which of very many lines it is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from encdec_cli.errors import UsageError
from encdec_cli.text.vocabulary import SPECIAL

MAX_LINES = 1_000_000
"""Most lines that a tokenizer is trained on, evenly spread over the corpus."""


@dataclass(frozen=True)
class TokenizerOptions:
    """How to train a tokenizer."""

    size: int = 8000
    """Most tokens in the vocabulary, special tokens, symbols and (sentencepiece) 256 bytes included."""
    algorithm: Literal["unigram", "bpe"] = "unigram"
    """Of sentencepiece alone."""
    symbols: tuple[str, ...] = ()
    """Strings that are always one token of their own, such as `<turn>`; without white space."""

    def __post_init__(self) -> None:
        if self.size <= len(SPECIAL) + len(self.symbols):
            raise UsageError(f"text.vocabulary: {self.size} leaves no room for a token; use some hundreds or more.")
        for symbol in self.symbols:
            if not symbol or symbol in SPECIAL or any(character.isspace() for character in symbol):
                raise UsageError(f"symbol {symbol!r}: must be text without white space and none of {SPECIAL}.")


def evenly(lines: Iterable[str], limit: int = MAX_LINES) -> list[str]:
    """Return all lines, or if there are more than `limit`, every 2nd, 4th, 8th … of them: at most `limit`.

    One pass, memory for `limit` lines, and the same lines every time.
    """
    chosen: list[str] = []
    stride = 1
    for number, line in enumerate(lines):
        if number % stride:
            continue
        if len(chosen) == limit:
            chosen = chosen[::2]
            stride *= 2
            if number % stride:
                continue
        chosen.append(line)
    return chosen[:limit]


def without_surrogates(text: str) -> str:
    """Return `text` with lone surrogates, which no UTF-8 file can hold but JSON escapes can, as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
