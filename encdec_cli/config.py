"""Recipes to types: every mistake at once, each as `file:line:column: key: what (did you mean 'x'?)`.

A schema is a dataclass whose fields are the sections of the file: dataclasses themselves, components chosen by
`name` from a registry, or plain values. Overrides of the command line go through the same checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from encdec_cli import config_yaml
from encdec_cli.config_mistakes import join, tell
from encdec_cli.config_schema import (
    SectionModel,
    adapter,
    model_of,
    plain_value,
    recipe_keys,
    required,
    schema_of,
    types_of,
)
from encdec_cli.config_yaml import Node, Place, PlacedError, plain
from encdec_cli.errors import EncdecError, UsageError
from encdec_cli.registry import Registry, nearest

S = TypeVar("S")
_SHOWN = 50


@dataclass(frozen=True)
class Component:
    """A component as a recipe names it: its name, its checked keys, its class."""

    name: str
    config: Any
    """The component itself where it has no weights; otherwise its `Config`."""
    cls: type[Any]

    def build(self, *arguments: Any) -> Any:
        """Return the component: for one with weights, `cls(config, *arguments)`."""
        return self.config if isinstance(self.config, self.cls) else self.cls(self.config, *arguments)

    def plain(self) -> dict[str, Any]:
        """Return name and keys, all defaults filled, as plain JSON types."""
        return {"name": self.name, **plain_value(self.config)}


@dataclass(frozen=True)
class Chosen:
    """Marks a section whose `name` chooses a component: `Annotated[Component, Chosen(models, "transformer")]`."""

    registry: Registry[type[Any]]
    default: str | None = None
    """The name where the recipe gives none; without it the section is required."""


@dataclass(frozen=True)
class Unchecked:
    """Stands for a section that the command does not use: only its key was checked."""

    value: Any


class Mistakes:
    """Collects what is wrong, to tell it all at once."""

    def __init__(self) -> None:
        self._found: list[tuple[bool, Place, str]] = []

    def add(self, place: Place, path: str, what: str) -> None:
        """Note one mistake; `path` is the dotted key, empty for the file as a whole."""
        # An override begins with its key: there is no need to name it twice.
        named = not path or str(place).startswith(f"{path}=")
        self._found.append((place.line == 0, place, f"{place}: {what}" if named else f"{place}: {path}: {what}"))

    def __len__(self) -> int:
        return len(self._found)

    def check(self) -> None:
        """Raise UsageError with one line a mistake, in the order of the file, if there is any."""
        if not self._found:
            return
        lines = list(dict.fromkeys(line for _, _, line in sorted(self._found)))
        rest = [f"and {len(lines) - _SHOWN} more mistakes"] if len(lines) > _SHOWN else []
        raise UsageError("\n".join(lines[:_SHOWN] + rest))


def load(path: Path, schema: type[S], overrides: Sequence[str] = (), sections: Collection[str] | None = None) -> S:
    """Read a file into `schema`.

    Args:
        path: the YAML file.
        schema: the dataclass whose fields are the sections.
        overrides: `key=value` words, such as `train.steps=100`.
        sections: the sections to check; the others become `Unchecked`. None checks all.

    Raises:
        UsageError: naming every mistake with its place.
    """
    mistakes = Mistakes()
    tree = read(path, overrides, mistakes)
    return build(tree, schema, mistakes, sections)


def read(path: Path, overrides: Sequence[str], mistakes: Mistakes) -> Node:
    """Read a file and apply overrides. Raises UsageError if the text itself is wrong."""
    try:
        tree = config_yaml.read(path)
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


def value_of(text: str, place: Place) -> Node:
    """Read the value of a `key=value` word: YAML if it is quoted or bracketed, otherwise a scalar as it stands."""
    if text[:1] in ("[", "{", '"', "'"):
        return config_yaml.parse(text, str(place), place)
    return Node(config_yaml.scalar(text), place, place)


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
            mistakes.add(node.key, key, f"unknown key{nearest(key, list(fields))}")
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
    if get_origin(hint) is Annotated:
        chosen = next(mark for mark in get_args(hint) if isinstance(mark, Chosen))
        if given is None and chosen.default is None:
            mistakes.add(tree.place, key, "missing")
            return None
        return _build_component(chosen, given or Node({}, tree.place, tree.place), key, mistakes)
    if given is not None and given.value is None:
        given = Node({}, given.place, given.key)
    return _checked(model_of(hint) if isinstance(hint, type) and is_dataclass(hint) else hint, given, key, mistakes)


def _build_component(chosen: Chosen, node: Node, path: str, mistakes: Mistakes) -> Component | None:
    if node.value is None:
        node = Node({}, node.place, node.key)
    if not isinstance(node.value, dict):
        what = f"expected a section such as {{name: {chosen.registry.names()[0]}}}, found {tell(plain(node))}"
        mistakes.add(node.place, path, what)
        return None
    inside = dict(node.value)
    name = inside.pop("name", None)
    if name is None and chosen.default is None:
        mistakes.add(node.place, f"{path}.name", f"missing; choose among {', '.join(chosen.registry.names())}")
        return None
    if name is None:
        name = Node(chosen.default, node.place, node.key)
    cls = _look_up(chosen.registry, name, f"{path}.name", mistakes)
    if cls is None:
        return None
    return _component(cls, str(name.value), Node(inside, node.place, node.key), path, mistakes)


def _look_up(registry: Registry[type[Any]], name: Node, path: str, mistakes: Mistakes) -> type[Any] | None:
    known = registry.names()
    if name.value not in known:
        hint = nearest(str(name.value), known)
        mistakes.add(name.place, path, f"no {registry.kind} {tell(plain(name))} among {', '.join(known)}{hint}")
        return None
    try:
        return registry.get(str(name.value))
    except EncdecError as error:
        mistakes.add(name.place, path, str(error).rstrip("."))
        return None


def _component(cls: type[Any], name: str, node: Node, path: str, mistakes: Mistakes) -> Component | None:
    try:
        model = model_of(schema_of(cls))
    except (AttributeError, EncdecError) as error:
        mistakes.add(node.key, path, f"'{name}' cannot be configured: {error}")
        return None
    config = _checked(model, node, path, mistakes)
    return None if config is None else Component(name, config, cls)


def _checked(hint: Any, node: Node | None, path: str, mistakes: Mistakes) -> Any:
    node = node or Node({}, Place(0, 0, path), Place(0, 0, path))
    try:
        value = adapter(hint).validate_python(plain(node))
    except ValidationError as error:
        for place, key, what in join(error.errors(include_url=False), node, path, hint):
            mistakes.add(place, key, what)
        return None
    return _instance(value, node, path, mistakes)


def _instance(value: Any, node: Node, path: str, mistakes: Mistakes) -> Any:
    """Turn validated models into their dataclasses, the innermost first."""
    if isinstance(value, (list, tuple)) and isinstance(node.value, list):
        items = [_instance(item, node.value[i], f"{path}[{i}]", mistakes) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict) and isinstance(node.value, dict):
        return {key: _instance(child, node.value[key], f"{path}.{key}", mistakes) for key, child in value.items()}
    if not isinstance(value, SectionModel) or not isinstance(node.value, dict):
        return value
    before = len(mistakes)
    parts, dot = node.value, "." if path else ""
    inside = {key: _instance(v, parts[key], f"{path}{dot}{key}", mistakes) for key, v in value.written().items()}
    if len(mistakes) > before:
        return None
    try:
        return value.schema_class(**inside)
    except (ValueError, EncdecError) as error:
        mistakes.add(node.key, path, str(error).rstrip("."))
        return None


def parse_component(text: str, registry: Registry[type[Any]], flag: str) -> Any:
    """Read `name,key=value,…` of the command line, such as `sampling,temperature=0.8,seed=1`; return the component.

    Args:
        text: the word after the flag.
        registry: where the name is looked up.
        flag: the flag as the user wrote it, for messages.
    """
    mistakes = Mistakes()
    place = Place(0, 0, f"{flag} {text}")
    name, *pairs = _split(text)
    inside = {"name": Node(name, place, place)}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            if not equals or not key or key in inside:
                raise PlacedError(place, f"{tell(pair)}: expected key=value, each key once")
            inside[key] = value_of(value, place)
        except PlacedError as mistake:
            mistakes.add(place, "", str(mistake))
    mistakes.check()
    cls = _look_up(registry, inside.pop("name"), "", mistakes)
    component = _component(cls, name, Node(dict(inside), place, place), "", mistakes) if cls else None
    mistakes.check()
    if component is None:
        raise UsageError(str(place))
    return component.config


def _split(text: str) -> Iterable[str]:
    """Cut at the commas that stand outside brackets and quotes."""
    words, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and not depth and not quote:
            words.append("")
        else:
            words[-1] += character
    return words
