"""Components on the command line: a name from a registry, and keys that its class declares."""

from __future__ import annotations

from typing import Any

from encdec_cli.config.checks import component_from, is_known, look_up
from encdec_cli.config.mistakes import Mistakes, tell
from encdec_cli.config.schema import Component, plain_value
from encdec_cli.config.tree import Node, Place, PlacedError, from_plain, value_of
from encdec_cli.registry import Registry


def parse_component(text: str, registry: Registry[type[Any]], flag: str, base: Component | None = None) -> Any:
    """Read `name,key=value,…` of the command line, such as `sampling,temperature=0.8,seed=1`; return the component.

    Args:
        text: the word after the flag.
        registry: where the name is looked up.
        flag: the flag as the user wrote it, for messages.
        base: whose keys are changed where the text has no name, such as `temperature=0.8`.
    """
    mistakes = Mistakes()
    place = Place(0, 0, f"{flag} {text}")
    if base is not None and "=" in _split(text)[0]:
        config = _changed(base, text, place, mistakes)
    else:
        config = component_of(text, registry, place, "", mistakes)
    mistakes.check()
    return config


def check_name(text: str, registry: Registry[type[Any]], flag: str) -> None:
    """Raise UsageError if `name,key=value,…` begins with a name that the registry does not know.

    Nothing is imported to find out, and the keys are not looked at.
    """
    name, place, mistakes = _split(text)[0], Place(0, 0, f"{flag} {text}"), Mistakes()
    if "=" not in name:
        is_known(registry, Node(name, place, place), "", mistakes)
    mistakes.check()


def given_keys(text: str) -> set[str]:
    """Return the keys that `name,key=value,…` gives."""
    return {key for key, equals, _ in (word.partition("=") for word in _split(text)) if equals}


def with_key(text: str, key: str, value: object) -> str:
    """Return `name,key=value,…` with one more key, in place of what the text gives for it."""
    words = [word for word in _split(text) if word and not word.startswith(f"{key}=")]
    return ",".join([*words, f"{key}={value}"])


def component_of(text: str, registry: Registry[type[Any]], place: Place, path: str, mistakes: Mistakes) -> Any:
    """Read `name,key=value,…` that stands at `place` under the key `path`; None after noting what is wrong with it."""
    name, *pairs = _split(text)
    inside = _pairs(pairs, place, path, mistakes)
    if inside is None:
        return None
    cls = look_up(registry, Node(name, place, place), path, mistakes)
    component = component_from(cls, name, Node(dict(inside), place, place), path, mistakes) if cls else None
    return None if component is None else component.config


def _changed(base: Component, text: str, place: Place, mistakes: Mistakes) -> Any:
    changes = _pairs(_split(text), place, "", mistakes)
    if changes is None:
        return None
    kept = {key: from_plain(value, place) for key, value in plain_value(base.config).items()}
    component = component_from(base.cls, base.name, Node({**kept, **changes}, place, place), "", mistakes)
    return None if component is None else component.config


def _pairs(pairs: list[str], place: Place, path: str, mistakes: Mistakes) -> dict[str, Node] | None:
    """Read `key=value` words, or return None after noting what is wrong with them."""
    before = len(mistakes)
    inside: dict[str, Node] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            if not equals or not key or key in inside or key == "name":
                raise PlacedError(place, f"{tell(pair)}: expected key=value, each key once")
            inside[key] = value_of(value, place)
        except PlacedError as mistake:
            mistakes.add(place, path, str(mistake))
    return None if len(mistakes) > before else inside


def _split(text: str) -> list[str]:
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
