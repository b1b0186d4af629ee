"""Localised expressions: dates, amounts, measures and lists in two locales, made by Babel from CLDR.

Nothing is downloaded or stored: the pairs are computed, and are the same for the same fields and version of Babel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from encdec_cli.corpora.corpus import Corpus, known_split
from encdec_cli.errors import UsageError
from encdec_cli.registry import nearest
from encdec_cli.text.example import Example

if TYPE_CHECKING:
    from babel import Locale

    from encdec_cli.corpora.expressions import Kind, Render

_FORMAT = 1
"""Raised when the pairs change for the same fields and Babel."""

_GIVE_UP = 300
"""A kind that yields nothing new so often in a row is exhausted."""


@dataclass
class Cldr(Corpus):
    """Pairs of expressions, the same value written in two locales; one source has exactly one target.

    The splits share no source, and test and valid stay the same whatever `pairs` is. No-break and narrow
    spaces stand where CLDR puts them. Numbers are drawn with `random.Random(seed).randrange` alone, which
    gives the same sequence on every version of Python.
    """

    source: str = "en"
    """Locale read, such as en or pt_BR."""
    target: str = "de"
    """Locale written."""
    pairs: int = 20_000
    """Pairs for training."""
    valid: int = 500
    """Pairs for validation."""
    test: int = 500
    """Pairs for the final test."""
    seed: int = 1
    """Another seed draws other values."""

    def __post_init__(self) -> None:
        for name, value in (("pairs", self.pairs), ("valid", self.valid), ("test", self.test)):
            if value < 0:
                raise UsageError(f"{name}: {value} must be 0 or more.")
        # Not fields: they are no keys of a recipe. The stream is drawn from as far as somebody reads.
        self._drawn: list[Example] = []
        self._stream: Iterator[Example] | None = None

    def check(self) -> None:
        """Raise UsageError for an unknown locale, and without Babel."""
        self._localised()

    def read(self, split: str) -> Iterator[Example]:
        """Yield the pairs of a split; `record` has the kind. Raises UsageError for an unknown locale."""
        first, count = {
            "test": (0, self.test),
            "valid": (self.test, self.valid),
            "train": (self.test + self.valid, self.pairs),
        }[known_split(split)]
        if self._stream is None:
            self._stream = self._draw()
        self._drawn += islice(self._stream, max(0, first + count - len(self._drawn)))
        if len(self._drawn) < first + count:
            raise UsageError(
                f"data.pairs: there are only {len(self._drawn)} expressions from {self.source} to {self.target}, "
                f"not {self.test + self.valid + self.pairs}; ask for fewer."
            )
        yield from self._drawn[first : first + count]

    def _draw(self) -> Iterator[Example]:
        source, target, kinds = self._localised()
        rng = Random(self.seed)
        misses = {kind.name: 0 for kind in kinds}
        seen: set[str] = set()
        while kinds:
            kind = _weighted(kinds, rng)
            pair = _written(kind.draw(rng), source, target)
            if pair is None or pair[0] in seen:
                misses[kind.name] += 1
                kinds = [kind for kind in kinds if misses[kind.name] < _GIVE_UP]
                continue
            misses[kind.name] = 0
            seen.add(pair[0])
            yield Example(*pair, {"kind": kind.name})

    def _localised(self) -> tuple[Locale, Locale, list[Kind]]:
        try:
            from encdec_cli.corpora.expressions import kinds  # noqa: PLC0415 needs an extra
        except ImportError as error:
            raise UsageError("the corpus 'cldr' needs an extra: pip install 'encdec-cli[corpora]'.") from error
        source, target = _locale("source", self.source), _locale("target", self.target)
        return source, target, kinds(source, target)

    def fingerprint(self) -> str:
        """Return a digest of the fields and the version of Babel."""
        try:
            installed = version("babel")
        except PackageNotFoundError:
            installed = "not installed"
        return hashlib.sha256(json.dumps([_FORMAT, installed, asdict(self)]).encode()).hexdigest()


def _locale(key: str, name: str) -> Locale:
    from babel import Locale, UnknownLocaleError  # noqa: PLC0415 needs an extra
    from babel.localedata import locale_identifiers  # noqa: PLC0415

    try:
        return Locale.parse(name.replace("-", "_"))
    except (ValueError, TypeError, UnknownLocaleError) as error:
        hint = nearest(name, locale_identifiers())
        raise UsageError(f"{key}: CLDR has no locale '{name}'{hint}; expected one such as en, de or pt_BR.") from error


def _weighted(kinds: list[Kind], rng: Random) -> Kind:
    place = rng.randrange(sum(kind.weight for kind in kinds))
    for kind in kinds:
        place -= kind.weight
        if place < 0:
            return kind
    raise AssertionError("the weights do not add up")


def _written(ways: Sequence[Render], source: Locale, target: Locale) -> tuple[str, str] | None:
    """Write a value both ways; None if a locale lacks the data or another way has the same source text."""
    try:
        text, translation = ways[0](source), ways[0](target)
        for way in ways[1:]:
            if way(source) == text and way(target) != translation:
                return None
    except (LookupError, ValueError, AttributeError):
        return None
    return (text, translation) if text.strip() and translation.strip() else None
