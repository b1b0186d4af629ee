"""One example: what a corpus yields, a task reads and a line of input becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Example:
    """A source, its target if it is known, and every other field that came with them."""

    source: str
    target: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    constraints: list[list[str]] = field(default_factory=list)
    """What the output must hold: of each list one of the phrases."""
