"""The log of a run as TensorBoard reads it, for `train.tensorboard`."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from encdec_cli import atomic
from encdec_cli.training.history import read_log
from encdec_cli.training.log import CLOCK


class Board:
    """Writes every number of every line of a log to an event file; needs the package tensorboard.

    The file is made anew from the log when a process writes its first line, in place of those of earlier processes: so
    it tells of no update twice, however often a run was killed.

    Args:
        log: the run's log, beside which the folder `tensorboard` lies.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.folder = log.parent / "tensorboard"
        self._file: Path | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line that was just appended to the log. Raises ResourceError if the file cannot be written."""
        with atomic.disk_errors(self.folder):
            if self._file is None or not self._file.exists():
                self._file = self._begun()
                return
            with self._file.open("ab") as file:
                file.write(_record(time.time(), line))

    def _begun(self) -> Path:
        """Return the file of this process, with all that the log tells so far."""
        lines, _ = read_log(self.log)
        start = time.time() - lines[-1]["seconds"]
        # TensorBoard reads files by name, one after the other, and forgets at this mark what it knew of the run.
        path = self.folder / f"events.out.tfevents.{time.time_ns()}"
        mark = {"session_log": {"status": "START"}}
        content = [_framed(wall_time=start, file_version="brain.Event:2"), _framed(wall_time=start, step=0, **mark)]
        content += [_record(start + line["seconds"], line) for line in lines]
        atomic.write_file(path, b"".join(content))
        for old in self.folder.iterdir():
            if old != path and old.name.startswith("events.out.tfevents."):
                old.unlink()
        return path


def _record(wall_time: float, line: Mapping[str, Any]) -> bytes:
    """Return a line of the log as one event; the names of its numbers begin with the line's event."""
    known = ("event", "step", "seconds", CLOCK)  # TensorBoard shows updates and seconds beside every number
    fields = {key: value for key, value in {**line, **line[CLOCK]}.items() if key not in known}
    values = [{"tag": tag, "simple_value": value} for tag, value in _numbers(line["event"], fields)]
    return _framed(wall_time=wall_time, step=line["step"], summary={"value": values})


def _numbers(name: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{name}/{key}", value)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{name}/{key}", value


def _framed(**event: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415 - of an extra
    from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415 - likewise

    stream = io.BytesIO()
    RecordWriter(stream).write(Event(**event).SerializeToString())
    return stream.getvalue()
