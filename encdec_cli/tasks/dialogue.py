"""Dialogue: the last turns in, the next turn out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from encdec_cli.errors import DataError, UsageError
from encdec_cli.tasks.task import Task, optional_text, text_field
from encdec_cli.text.example import Example

TURN = "<turn>"
"""Stands between two turns in the text the encoder sees."""

# In a line, turns are separated by a tab, or by the symbol itself where a file was prepared that way.
_BETWEEN = re.compile(rf"\t| ?{TURN} ?")


@dataclass
class Dialogue(Task):
    """From the turns said so far, oldest first, to the next one.

    A line holds turns separated by tabs; a record has `turns`, a list whose items are texts or objects with
    `text` and, if you like, `speaker`.
    """

    metrics: ClassVar[tuple[str, ...]] = ("bleu", "f1", "distinct")
    uses_tabs: ClassVar[bool] = True

    turns: int = 3
    """How many of the last turns the encoder reads."""
    speakers: list[str] = field(default_factory=list)
    """Names that take turns, the one who answers last: [user, system] puts `<user>` before the last turn."""

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise UsageError(f"turns: {self.turns} must be at least 1.")
        for name in self.speakers:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UsageError(f"speakers: '{name}' must be letters, digits, - and _ alone.")

    def from_record(self, record: dict[str, Any]) -> Example:
        """Turn a JSON object into an example: `turns`, or `source` as in a line; and perhaps `target`."""
        target = optional_text(record, "target")
        if "turns" not in record:
            return Example(text_field(record, "source"), target, record)
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise DataError("field 'turns': expected a list with at least one turn.")
        return Example("\t".join(_said(turn)[1] for turn in turns), target, record)

    def source(self, example: Example) -> str:
        """Return the last turns with `<turn>` between them, each with its speaker in front if there are names."""
        given = example.record.get("turns")
        said = [_said(turn) for turn in given] if isinstance(given, list) else []
        if not said:
            said = [(None, text) for text in _BETWEEN.split(example.source)]
        return f" {TURN} ".join(self._named(said)[-self.turns :])

    def _named(self, said: list[tuple[str | None, str]]) -> list[str]:
        if not self.speakers:
            return [text for _, text in said]
        named = []
        for before_answer, (speaker, text) in enumerate(reversed(said), start=1):
            name = speaker or self.speakers[(-1 - before_answer) % len(self.speakers)]
            if name not in self.speakers:
                raise DataError(f"speaker '{name}': not among task.speakers, {', '.join(self.speakers)}.")
            named.append(f"<{name}> {text}")
        return named[::-1]

    def symbols(self) -> tuple[str, ...]:
        """Return `<turn>` and the speakers' symbols."""
        return (TURN, *(f"<{name}>" for name in dict.fromkeys(self.speakers)))


def _said(turn: Any) -> tuple[str | None, str]:
    """Return the speaker, if known, and the text of a turn, on one line."""
    speaker = None
    if isinstance(turn, dict):
        speaker, turn = optional_text(turn, "speaker"), text_field(turn, "text")
    if not isinstance(turn, str):
        raise DataError(f"field 'turns': a turn must be text or an object with 'text', found {type(turn).__name__}.")
    return speaker, " ".join(turn.split())
