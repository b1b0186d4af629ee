"""What `encdec generate` reads: lines or records, in windows that are sorted and decoded together."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.text.example import Example
    from encdec_cli.text.lines import LineReport


def _is_complete(file: Path | None) -> bool:
    """Whether all input lies ready, so that waiting for a full window costs nobody anything."""
    if (file is not None and str(file) != "-") or sys.stdin is None:
        return True
    return stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)


def windows_of(
    bundle: Bundle, file: Path | None, as_json: bool, score: bool, batch: int, report: LineReport
) -> Iterator[list[Example]]:
    """Yield the input as it is to be sorted and decoded, or scored, together."""
    from encdec_cli.cli import scoring
    from encdec_cli.generation.lines import WINDOW_BATCHES
    from encdec_cli.text.windows import arriving_windows, full_windows

    read = partial(scoring.read_pair, bundle.task) if score else bundle.task.read
    examples = _examples(bundle, file, as_json, report, read)
    if score:
        examples = scoring.with_targets(examples, file)
    size = batch * WINDOW_BATCHES
    return full_windows(examples, size) if _is_complete(file) else arriving_windows(examples, size)


def _examples(
    bundle: Bundle, file: Path | None, as_json: bool, report: LineReport, read: Callable[[str], Example]
) -> Iterator[Example]:
    from encdec_cli.errors import DataError
    from encdec_cli.text.lines import read_lines

    for number, line in enumerate(read_lines(file, report), start=1):
        if not (as_json and line.lstrip().startswith("{")):
            yield read(line)
            continue
        try:
            yield bundle.task.from_record(json.loads(line, parse_float=_number, parse_constant=_number))
        except (ValueError, DataError, RecursionError) as error:
            reason = str(error).rstrip(".")
            raise DataError(
                f"{file or 'stdin'}:{number}: not a record this task can read ({reason}); a line that begins with {{ "
                "must be a JSON object, and the lines before this one have been written."
            ) from error


def _number(text: str) -> float:
    """Read a number of a record. NaN and Infinity are not JSON, and 1e999 would be written as Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON; write null")
    return value
