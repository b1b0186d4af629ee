"""What `encdec generate` reads: lines or records, in windows that are sorted and decoded together."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from encdec_cli.cli import console

if TYPE_CHECKING:
    from encdec_cli.tasks.task import Task
    from encdec_cli.text.example import Example
    from encdec_cli.text.lines import LineReport


def _written(number: int) -> str:
    return "; the lines before this one have been written." if number > 1 else "."


@dataclass
class Reader:
    """Makes an example of a line."""

    task: Task
    as_json: bool
    """Whether lines that begin with { are records."""
    pairs: bool
    """Whether a line holds a target too, after its last TAB."""
    constraints: bool
    """Whether lines and records may say what outputs must hold."""
    ignored: int = 0
    """Records so far whose constraints nobody reads."""
    told: bool = False
    """Whether the user knows that a line looks like a record."""

    def __call__(self, line: str) -> Example:
        """Return the example. Raises ValueError or DataError for what is no record that the task can read."""
        from encdec_cli.cli.scoring import read_pair
        from encdec_cli.generation.phrases import constraints_of_columns, constraints_of_record

        if self.is_record(line):
            example = self.task.from_record(json.loads(line, parse_float=_number, parse_constant=_number))
            if self.constraints:
                example.constraints = constraints_of_record(example.record)
            elif not self.pairs:
                self.ignored += "constraints" in example.record
            return example
        if not self.as_json and not self.told and line.startswith("{") and _is_object(line):
            self.told = True
            console.warn("a line looks like a JSON record, and is read as text; --json reads records")
        if self.pairs:
            return read_pair(self.task, line)
        if not self.constraints or self.task.uses_tabs:
            return self.task.read(line)
        source, *columns = line.split("\t")
        example = self.task.read(source)
        example.constraints = constraints_of_columns(columns)
        return example

    def is_record(self, line: str) -> bool:
        """Whether a line is meant to be a JSON object."""
        return self.as_json and line.lstrip().startswith("{")


def windows_of(reader: Reader, file: Path | None, size: int, report: LineReport) -> Iterator[list[Example]]:
    """Yield the input in windows of at most `size` lines, which are sorted and decoded, or scored, together."""
    from encdec_cli.cli.scoring import with_targets
    from encdec_cli.text.windows import arriving_windows, full_windows

    examples = _examples(reader, file, report)
    if reader.pairs:
        examples = with_targets(examples, file)
    return full_windows(examples, size) if _is_complete(file) else arriving_windows(examples, size)


def _is_complete(file: Path | None) -> bool:
    """Whether all input lies ready, so that waiting for a full window costs nobody anything."""
    if file is not None and str(file) != "-":
        try:
            return stat.S_ISREG(file.stat().st_mode)  # not a named pipe, /dev/stdin or <(…)
        except OSError:
            return True  # told of where it is read
    return sys.stdin is None or stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)


def _examples(reader: Reader, file: Path | None, report: LineReport) -> Iterator[Example]:
    from encdec_cli.errors import DataError
    from encdec_cli.text.lines import read_lines

    for number, line in enumerate(read_lines(file, report), start=1):
        try:
            yield reader(line)
        except (ValueError, DataError, RecursionError) as error:
            reason = str(error).rstrip(".")
            if reader.is_record(line):
                reason = f"not a record this task can read ({reason})"
            if isinstance(error, json.JSONDecodeError):
                reason += "; a line that begins with { must be a JSON object"
            raise DataError(f"{file or 'stdin'}:{number}: {reason}{_written(number)}") from error


@contextmanager
def named_lines(file: Path | None) -> Iterator[None]:
    """Name the file where a line turns out to be wrong only after it was read."""
    from encdec_cli.errors import DataError, LineError

    try:
        yield
    except LineError as error:
        what = error.what.rstrip(".")
        raise DataError(f"{file or 'stdin'}:{error.line}: {what}{_written(error.line)}") from error


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _number(text: str) -> float:
    """Read a number of a record. NaN and Infinity are not JSON, and 1e999 would be written as Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON; write null")
    return value
