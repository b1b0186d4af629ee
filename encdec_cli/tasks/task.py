"""What a task is: how a line becomes the text a model sees, and how its output becomes a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from encdec_cli.errors import DataError
from encdec_cli.text.example import Example


@dataclass
class Task:
    """A task with usable defaults: the line is the source, the output is the line.

    Subclasses are dataclasses: their fields are keys of the recipe's `task` section.
    """

    metrics: ClassVar[tuple[str, ...]] = ("bleu",)
    """The metrics that `encdec evaluate` reports when none is asked for."""
    uses_tabs: ClassVar[bool] = False
    """Whether a TAB within a line is the task's own; otherwise constraints may follow the source after one."""

    def read(self, line: str) -> Example:
        """Turn a line of plain text into an example."""
        return Example(source=line)

    def from_record(self, record: dict[str, Any]) -> Example:
        """Turn a JSON object into an example: `source`, perhaps `target`, and whatever else it holds.

        Raises DataError if a field is missing or not text.
        """
        return Example(text_field(record, "source"), optional_text(record, "target"), record)

    def source(self, example: Example) -> str:
        """Return the text the encoder sees."""
        return example.source

    def target(self, example: Example) -> str:
        """Return the text the decoder learns to write. Called only where a target is known."""
        return example.target or ""

    def write(self, example: Example, text: str) -> str:
        """Turn the model's text into the line for stdout; line breaks in it become spaces afterwards."""
        return text

    def may_copy(self) -> bool:
        """Tell whether an output may well repeat its source; if not, a line that does so is flagged."""
        return True

    def symbols(self) -> tuple[str, ...]:
        """Return the strings, such as language tags, for which tokenizers keep one token each."""
        return ()


def optional_text(record: dict[str, Any], *names: str) -> str | None:
    """Return the first of the named fields that is there and not null, or None. DataError if it is not text."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise DataError(f"field '{name}': expected text, found {type(value).__name__}.")
    return None


def text_field(record: dict[str, Any], *names: str) -> str:
    """Return the first of the named fields that is there. DataError if none is, or it is not text."""
    text = optional_text(record, *names)
    if text is None:
        others = ", ".join(f"'{name}'" for name, value in record.items() if value is not None)
        found = f"the fields {others}" if others else "no field"
        raise DataError(f"field '{names[0]}': missing; expected {' or '.join(names)}, found {found}.")
    return text
