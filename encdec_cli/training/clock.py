"""What the log tells of time, which differs in every repetition of a run."""

from __future__ import annotations

import time
from typing import Any


class Clock:
    """Counts seconds and target tokens from when it was made."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._tokens: int | None = None

    def fields(self, tokens: int) -> dict[str, Any]:
        """Return seconds since the process began to train, and target tokens a second since the last call."""
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - self._last) if self._tokens is not None else None
        self._last, self._tokens = now, tokens
        return {"seconds": round(now - self._start, 1), "tokens_per_second": round(speed, 1) if speed else None}
