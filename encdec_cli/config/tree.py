"""YAML text to a tree that knows where every value was written.

Scalars follow YAML 1.2: `no` is a word (and Norwegian), `5e-4` a number; digits may be grouped, as in `100_000`.
Tags, aliases, duplicate keys and endless nesting are refused, so a recipe can neither run code nor grow in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from encdec_cli.errors import UsageError

LIMIT = 1 << 20
"""Most bytes of a recipe."""
DEPTH = 50
"""Most levels of sections and lists within each other."""

Scalar: TypeAlias = "str | int | float | bool | None"

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUTH = {word: word[0] in "tT" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], Scalar]], ...] = (
    (re.compile(rf"[-+]?{_DIGITS}"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
_LONGEST_NUMBER = 400


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: a position in a file (line and column from 1), or a word of the command line."""

    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Node:
    """A value, its place, and the place of the key before it (its own place where there is none)."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    key: Place


class PlacedError(Exception):
    """One thing wrong at one place; collected by the caller, so that all are told at once."""

    def __init__(self, place: Place, what: str) -> None:
        super().__init__(what)
        self.place = place


def plain(node: Node) -> Any:
    """Return the value without its places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def from_plain(value: Any, place: Place) -> Node:
    """Return a tree whose every node stands at `place`."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(child, place) for key, child in value.items()}, place, place)
    if isinstance(value, list):
        return Node([from_plain(child, place) for child in value], place, place)
    return Node(value, place, place)


def scalar(text: str) -> Scalar:
    """Read an unquoted scalar by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""
    if text in _NULL or text in _TRUTH:
        return _TRUTH.get(text)
    if len(text) <= _LONGEST_NUMBER:
        for pattern, number in _NUMBERS:
            if pattern.fullmatch(text):
                return number(text)
    return text


def write(value: Any) -> str:
    """Return `value` (JSON types) as YAML on one line that `parse` reads back to the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {write(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(write(child) for child in value) + "]"
    if isinstance(value, str):
        simple = re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*", value) and scalar(value) == value
        return value if simple else _quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    # Only what cannot be shown is escaped, eight hexadecimal digits a character.
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def read(path: Path) -> Node:
    """Read a file. Raises UsageError if it cannot be opened, PlacedError if its text is wrong."""
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; give the path of a recipe.") from error
    if len(content) > LIMIT:
        raise UsageError(f"{path}: larger than {LIMIT} bytes; a recipe is a short text file.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise PlacedError(Place(line, column, str(path)), "not UTF-8; save the file as UTF-8 text") from error
    return parse(text, str(path))


def parse(text: str, source: str, place: Place | None = None) -> Node:
    """Parse YAML text into a tree.

    Args:
        text: the YAML text, one document.
        source: the name of the file in messages.
        place: where every node stands, if lines and columns mean nothing to the user (the command line).
    """
    return _Parser(text, source, place).document()


def value_of(text: str, place: Place) -> Node:
    """Read the value of a `key=value` word: YAML if it is quoted or bracketed, otherwise a scalar as it stands."""
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, str(place), place)
    return Node(scalar(text), place, place)


class _Parser:
    """Builds the tree from PyYAML's events, which tell of tags and aliases before anything is made of them."""

    def __init__(self, text: str, source: str, place: Place | None) -> None:
        self.text = text
        self.source = source
        self.place = place
        self.events: Iterator[Any] = iter(())

    def document(self) -> Node:
        try:
            self.events = iter(yaml.parse(self.text, Loader=yaml.SafeLoader))
            next(self.events)  # the start of the stream
            if isinstance(next(self.events), yaml.StreamEndEvent):
                here = self.at(None)
                return Node(None, here, here)
            root = self.node(next(self.events), None, 0)
            next(self.events)  # the end of the document
            following = next(self.events)
            if not isinstance(following, yaml.StreamEndEvent):
                raise PlacedError(self.at(following.start_mark), "a second document (---); a recipe is one document")
            return root
        except yaml.MarkedYAMLError as error:
            raise PlacedError(
                self.at(error.problem_mark), f"not valid YAML: {error.problem or error.context}"
            ) from error
        except yaml.reader.ReaderError as error:
            raise PlacedError(
                self.at_index(error.position), "a character that YAML does not allow in a file"
            ) from error

    def at(self, mark: Any) -> Place:
        if self.place:
            return self.place
        return Place(mark.line + 1, mark.column + 1, self.source) if mark else Place(1, 1, self.source)

    def at_index(self, index: int) -> Place:
        if self.place:
            return self.place
        line = self.text.count("\n", 0, index) + 1
        return Place(line, index - self.text.rfind("\n", 0, index), self.source)

    def node(self, event: Any, key: Place | None, depth: int) -> Node:
        place = self.at(event.start_mark)
        self.refuse(event, place, depth)
        if isinstance(event, yaml.ScalarEvent):
            return Node(scalar(event.value) if event.style is None else event.value, place, key or place)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(self.sequence(depth), place, key or place)
        return Node(self.mapping(depth), place, key or place)

    def refuse(self, event: Any, place: Place, depth: int) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise PlacedError(place, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if event.anchor is not None:
            raise PlacedError(place, f"anchors (&{event.anchor}) are not allowed; write the value out where it is used")
        if event.tag is not None:
            raise PlacedError(place, f"tags ({event.tag}) are not allowed; write the plain value")
        if depth > DEPTH:
            raise PlacedError(place, f"nested deeper than {DEPTH} levels")

    def sequence(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, None, depth + 1))
        return items

    def mapping(self, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            place = self.at(event.start_mark)
            self.refuse(event, place, depth)
            if not isinstance(event, yaml.ScalarEvent):
                raise PlacedError(place, "a key must be a word")
            key = event.value
            if key in items:
                raise PlacedError(place, f"duplicate key {key!r}; it stands already at {items[key].key}")
            items[key] = self.node(next(self.events), place, depth + 1)
        return items
