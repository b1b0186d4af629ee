"""From a tree to dataclasses and components: pydantic checks the values, then each dataclass checks itself."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from encdec_cli.config.mistakes import Mistakes, join, tell
from encdec_cli.config.schema import (
    Chosen,
    Component,
    SectionModel,
    adapter,
    chosen_of,
    keys,
    model_of,
    required,
    schema_of,
    types_of,
)
from encdec_cli.config.tree import Node, Place, plain
from encdec_cli.errors import EncdecError
from encdec_cli.registry import Registry, nearest


def checked(hint: Any, node: Node | None, path: str, mistakes: Mistakes) -> Any:
    """Return the value of a node as `hint` wants it, or None after noting what is wrong with it.

    Args:
        hint: a model of `schema.model_of`, or a plain type such as `list[str]`.
        node: the value; None where nothing was written.
        path: its dotted key, for messages.
        mistakes: where they are noted.
    """
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
    if not isinstance(node.value, dict):
        return value
    if isinstance(value, dict):
        return {key: _instance(child, node.value[key], f"{path}.{key}", mistakes) for key, child in value.items()}
    return _dataclass(value, node.value, node, path, mistakes) if isinstance(value, SectionModel) else value


def _dataclass(value: SectionModel, parts: dict[str, Node], node: Node, path: str, mistakes: Mistakes) -> Any:
    before, dot = len(mistakes), "." if path else ""
    hints, inside = types_of(value.schema_class), {}
    for key, written in value.written().items():
        chosen, where = chosen_of(hints[key]), f"{path}{dot}{key}"
        if chosen is None:
            inside[key] = _instance(written, parts[key], where, mistakes)
        else:
            inside[key] = build_component(chosen, parts[key], where, mistakes)
    if len(mistakes) > before:
        return None
    while True:
        try:
            made = value.schema_class(**inside)
            return made if len(mistakes) == before else None
        except (ValueError, EncdecError) as error:
            key, what = about(str(error), inside)
            if key:
                mistakes.add(parts[key].place, f"{path}{dot}{key}", what)
                del inside[key]  # what is wrong with the other keys it tells without this one
            elif len(mistakes) == before:
                mistakes.add(node.key, path, what)
            if not key or required(keys(value.schema_class)[key]):
                return None


def about(sentence: str, keys: Collection[str]) -> tuple[str, str]:
    """Return which of the keys a sentence is about, the one that it begins with, and the rest; else all of it."""
    sentence = sentence.rstrip(".")
    match = re.match(r"(\w+)(?:: | is )", sentence)
    return (match[1], sentence[match.end() :]) if match and match[1] in keys else ("", sentence)


def build_component(chosen: Chosen, node: Node, path: str, mistakes: Mistakes) -> Component | None:
    """Return the component that a section names, or None after noting what is wrong with it."""
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
    cls = look_up(chosen.registry, name, f"{path}.name", mistakes)
    if cls is None:
        return None
    component = Node(inside, node.place, node.key)
    if name.place.line == 0 and _holds_keys_of_another(cls, component, name, path, mistakes):
        return None
    return component_from(cls, str(name.value), component, path, mistakes)


def _holds_keys_of_another(cls: type[Any], node: Node, name: Node, path: str, mistakes: Mistakes) -> bool:
    """Note it once if the command line renames a section of a file whose other keys fit the old name alone."""
    try:
        known = keys(schema_of(cls))
    except AttributeError:
        return False  # `_component` says what is wrong with it
    others = [key for key, child in node.value.items() if child.key.line and key not in known]  # type: ignore[union-attr]
    if others:
        what = f"the section at {node.key} has keys that {name.value} does not know ({', '.join(others)})"
        mistakes.add(name.place, f"{path}.name", f"{what}; give it whole, such as '{path}={{name: {name.value}}}'")
    return bool(others)


def is_known(registry: Registry[type[Any]], name: Node, path: str, mistakes: Mistakes) -> bool:
    """Return whether a registry has this name, after noting what it has if not; nothing is imported."""
    known = registry.names()
    if name.value in known:
        return True
    hint = nearest(str(name.value), known)
    mistakes.add(name.place, path, f"no {registry.kind} {tell(plain(name))} among {', '.join(known)}{hint}")
    return False


def look_up(registry: Registry[type[Any]], name: Node, path: str, mistakes: Mistakes) -> type[Any] | None:
    """Return the class that a registry knows by this name, or None after noting that it knows none."""
    if not is_known(registry, name, path, mistakes):
        return None
    try:
        return registry.get(str(name.value))
    except EncdecError as error:
        mistakes.add(name.place, path, str(error).rstrip("."))
        return None


def component_from(cls: type[Any], name: str, node: Node, path: str, mistakes: Mistakes) -> Component | None:
    """Return the component of a class with the keys of a node, or None after noting what is wrong with them."""
    try:
        model = model_of(schema_of(cls))
    except (AttributeError, EncdecError) as error:
        mistakes.add(node.key, path, f"'{name}' cannot be configured: {error}")
        return None
    config = checked(model, node, path, mistakes)
    return None if config is None else Component(name, config, cls)
