"""Words and phrases that outputs must or must not hold: from what the user writes to ids of the target vocabulary."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from encdec_cli.errors import DataError
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.vocabulary import UNK

ALTERNATIVES = "|"
"""Stands between alternatives in a column; a phrase that holds it must come in a JSON record."""
WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "FULLWIDTH", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
"""How the Unicode names of letters begin that are written without spaces between words."""
_APART = (("", ""), ("a", "a "))
"""What may stand before a phrase, without and with what separates them: nothing, a word and a space."""
_JOINED = (("(", "("), ("\n", "\n"))
"""Likewise where nothing separates them. A bracket may be one piece with what follows, but a line break is in no piece,
since no tokenizer is trained on any; that of others may be read as a space, but not a bracket."""


def constraints_of_record(record: dict[str, Any]) -> list[list[str]]:
    """Return the field `constraints` of a record: for each constraint its alternatives. Raises DataError."""
    given = record.get("constraints")
    if given is None:
        return []
    if not isinstance(given, list):
        raise DataError(f"field 'constraints': expected a list, found {type(given).__name__}.")
    return [_checked(one if isinstance(one, list) else [one]) for one in given]


def constraints_of_columns(columns: Sequence[str]) -> list[list[str]]:
    """Return the constraints in the columns after a line's source; an empty column holds none. Raises DataError."""
    return [_checked(column.split(ALTERNATIVES)) for column in columns if column.strip()]


def _checked(alternatives: Sequence[Any]) -> list[str]:
    for one in alternatives:
        if not isinstance(one, str):
            raise DataError(f"constraints: expected texts or lists of texts, found {type(one).__name__}.")
    if not alternatives or not all(one.strip() for one in alternatives):
        raise DataError("constraints: found an empty phrase; expected at least a character in each.")
    return [one.strip() for one in alternatives]


def constraint_ids(tokenizer: Tokenizer, alternatives: Sequence[str]) -> list[list[int]]:
    """Return the ways in which one of some phrases can be written.

    Raises DataError if none can, because each holds something that is not in the vocabulary.
    """
    ways = [way for phrase in alternatives for way in spellings(tokenizer, phrase, as_words=True)]
    if not ways:
        told = "', '".join(alternatives)
        raise DataError(f"constraint '{told}': the model cannot write it, its vocabulary lacks a part of it.")
    return ways


def spellings(tokenizer: Tokenizer, phrase: str, as_words: bool = False) -> list[list[int]]:
    """Return the ways in which the tokens of a phrase can stand in an output, each once.

    At the beginning of a line, after a space, and directly after other text, as after a bracket; with SentencePiece
    these may differ (`▁word`, `word`). Whether the phrase goes on in a longer word is not asked.

    Left out are ways that hold a token outside the vocabulary, and those that end with another way, since whoever finds
    that one has found them.

    as_words: directly after other text only where such a text has no space: before punctuation, and in scripts that
    are written without spaces. So `house` is not to be found in `warehouse`, nor in `(house)`.
    """
    phrase = phrase.strip()
    found = []
    for before, with_phrase in [*_APART, *([] if as_words and not _joins(phrase) else _JOINED)]:
        known, whole = tokenizer.encode(before), tokenizer.encode(with_phrase + phrase)
        tokens = whole[len(known) :]
        if whole[: len(known)] == known and tokens and UNK not in tokens and tokens not in found:
            found.append(tokens)
    return [one for one in found if not any(one != other and one[-len(other) :] == other for other in found)]


def _joins(phrase: str) -> bool:
    """Whether a phrase can follow other text without a space and be no part of a longer word."""
    return not phrase[0].isalnum() or unicodedata.name(phrase[0], "").startswith(WITHOUT_SPACES)
