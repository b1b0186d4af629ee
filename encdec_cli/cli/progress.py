"""How training looks on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from encdec_cli.cli import console

_LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
_MEMORY = 0.95
"""How much of the shown loss is the past's: the loss of one batch tells of the batch."""
_BAR = 45
"""Columns of a terminal for all that stands beside the note: `training`, the bar, updates, time left."""


class TrainingProgress:
    """Shows update, loss, tokens a second, time left, best score, and of what the run costs as much as fits."""

    def __init__(self, bar: console.Bar, steps: int, step: int, cost: Callable[[], Sequence[str]]) -> None:
        self._bar = bar
        self._cost = cost
        self._steps = steps
        self._began_at = step
        self._began = self._last_line = time.monotonic()
        self._tokens = 0
        self._loss: float | None = None

    def progress(self, step: int, loss: float, tokens: int, score: float | None) -> None:
        """Show one update: loss per target token, target tokens, best validation score."""
        self._loss = loss if self._loss is None else _MEMORY * self._loss + (1 - _MEMORY) * loss
        self._tokens += tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._began, 1e-9)
        best = "" if score is None else f"  best {score:.4g}"
        note = f"loss {self._loss:.3f}  {speed:,.0f} tokens/s{best}"
        if console.interactive():
            room = console.columns() - _BAR
            for words in self._cost():
                note += f"  {words}" if len(note) + len(words) + 2 <= room else ""
            self._bar.update(step, note)
        elif now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            left = (now - self._began) / (step - self._began_at) * (self._steps - step)
            words = "  ".join([note, f"{_duration(left)} left", *self._cost()])
            console.say(f"update {step} of {self._steps}  {words}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
