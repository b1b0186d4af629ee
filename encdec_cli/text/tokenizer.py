"""What a tokenizer is, and how one is trained or loaded by the name of its kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from encdec_cli.errors import BundleError
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.units import Character, Word
from encdec_cli.text.vocabulary import Vocabulary

__all__ = [
    "KINDS",
    "Character",
    "SentencePiece",
    "Tokenizer",
    "TokenizerOptions",
    "Word",
    "load_tokenizer",
    "train_tokenizer",
]


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def kind(self) -> str:
        """The name under which `load_tokenizer` knows it."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; PAD, BOS and EOS are skipped."""

    def to_bytes(self) -> bytes:
        """Return the whole tokenizer as bytes; equal tokenizers give equal bytes."""


KINDS: dict[str, type[SentencePiece] | type[Word] | type[Character]] = {
    "sentencepiece": SentencePiece,
    "word": Word,
    "character": Character,
}
"""Every kind of tokenizer by its name in a recipe."""


def train_tokenizer(kind: str, lines: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    """Train a tokenizer on lines. The same lines and options give the same bytes.

    Raises UsageError for a vocabulary too small for the characters of the corpus, DataError if there is no text.
    """
    return KINDS[kind].train(lines, options)


def load_tokenizer(kind: str, content: bytes) -> Tokenizer:
    """Return the tokenizer that `to_bytes` wrote. Raises BundleError if the bytes are damaged."""
    if kind not in KINDS:
        raise BundleError(f"tokenizer: no kind '{kind}' among {', '.join(KINDS)}; a newer version wrote this bundle.")
    return KINDS[kind].from_bytes(content)
