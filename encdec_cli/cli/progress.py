"""How training looks on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time

from encdec_cli.cli import console

_LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
_MEMORY = 0.95
"""How much of the shown loss is the past's: the loss of one batch tells of the batch."""


class TrainingProgress:
    """Shows update, loss, tokens a second, time left and best score."""

    def __init__(self, bar: console.Bar, steps: int, step: int) -> None:
        self._bar = bar
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
        self._bar.update(step, note)
        if not console.interactive() and now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            left = (now - self._began) / (step - self._began_at) * (self._steps - step)
            console.say(f"update {step} of {self._steps}  {note}  {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
