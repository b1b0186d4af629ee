"""What a tokenizer is trained with, and which of very many lines it is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from encdec_cli.errors import UsageError
from encdec_cli.text.vocabulary import SPECIAL


@dataclass(frozen=True)
class TokenizerOptions:
    """How to train a tokenizer; word and character tokenizers use `size`, `symbols` and `max_lines` alone."""

    size: int = 8000
    """Most tokens in the vocabulary, special tokens, symbols and (sentencepiece) 256 bytes included."""
    algorithm: str = "unigram"
    """Of sentencepiece: `unigram` or `bpe`."""
    symbols: tuple[str, ...] = ()
    """Strings that are always one token of their own, such as `<turn>`; without white space."""
    max_lines: int = 1_000_000
    """Train on at most this many lines, evenly spread over the corpus."""

    def __post_init__(self) -> None:
        if self.algorithm not in ("unigram", "bpe"):
            raise UsageError(f"text.algorithm: no '{self.algorithm}' among unigram, bpe.")
        if self.size <= len(SPECIAL) + len(self.symbols):
            raise UsageError(f"text.vocabulary: {self.size} leaves no room for a token; use some hundreds or more.")
        if self.max_lines < 1:
            raise UsageError(f"max_lines: {self.max_lines} must be at least 1.")
        for symbol in self.symbols:
            if not symbol or symbol in SPECIAL or any(character.isspace() for character in symbol):
                raise UsageError(f"symbol {symbol!r}: must be text without white space and none of {SPECIAL}.")


def evenly(lines: Iterable[str], limit: int) -> list[str]:
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
