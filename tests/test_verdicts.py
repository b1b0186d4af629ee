"""What may change between a run and its continuation: the table of docs/reliability.md is what the code decides."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from encdec_cli import recipe
from encdec_cli.errors import UsageError
from encdec_cli.training import resume

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
ROWS = re.findall(r"^\| `([^`]+)` \| (refused|noted, not exact|noted|silent) \|$", PAGE.read_text(), flags=re.MULTILINE)
NEW = {
    "model.name": "other",
    "train.optimizer": "adam",
    "train.on_nan": "skip",
    "train.freeze": ["encoder.*"],
    "train.schedule": "cosine",
    "train.metric": "chrf",
    "train.precision": "fp32",
    "decoding.name": "sampling",
    "task.source_language": "xx",
    "precision": "bf16",
    "data_hash": "another",
    "teacher": "another",
    "parallel.shard": True,
    "device": "a GPU",
    "version of torch": "9.9",
    "version of safetensors": "9.9",
    "version of encdec": "9.9",
    "version of my_model.py": "another hash",
}
"""Values to change to, where it is not one more than it was."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    return facts_of_a_run(tmp_path_factory.mktemp("recipe"))


def facts_of_a_run(folder: Path) -> dict:
    path = folder / "r.yaml"
    path.write_text("task: {name: translation}\ndata: {name: cldr}\n")
    return resume.facts(recipe.load(path), "hash", "fp32", "cpu") | {
        "teacher": "the sum of its weights",
        "compiled": False,
        "packed": False,
        "kernels": False,
        "versions": {"encdec": "1", "torch": "2", "safetensors": "3", "my_model.py": "hash"},
    }


def changed(facts: dict, key: str) -> dict:
    new = copy.deepcopy(facts)
    if key == "nothing":
        return new
    if key.startswith("version of "):
        holder, name = new["versions"], key.removeprefix("version of ")
    elif key in new:
        holder, name = new, key
    else:
        section, _, name = key.partition(".")
        holder = new["recipe"][section]
    assert name in holder, f"there is no {key}"
    before = holder[name]
    holder[name] = NEW[key] if key in NEW else before + 1
    assert holder[name] != before
    return new


def verdict(facts: dict, new: dict) -> str:
    said: list[str] = []
    try:
        resume.check(facts, new, Path("run"), said.append)
    except UsageError:
        return "refused"
    if not said:
        return "silent"
    assert len(said) == 1
    return "noted, not exact" if "not be bit-identical" in said[0] else "noted"


@pytest.mark.parametrize(("key", "promised"), ROWS)
def test_a_change_has_the_promised_verdict(facts, key, promised):
    assert verdict(facts, changed(facts, key)) == promised


def test_there_are_twenty_of_every_kind():
    assert len(ROWS) >= 20
    assert {promised for _, promised in ROWS} == {"refused", "noted, not exact", "noted", "silent"}
