"""Tokens to ids and back; the four special ids are the same in every vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from encdec_cli.errors import BundleError

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
"""The tokens with the ids PAD, UNK, BOS and EOS."""


@dataclass(frozen=True)
class Vocabulary:
    """All tokens in the order of their ids, the four special ones first."""

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tokens[: len(SPECIAL)] != SPECIAL:
            raise BundleError(f"vocabulary: begins with {self.tokens[: len(SPECIAL)]}, expected {SPECIAL}.")
        if len(set(self.tokens)) != len(self.tokens):
            raise BundleError("vocabulary: a token stands in it twice.")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def id(self, token: str) -> int:
        """Return the id of a token, UNK if there is none."""
        return self._ids.get(token, UNK)

    def token(self, id: int) -> str:
        """Return the token with this id. Raises IndexError outside 0 … len - 1."""
        if id < 0:
            raise IndexError(f"token id {id}: must not be negative")
        return self.tokens[id]

    @cached_property
    def sha256(self) -> str:
        """Of the tokens as a JSON array: equal for equal tokens in equal order."""
        return hashlib.sha256(json.dumps(self.tokens, ensure_ascii=False).encode()).hexdigest()


def with_special(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the four special tokens and then the given ones, each once, in their order."""
    return tuple(dict.fromkeys((*SPECIAL, *tokens)))
