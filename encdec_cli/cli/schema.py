"""What the records of `encdec generate --json` hold, read from their JSON Schemas: the one place that says it."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

RECORD, SCORE = "record", "score"
"""The schema of what is written, and that of --score."""


def text(name: str) -> str:
    """Return a schema as it lies in the package."""
    return files("encdec_cli.generation").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")


@cache
def _properties(name: str) -> dict[str, Any]:
    properties: dict[str, Any] = json.loads(text(name))["properties"]
    return properties


def own_fields(name: str) -> set[str]:
    """Return the fields that tell of the output: what the input has under these names belongs to another."""
    return _properties(name).keys() - {"id"}


def troubles() -> list[str]:
    """Return the statuses but `ok`, and the flags."""
    statuses, flags = _properties(RECORD)["status"]["enum"], _properties(RECORD)["flags"]["items"]["enum"]
    return [word for word in (*statuses, *flags) if word != "ok"]
