"""Reads a file and the overrides of the command line into the sections of a schema.

A schema is a dataclass whose fields are the sections of the file: dataclasses themselves, components chosen by
`name` from a registry, or plain values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from encdec_cli.config import tree as yaml_tree
from encdec_cli.config.checks import build_component, checked
from encdec_cli.config.mistakes import Mistakes, tell, unknown_key
from encdec_cli.config.schema import chosen_of, model_of, recipe_keys, required, types_of
from encdec_cli.config.tree import Node, Place, PlacedError, plain, value_of
from encdec_cli.errors import UsageError

S = TypeVar("S")


@dataclass(frozen=True)
class Unchecked:
    """Stands for a section that the command does not use: only its key was checked."""

    value: Any


def read(path: Path, overrides: Sequence[str], mistakes: Mistakes) -> Node:
    """Read a file and apply overrides. Raises UsageError if the text itself is wrong."""
    try:
        tree = yaml_tree.read(path)
    except PlacedError as mistake:
        mistakes.add(mistake.place, "", str(mistake))
        mistakes.check()
        raise
    if tree.value is None:
        tree.value = {}
    for word in overrides:
        try:
            override(tree, word)
        except PlacedError as mistake:
            mistakes.add(mistake.place, "", str(mistake))
    return tree


def override(tree: Node, word: str) -> None:
    """Set one key of a tree from a word such as `train.steps=100`. Raises PlacedError."""
    place = Place(0, 0, word)
    path, equals, text = word.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise PlacedError(place, "expected an override such as train.steps=100")
    value = value_of(text, place)
    node = tree
    for name in names[:-1]:
        inside = _section(node, place)
        node = inside.setdefault(name, Node({}, place, place))
        if node.value is None:
            node.value = {}
    _section(node, place)[names[-1]] = value


def _section(node: Node, place: Place) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        raise PlacedError(place, f"{node.place} is not a section; it has no keys to override")
    return node.value


def build(
    tree: Node,
    schema: type[S],
    mistakes: Mistakes,
    sections: Collection[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> S:
    """Check a tree against `schema` and return an instance of it; `extra` are fields that are no keys.

    Raises:
        UsageError: with all mistakes, those noted before included.
    """
    if not isinstance(tree.value, dict):
        mistakes.add(tree.place, "", f"expected sections such as 'train:', found {tell(plain(tree))}")
        mistakes.check()
        raise UsageError(str(tree.place))
    fields = recipe_keys(schema)
    for key, node in tree.value.items():
        if key not in fields:
            mistakes.add(node.key, key, unknown_key(key, list(fields)))
    values: dict[str, Any] = dict(extra or {})
    hints = types_of(schema)
    for key, field in fields.items():
        given = tree.value.get(key)
        if sections is not None and key not in sections:
            values[key] = Unchecked(None if given is None else plain(given))
        elif given is not None or get_origin(hints[key]) is Annotated:
            values[key] = _build_section(hints[key], given, tree, key, mistakes)
        elif required(field):
            mistakes.add(tree.place, key, "missing")
    mistakes.check()
    return schema(**values)


def _build_section(hint: Any, given: Node | None, tree: Node, key: str, mistakes: Mistakes) -> Any:
    chosen = chosen_of(hint)
    if chosen is not None:
        return build_component(chosen, given or Node({}, tree.place, tree.place), key, mistakes)
    if given is not None and given.value is None:
        given = Node({}, given.place, given.key)
    return checked(model_of(hint) if isinstance(hint, type) and is_dataclass(hint) else hint, given, key, mistakes)
