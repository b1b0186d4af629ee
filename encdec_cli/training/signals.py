"""SIGTERM and Ctrl-C ask the loop to save and leave; a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from encdec_cli.errors import ExitCode, StoppedError


class Stop:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.elsewhere: Callable[[], bool] | None = None
        """Tells whether another process was asked to."""
        self.at_once = True
        """Whether a signal raises StoppedError where the work stands: as long as there is nothing to save."""

    def __bool__(self) -> bool:
        return self.signal is not None or (self.elsewhere is not None and self.elsewhere())

    def error(self, message: str) -> StoppedError:
        """Return the error to leave with: exit 143 after SIGTERM or SIGHUP, 130 after Ctrl-C."""
        code = ExitCode.INTERRUPTED if self.signal == signal.SIGINT else ExitCode.TERMINATED
        return StoppedError(message, code)


@contextmanager
def watched() -> Iterator[Stop]:
    """Catch SIGINT, SIGTERM and SIGHUP inside the block; the handlers of before come back at its end.

    The first one ends the work by StoppedError, or, once `at_once` is false, asks it to save and leave.
    What was ignored stays ignored: `nohup encdec train …` outlives its terminal.
    """
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.signal = number
        if stop.at_once:
            raise stop.error("stopped by a signal before there was anything to save; the same command starts again.")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
