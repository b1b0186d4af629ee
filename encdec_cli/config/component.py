"""Components in a recipe and on the command line: a name from a registry, and keys that its class declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from encdec_cli.config.checks import checked
from encdec_cli.config.mistakes import Mistakes, tell
from encdec_cli.config.schema import keys, model_of, plain_value, schema_of
from encdec_cli.config.tree import Node, Place, PlacedError, from_plain, plain, value_of
from encdec_cli.errors import EncdecError
from encdec_cli.registry import Registry, nearest


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
    example: str | None = None
    """The name that an explained recipe shows where there is no default."""


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
    cls = _look_up(chosen.registry, name, f"{path}.name", mistakes)
    if cls is None:
        return None
    component = Node(inside, node.place, node.key)
    if name.place.line == 0 and _holds_keys_of_another(cls, component, name, path, mistakes):
        return None
    return _component(cls, str(name.value), component, path, mistakes)


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
    config = checked(model, node, path, mistakes)
    return None if config is None else Component(name, config, cls)


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
    cls = _look_up(registry, Node(name, place, place), path, mistakes)
    component = _component(cls, name, Node(dict(inside), place, place), path, mistakes) if cls else None
    return None if component is None else component.config


def _changed(base: Component, text: str, place: Place, mistakes: Mistakes) -> Any:
    changes = _pairs(_split(text), place, "", mistakes)
    if changes is None:
        return None
    kept = {key: from_plain(value, place) for key, value in plain_value(base.config).items()}
    component = _component(base.cls, base.name, Node({**kept, **changes}, place, place), "", mistakes)
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
