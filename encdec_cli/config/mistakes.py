"""What pydantic found, in the words of this house, each at the place where it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from encdec_cli.config.schema import known_keys
from encdec_cli.config.tree import Node, Place, plain
from encdec_cli.errors import UsageError
from encdec_cli.registry import nearest

_LONGEST = 60
_SHOWN = 50
_EXPECTED = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "finite_number": "a finite number",
    "string_type": "str",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "path_type": "a path",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


class Mistakes:
    """Collects what is wrong, to tell it all at once."""

    def __init__(self) -> None:
        self._found: list[tuple[bool, Place, str]] = []

    def add(self, place: Place, path: str, what: str) -> None:
        """Note one mistake; `path` is the dotted key, empty for the file as a whole."""
        # An override begins with its key: there is no need to name it twice.
        named = not path or str(place).startswith(f"{path}=")
        line = f"{place}: {what}" if named else f"{place}: {path}: {what}"
        self._found.append((place.line == 0, place, one_line(line)))

    def __len__(self) -> int:
        return len(self._found)

    def check(self) -> None:
        """Raise UsageError with one line a mistake, in the order of the file, if there is any."""
        if not self._found:
            return
        lines = list(dict.fromkeys(line for _, _, line in sorted(self._found)))
        rest = [f"and {len(lines) - _SHOWN} more mistakes"] if len(lines) > _SHOWN else []
        raise UsageError("\n".join(lines[:_SHOWN] + rest))


def tell(value: Any) -> str:
    """Show a value in a message: quoted, shortened, with control characters escaped."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[:_LONGEST] + "…")
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else str(value)[:_LONGEST]


def one_line(text: str) -> str:
    """Return `text` with line ends and control characters escaped, so that a mistake stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def join(errors: Sequence[Any], root: Node, path: str, hint: Any) -> Iterator[tuple[Place, str, str]]:
    """Yield place, dotted key and sentence of each mistake; several alternatives of one value make one sentence."""
    groups: dict[str, tuple[Node, list[Any]]] = {}
    for error in errors:
        node, key = _locate(root, path, error)
        groups.setdefault(key, (node, []))[1].append(error)
    for key, (node, group) in groups.items():
        if any(other != key and other.startswith((f"{key}.", f"{key}[")) for other in groups):
            continue  # the deeper mistake tells more: this one only says that no alternative fits
        for kind in dict.fromkeys(error["type"] for error in group if error["type"] in ("missing", "extra_forbidden")):
            yield (node.place, key, "missing") if kind == "missing" else (node.key, key, _unknown(key, group, hint))
        rest = [error for error in group if error["type"] not in ("missing", "extra_forbidden")]
        if rest:
            yield node.place, key, _mismatch(rest, node)


def _locate(root: Node, path: str, error: Any) -> tuple[Node, str]:
    node = root
    *_, last = error["loc"] or ("",)
    for part in error["loc"]:
        if isinstance(node.value, dict) and part in node.value:
            node, path = node.value[part], f"{path}.{part}".lstrip(".")
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node, path = node.value[part], f"{path}[{part}]"
        # Any other part is pydantic's name for an alternative of a union.
    if error["type"] != "missing":
        return node, path
    return node, f"{path}[{last}]" if isinstance(last, int) else f"{path}.{last}".lstrip(".")


def _unknown(key: str, group: Sequence[Any], hint: Any) -> str:
    """Suggest among the keys of the section in which the unknown one stands."""
    known = known_keys(hint, [part for part in group[0]["loc"][:-1] if isinstance(part, str)])
    return unknown_key(key.rpartition(".")[2], known)


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key is unknown, and name the nearest known one, or all where none is near."""
    keys = list(dict.fromkeys(known))
    return f"unknown key{nearest(key, keys) or '; expected ' + (', '.join(keys) or 'none')}"


def _mismatch(errors: Sequence[Any], node: Node) -> str:
    expected, others = [], []
    for error in errors:
        if error["type"] in _EXPECTED:
            expected.append(_EXPECTED[error["type"]])
        elif error["type"] in _BOUNDS:
            expected.append(_BOUNDS[error["type"]].format(**error["ctx"]))
        elif error["type"] in ("literal_error", "enum"):
            expected.append(str(error["ctx"]["expected"]))
        else:
            others.append(error["msg"].removeprefix("Value error, ").removeprefix("Input "))
    found = tell(plain(node))
    if not expected:
        return f"{others[0]}, found {found}"
    words = [word.strip("'") for choice in expected for word in choice.replace(" or ", ", ").split(", ")]
    suggestion = nearest(node.value, words) if isinstance(node.value, str) else ""
    return f"expected {' or '.join(dict.fromkeys(expected))}, found {found}{suggestion}"
