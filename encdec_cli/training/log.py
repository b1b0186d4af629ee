"""The log of a run: JSON lines that are equal in every repetition, but for the field `clock`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encdec_cli import atomic

if TYPE_CHECKING:
    from encdec_cli.training.tensorboard import Board

CLOCK = "clock"
"""The field that holds all that depends on time and machine; it stands last in its line."""


class Log:
    """Appends one JSON object a line to a file, which is made when the first line is written.

    board: is given each line too.
    """

    def __init__(self, path: Path, board: Board | None = None) -> None:
        self.path = path
        self.board = board
        self._notes: list[str] = []

    def noting(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Return a `say` whose sentences the next line tells, too, among what a repetition would not write."""

        def note(sentence: str) -> None:
            self._notes.append(sentence)
            say(sentence)

        return note

    def keep(self, lines: int, say: Callable[[str], None] | None = None) -> int:
        """Cut off all but the first `lines`, and a line that a killed process left unfinished, in one replacement.

        Lines are counted since a step alone does not tell: a run can be saved before and after the same validation.
        If there are fewer, or damaged ones, `say` is told and the log goes on with these; returns how many there are.
        Raises ResourceError if the file cannot be written.
        """
        with atomic.disk_errors(self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(line + b"\n" for line in content.split(b"\n")[:-1][:lines])
        kept = kept[: kept.rfind(b"\n") + 1]
        if kept != content:
            atomic.write_file(self.path, kept)
        found = kept.split(b"\n")[:-1]
        bad = sum(not _is_object(line) for line in found)
        if say is not None and (bad or len(found) < lines):
            say(f"note: {self.path}: of {lines} lines {lines - len(found)} are lost and {bad} damaged; the run goes on")
        return len(found)

    def write(self, step: int, event: str, fields: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        """Append one line, and hand it to the system at once. Raises ResourceError if the file cannot be written.

        Args:
            step: updates done.
            event: what the line tells: `train`, `valid` and so on.
            fields: what a repetition of the run would write again; numbers that are not finite become null.
            clock: dates, seconds, speeds: all that a repetition would not write again.
        """
        notes: dict[str, Any] = {"notes": self._notes} if self._notes else {}
        line = _plain({"event": event, "step": step, **fields, CLOCK: {**clock, **notes}})
        self._notes = []
        content = json.dumps(line, allow_nan=False) + "\n"
        with atomic.disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(content.encode())
        if self.board is not None:
            self.board.add(line)

    def sync(self) -> None:
        """Flush the lines to the disk, so that they outlive a power cut. Call it before a checkpoint is saved."""
        if not self.path.exists():
            return
        with atomic.disk_errors(self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
