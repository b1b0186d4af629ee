"""What may change between a run and its continuation, and what must not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch

from encdec_cli import __version__, kernels
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import identity
from encdec_cli.errors import UsageError
from encdec_cli.recipe import DATA_SECTIONS, Recipe, resolved
from encdec_cli.training.machine import processor

_FIXED = ("model", "lora")
_FIXED_TRAIN = ("tokens", "accumulate", "optimizer", "seed", "ema", "freeze")


def facts(recipe: Recipe, data_hash: str, precision: str, device: str, processes: int = 1) -> dict[str, Any]:
    """Return what a checkpoint tells of its run: all that decides the bytes of the weights."""
    plugins = {plugin.path.name: plugin.sha256[:12] for plugin in recipe.loaded}
    ours = f"{__version__} ({_code()})"
    versions = {"encdec": ours, "torch": str(torch.__version__), "safetensors": safetensors.__version__}
    known = {"teacher": identity(recipe.teacher.model)[:16]} if recipe.teacher.model else {}
    return known | {
        "recipe": resolved(recipe),
        "data_hash": data_hash,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "kernels": kernels.library() is not None,
        "device": processor(device),
        "versions": versions | plugins,
    }


@cache
def _code() -> str:
    """Return digits that change with any source of this package, whose version says nothing between releases."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.c", "*.h") for path in package.rglob(pattern)):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def check(old: dict[str, Any], new: dict[str, Any], run: Path, say: Callable[[str], None]) -> None:
    """Say what changed since the checkpoint was written; raise UsageError where the run cannot go on with it."""
    changed = _differences(_comparable(old), _comparable(new))
    fatal = {key: value for key, value in changed.items() if _is_fixed(key)}
    if fatal:
        raise refusal(run, [_verdict(key, a, b, changed) for key, (a, b) in sorted(fatal.items())])
    for key, (a, b) in sorted(changed.items()):
        # Both have sums added up in another order.
        summed = key == "recipe.parallel.tensor" or (key == "recipe.parallel.shard" and new.get("processes", 1) > 1)
        same = key.startswith("recipe.") and not summed
        exact = "" if same else "; the weights will not be bit-identical to an unbroken run's"
        say(f"note: {key.removeprefix('recipe.')} was {a!r}, is now {b!r}{exact}")


def check_data(recipe: Recipe, data_hash: str, run: Path) -> None:
    """Raise UsageError if the run has learned from other data than those of this hash.

    Only the recipe's task, data and text need to be checked. Call it before data are replaced: a run that is refused
    must find its own as they were.
    """
    old = checkpoint.newest_facts(run / "checkpoints")
    if old is not None and old["data_hash"] != data_hash:
        sections = {name: old["recipe"][name] for name in DATA_SECTIONS}
        changed = _differences(_flat(sections), _flat(resolved(recipe, DATA_SECTIONS)))
        raise refusal(run, [_verdict("data_hash", old["data_hash"], data_hash, changed)])


def refusal(run: Path, verdicts: list[str]) -> UsageError:
    """Return what a run is told that cannot go on for these reasons."""
    listed = "; ".join(verdicts)
    return UsageError(f"{run}: this run cannot go on: {listed}; change it back, or start anew with --output FOLDER.")


def _verdict(key: str, old: Any, new: Any, changed: dict[str, tuple[Any, Any]]) -> str:
    if key != "data_hash":
        return f"{key.removeprefix('recipe.')} was {old!r}, is {new!r}"
    why = [f"{k.removeprefix('recipe.')} was {a!r}, is {b!r}" for k, (a, b) in sorted(changed.items()) if _is_data(k)]
    return f"its training data are others ({', '.join(why) or 'the files have changed'})"


def _is_data(key: str) -> bool:
    return key.startswith("recipe.") and key.split(".")[1] in DATA_SECTIONS


def _comparable(facts_: dict[str, Any]) -> dict[str, Any]:
    flat = {"recipe.parallel.tensor": 1} | _flat(facts_["recipe"])
    flat |= {"data_hash": facts_["data_hash"], "precision": facts_["precision"], "threads": facts_["threads"]}
    flat |= {"teacher": facts_.get("teacher"), "packed": facts_.get("packed", False)}
    flat |= {"compiled": facts_.get("compiled", False), "kernels": facts_.get("kernels", False)}
    flat |= {"processes": facts_.get("processes", 1), "device": facts_.get("device")}
    return flat | {f"version of {name}": v for name, v in facts_["versions"].items()}


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a resolved recipe as `recipe.section.key`."""
    mappings = {name: value for name, value in sections.items() if isinstance(value, dict)}
    return {f"recipe.{name}.{key}": v for name, value in mappings.items() for key, v in value.items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def _is_fixed(key: str) -> bool:
    parts = key.split(".")
    if parts[0] != "recipe":
        return key in ("data_hash", "precision", "teacher")
    return parts[1] in _FIXED or (parts[1] == "train" and parts[2] in _FIXED_TRAIN)
