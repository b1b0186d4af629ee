"""What a run's folder tells of the run, whoever writes in it: read without locks, without waiting, without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from encdec_cli import atomic
from encdec_cli.bundle.run import FACTS
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.training.log import CLOCK

_HOLDER = re.compile(r"process (\d+) on (\S+) since (.+)")
_QUIET = 60.0
"""Seconds without a line of the log that nobody needs to know of."""
_WORSE = 1.05
"""How many times the loss before a rising one is."""


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint."""

    progress: dict[str, Any]
    """As `bundle/checkpoint.py: Progress` has it."""
    time: float
    """When it was written, in seconds since 1970."""
    bytes: int


@dataclass(frozen=True)
class History:
    """A run at one moment."""

    run: Path
    holder: str
    """Who holds the folder, or held it last; empty if nobody ever did."""
    alive: bool | None
    """Whether that process still works here; None if it is another machine's."""
    lines: list[dict[str, Any]]
    """The log. Each line has, beside its own fields, `tokens` and `seconds`: of all processes, up to it."""
    written: float
    """When the log was last written, in seconds since 1970; 0 if it never was."""
    saved: Saved | None
    facts: dict[str, Any]
    """What the run is made of: `recipe`, `threads`, `versions` and so on; empty before its first update."""
    damaged: tuple[int, ...] = ()
    """Numbers of the log's lines that are none, counted from 1; they are left out."""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe as keys such as `train.rate`."""
        sections = self.facts.get("recipe", {})
        return {
            key: value
            for name, section in sections.items()
            for key, value in (
                {f"{name}.{key}": v for key, v in section.items()} if isinstance(section, dict) else {name: section}
            ).items()
        }

    def notes(self) -> list[str]:
        """Return what a start said that changed when the run went on, each with the update of its line in the log."""
        found = [(line["step"], line[CLOCK].get("notes")) for line in self.lines]
        return [f"by update {step}: {note}" for step, notes in found if isinstance(notes, list) for note in notes]

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of one event, such as `train` and `valid`."""
        return [line for line in self.lines if line["event"] == event]

    @property
    def step(self) -> int:
        """The newest update that is known of."""
        saved = self.saved.progress["step"] if self.saved else 0
        return int(max(saved, self.lines[-1]["step"] if self.lines else 0))

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped` (all it did is saved), `failed`, `dead`, or, elsewhere, `elsewhere`."""
        if self.alive:
            return "running"
        if self.lines and self.lines[-1].get("done") == "stopped":
            return "failed"
        saved = self.saved.progress if self.saved else {}
        is_saved = saved.get("log_lines", 0) == len(self.lines) + len(self.damaged)
        if is_saved and saved.get("finished"):
            return "finished"
        if self.alive is None:
            return "elsewhere"
        return "stopped" if is_saved else "dead"

    def speed(self) -> float | None:
        """Return the updates a second of the last ten lines of the log; None before there are two of one process."""
        lines = [line for line in self.events("train")[-10:] if line[CLOCK].get("seconds") is not None]
        for first in lines[:-1]:
            seconds = lines[-1][CLOCK]["seconds"] - first[CLOCK]["seconds"]
            if 0 < seconds <= lines[-1]["seconds"] - first["seconds"] + 0.2:  # else another process began between
                return float((lines[-1]["step"] - first["step"]) / seconds)
        return None

    def _rising(self) -> list[str]:
        losses = [line["loss"] for line in self.events("train") if line.get("loss") is not None]
        count = max(5, len(losses) // 10)
        late, before = losses[-count:], losses[-2 * count : -count]
        if len(before) < count or sum(late) <= _WORSE * sum(before):
            return []
        return [f"the loss rises: {sum(late) / count:.3f} over {count} lines, {sum(before) / count:.3f} before"]

    def _disk(self) -> list[str]:
        free = shutil.disk_usage(self.run).free
        if self.saved is None or self.state == "finished" or free >= 3 * self.saved.bytes:
            return []
        left, size = (f"{count / (1 << 20):.3g} MiB" for count in (free, self.saved.bytes))
        return [f"{left} of disk left, a checkpoint takes {size}"]

    def alarms(self, now: float) -> list[str]:
        """Return what somebody should look at, in sentences without a full stop."""
        found = [
            f"update {line['step']} {line.get('done')}: {line.get('found')}" for line in self.events("non_finite")[-3:]
        ]
        found += self._rising()
        times = [line["seconds"] for line in self.lines[-20:]]
        usual = max((b - a for a, b in pairwise(times)), default=0.0)
        if self.alive and self.written and now - self.written > max(_QUIET, 5 * usual):
            found.append(f"no line in the log for {now - self.written:.0f} s, at most {usual:.0f} s were usual")
        found += self._disk()
        if self.damaged:
            found.append(f"the log is damaged: {len(self.damaged)} lines are none, the first is {self.damaged[0]}")
        if self.state == "dead":
            lost = self.step - (self.saved.progress["step"] if self.saved else 0)
            found.append(f"it died; `encdec train` repeats the last {lost} updates and goes on")
        return found


def read(run: Path) -> History:
    """Read a run. Raises UsageError if the folder is none, BundleError if what it is made of cannot be read."""
    log = run / "log.jsonl"
    if not (run / "lock").is_file() and not log.is_file():
        raise UsageError(f"{run}: not the folder of a run (neither lock nor log.jsonl); give one such as runs/mt.")
    holder, alive = _holder(run / "lock")
    saved, facts = _newest(run / "checkpoints")
    if (run / FACTS).is_file():
        facts = atomic.read_json(run / FACTS)
        if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
            raise BundleError(f"{run / FACTS}: expected an object with 'recipe'; the next start writes it anew.")
    written = log.stat().st_mtime if log.is_file() else 0.0
    lines, damaged = read_log(log)
    return History(run, holder, alive, lines, written, saved, facts, tuple(damaged))


def read_log(log: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the lines of a log as `History` has them, and the numbers of those that are none, counted from 1."""
    content = log.read_bytes() if log.is_file() else b""
    damaged: list[int] = []
    lines, past, last, tokens = [], 0.0, 0.0, 0
    for number, text in enumerate(content.split(b"\n")[:-1], 1):  # what follows is being written
        line = _line(text)
        if line is None:
            damaged.append(number)
            continue
        seconds = line[CLOCK].get("seconds") or last
        past += last if seconds < last else 0.0  # another process, whose clock began anew
        last, tokens = seconds, line.get("tokens", tokens)
        lines.append(line | {"tokens": tokens, "seconds": past + seconds})
    return lines, damaged


_NUMBER = (int, float, type(None))
_FIELDS: dict[str, dict[str, Any]] = {
    "train": {"loss": _NUMBER, "rate": _NUMBER, "norm": _NUMBER, "epoch": int, "tokens": int},
    "non_finite": {"found": str, "done": str},
}
"""What fields of an event are, where a line has them."""


def _line(text: bytes) -> dict[str, Any] | None:
    """Return a line of the log, or None if it is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    clock = line.get(CLOCK) if isinstance(line, dict) else None
    if not isinstance(clock, dict) or not isinstance(clock.get("seconds"), _NUMBER):
        return None
    if not isinstance(line.get("step"), int) or not isinstance(line.get("event"), str):
        return None
    wanted = _FIELDS.get(line["event"], {})
    if line["event"] == "valid":  # all but a few fields are scores
        wanted = dict.fromkeys(line.keys() - {"event", CLOCK}, _NUMBER)
    return line if all(isinstance(line[key], kind) for key, kind in wanted.items() if key in line) else None


def _holder(lock: Path) -> tuple[str, bool | None]:
    text = lock.read_text(errors="replace").strip() if lock.is_file() else ""
    found = _HOLDER.fullmatch(text)
    if not found:
        return text, False
    if found[2] != socket.gethostname():
        return text, None
    return text, _has_open(int(found[1]), lock)


def _has_open(process: int, file: Path) -> bool:
    """Tell whether a process lives and, where the system tells, has the file open: numbers are used again.

    To try the lock itself would disturb a run that starts at this moment.
    """
    try:
        os.kill(process, 0)
        descriptors = list(Path(f"/proc/{process}/fd").iterdir())
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return any(_is_same(each, file) for each in descriptors)


def _is_same(descriptor: Path, file: Path) -> bool:
    try:
        return descriptor.samefile(file)
    except OSError:
        return False


_PROGRESS: dict[str, Any] = {"step": int, "log_lines": int, "finished": bool, "best": _NUMBER, "model": str}
"""What is asked of a checkpoint's progress."""


def _newest(folder: Path) -> tuple[Saved | None, dict[str, Any]]:
    """Return the newest checkpoint below `folder`, as far as it can be read, and its facts."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        if "." in path.name:
            continue
        try:
            content = atomic.read_json(path / "progress.json")
            size = sum(file.stat().st_size for file in path.iterdir())
            progress, facts = content["progress"], content["facts"]
            known = all(isinstance(progress[key], kind) for key, kind in _PROGRESS.items())
            if known and isinstance(facts["recipe"], dict):
                return Saved(progress, path.stat().st_mtime, size), facts
        except (BundleError, OSError, KeyError, TypeError):
            continue  # damaged, of another version, or deleted while it was read
    return None, {}
