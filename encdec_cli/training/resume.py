"""What may change between a run and its continuation, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from encdec_cli import __version__
from encdec_cli.errors import UsageError
from encdec_cli.recipe import Recipe, resolved

_FIXED = ("model",)
_FIXED_TRAIN = ("tokens", "accumulate", "optimizer", "seed")
_DATA = ("task", "data", "text")


def facts(recipe: Recipe, data_hash: str, precision: str) -> dict[str, Any]:
    """Return what a checkpoint tells of its run: all that decides the bytes of the weights."""
    plugins = {plugin.path.name: plugin.sha256[:12] for plugin in recipe.loaded}
    return {
        "recipe": resolved(recipe),
        "data_hash": data_hash,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": {"encdec": __version__, "torch": str(torch.__version__), **plugins},
    }


def check(old: dict[str, Any], new: dict[str, Any], run: Path, say: Callable[[str], None]) -> None:
    """Say what changed since the checkpoint was written; raise UsageError where the run cannot go on with it."""
    changed = _differences(_comparable(old), _comparable(new))
    fatal = {key: value for key, value in changed.items() if _is_fixed(key)}
    if fatal:
        listed = "; ".join(_verdict(key, a, b, changed) for key, (a, b) in sorted(fatal.items()))
        raise UsageError(f"{run}: this run cannot go on: {listed}; change it back, or start anew with --output FOLDER.")
    for key, (a, b) in sorted(changed.items()):
        exact = "" if key.startswith("recipe.") else "; the weights will not be bit-identical to an unbroken run's"
        say(f"note: {key.removeprefix('recipe.')} was {a!r}, is now {b!r}{exact}")


def _verdict(key: str, old: Any, new: Any, changed: dict[str, tuple[Any, Any]]) -> str:
    if key != "data_hash":
        return f"{key.removeprefix('recipe.')} was {old!r}, is {new!r}"
    why = [f"{k.removeprefix('recipe.')} was {a!r}, is {b!r}" for k, (a, b) in sorted(changed.items()) if _is_data(k)]
    return f"its training data are others ({', '.join(why) or 'the files have changed'})"


def _is_data(key: str) -> bool:
    return key.startswith("recipe.") and key.split(".")[1] in _DATA


def _comparable(facts_: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in facts_["recipe"].items():
        if isinstance(value, dict):
            flat |= {f"recipe.{section}.{key}": v for key, v in value.items()}
    flat |= {"data_hash": facts_["data_hash"], "precision": facts_["precision"], "threads": facts_["threads"]}
    return flat | {f"version of {name}": v for name, v in facts_["versions"].items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def _is_fixed(key: str) -> bool:
    parts = key.split(".")
    if parts[0] != "recipe":
        return key in ("data_hash", "precision")
    return parts[1] in _FIXED or (parts[1] == "train" and parts[2] in _FIXED_TRAIN)
