"""Words and phrases that an output must hold: from what the user writes to ids of the target vocabulary."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from encdec_cli.errors import DataError
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.vocabulary import UNK

ALTERNATIVES = "|"
"""Stands between alternatives in a column; a phrase that holds it must come in a JSON record."""
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""How the Unicode names of letters begin that are written without spaces between words."""
_START = "\n"
"""In no piece of a tokenizer, since none is trained on line breaks: what follows it follows without a space."""


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
    ways = [way for phrase in alternatives for way in phrase_ids(tokenizer, phrase) if UNK not in way]
    if not ways:
        told = "', '".join(alternatives)
        raise DataError(f"constraint '{told}': the model cannot write it, its vocabulary lacks a part of it.")
    return ways


def phrase_ids(tokenizer: Tokenizer, phrase: str) -> list[list[int]]:
    """Return the ways in which a phrase can stand in a text.

    As a word of its own, with the space before it that is part of SentencePiece's pieces. A phrase that begins with
    punctuation, or in a script without spaces between words, may also follow the text before it directly.
    """
    ways = [tokenizer.encode(phrase)]
    if not phrase[0].isalnum() or unicodedata.name(phrase[0], "").startswith(WITHOUT_SPACES):
        ways.append(tokenizer.encode(_START + phrase)[len(tokenizer.encode(_START)) :])
    return [list(way) for way in dict.fromkeys(map(tuple, ways)) if way]
