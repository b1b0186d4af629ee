"""A schema for readers: the dataclasses as a commented recipe."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from encdec_cli.config.schema import (
    Chosen,
    chosen_of,
    default,
    descriptions,
    keys,
    plain_value,
    recipe_keys,
    required,
    schema_of,
    types_of,
)
from encdec_cli.config.tree import write
from encdec_cli.errors import EncdecError
from encdec_cli.registry import Registry

_WIDTH = 100


def _schemas(registry: Registry[type[Any]]) -> dict[str, type[Any]]:
    """Return the keys of every component that loads; `encdec list` tells of the others."""
    found = {}
    for name in registry.names():
        with suppress(EncdecError, AttributeError):
            found[name] = schema_of(registry.get(name))
    return found


def recipe_text(schema: type[Any]) -> str:
    """Return a file that holds every key of `schema` with its default, each under a comment that tells its meaning."""
    hints, texts = types_of(schema), descriptions(schema)
    lines = _comment(inspect.cleandoc(schema.__doc__ or ""), "")
    for key, field in recipe_keys(schema).items():
        chosen = chosen_of(hints[key])
        needed = " It has no default: every recipe names one." if chosen and not chosen.default else ""
        lines += ["", *_comment(f"{texts.get(key, '')}{needed}", "")]
        if chosen:
            lines += _components(key, chosen)
        elif is_dataclass(hints[key]):
            lines += [f"{key}:", *_keys(hints[key], "  ")]
        else:
            lines.append(f"{key}: {write(plain_value(default(field)))}")
    return "\n".join(lines) + "\n"


def _components(key: str, chosen: Chosen) -> Iterator[str]:
    """Yield the section of one component, then the others as comments."""
    schemas = _schemas(chosen.registry)
    first = chosen.default or chosen.example
    for name in sorted(schemas, key=lambda name: name != first):
        meaning = _comment(inspect.cleandoc(schemas[name].__doc__ or "").split("\n\n")[0], "  ")
        block = [f"{key}:", *meaning, f"  name: {name}", *_keys(schemas[name], "  ")]
        yield from block if name == first else ["", *(f"# {line}".rstrip() for line in block)]


def _keys(schema: type[Any], indent: str) -> Iterator[str]:
    hints, texts = types_of(schema), descriptions(schema)
    shown: set[type[Any]] = set()
    for key, field in keys(schema).items():
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        among = f" One of: {', '.join(write(choice) for choice in choices)}." if choices else ""
        yield from _comment(f"{texts.get(key, '')}{among}".strip(), indent)
        if required(field):
            yield f"{indent}# {key}: ...  (required)"
        else:
            yield f"{indent}{key}: {write(plain_value(default(field)))}"
        nested = _nested(hints[key])
        if nested is not None and nested not in shown:
            shown.add(nested)
            yield from (f"{indent}# {line}" for line in [f"{key}:", *_keys(nested, "  ")])


def _nested(hint: Any) -> type[Any] | None:
    """Return the dataclass within a type such as `Side | None`, whose keys a default of null does not show."""
    if chosen_of(hint):
        return None  # a component: its keys stand where it is chosen first
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


def _comment(text: str, indent: str) -> list[str]:
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    lines = [line for part in paragraphs for line in textwrap.wrap(part, _WIDTH - len(indent), break_on_hyphens=False)]
    return [f"{indent}# {line}" for line in lines]
