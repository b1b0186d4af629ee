"""From a tree to a dataclass: pydantic checks the values, then each dataclass checks itself."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from encdec_cli.config.mistakes import Mistakes, join
from encdec_cli.config.schema import SectionModel, adapter
from encdec_cli.config.tree import Node, Place, plain
from encdec_cli.errors import EncdecError


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
    inside = {key: _instance(v, parts[key], f"{path}{dot}{key}", mistakes) for key, v in value.written().items()}
    if len(mistakes) > before:
        return None
    try:
        return value.schema_class(**inside)
    except (ValueError, EncdecError) as error:
        # A sentence that begins with one of the keys is about that key.
        key, colon, what = str(error).rstrip(".").partition(": ")
        if colon and key in parts:
            mistakes.add(parts[key].place, f"{path}{dot}{key}", what)
        else:
            mistakes.add(node.key, path, str(error).rstrip("."))
        return None
