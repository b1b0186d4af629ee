"""A task in one file: a theme in, a poem out, whose lines stand on one line: `old pond / a frog jumps in / splash`.

encdec train haiku.yaml    # with `plugins: [haiku.py]` and `task: {name: haiku}`
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from encdec_cli.registry import tasks
from encdec_cli.tasks.task import Task, text_field
from encdec_cli.text.example import Example

BREAK = "<line>"


@tasks.register("haiku")
@dataclass
class Haiku(Task):
    """From a theme to the first `lines` lines of a poem; the model sees a token of its own between two lines."""

    metrics: ClassVar[tuple[str, ...]] = ("distinct",)

    lines: int = 3
    """Lines of a poem; what the model writes beyond them is left out."""

    def from_record(self, record: dict[str, Any]) -> Example:
        """Turn a JSON object with `theme`, and perhaps `poem`, a list of lines, into an example."""
        return Example(text_field(record, "theme"), " / ".join(record.get("poem", [])) or None, record)

    def target(self, example: Example) -> str:
        """Return the poem with the token between its lines."""
        return (example.target or "").replace(" / ", f" {BREAK} ")

    def write(self, example: Example, text: str) -> str:
        """Return the poem as a line for stdout."""
        return " / ".join(line.strip() for line in text.split(BREAK)[: self.lines])

    def symbols(self) -> tuple[str, ...]:
        """Return the token, so that every tokenizer keeps it whole."""
        return (BREAK,)
