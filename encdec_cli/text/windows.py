"""How lines are grouped before they are decoded: full windows of a file, whatever has arrived on a pipe."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from encdec_cli.errors import EncdecError

T = TypeVar("T")


def full_windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter. What came before an error is yielded first."""
    window: list[T] = []
    try:
        for item in items:
            window.append(item)
            if len(window) == size:
                yield window
                window = []
    except EncdecError:
        if window:
            yield window
        raise
    if window:
        yield window


class _End:
    """The end of the input, or the error that ended it."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def arriving_windows(items: Iterable[T], size: int, patience: float = 0.02) -> Iterator[list[T]]:
    """Yield what has arrived: a window ends when it is full, or when nothing more came for `patience` seconds.

    A program that writes one line and waits for its answer gets it; a fast producer gets full windows. The
    items are read by a thread of its own, at most two windows ahead.
    """
    arrived: queue.Queue[T | _End] = queue.Queue(maxsize=2 * size)

    def read() -> None:
        end = _End(None)
        try:
            for item in items:
                arrived.put(item)
        except BaseException as error:  # handed to the reader of the windows, who raises it
            end = _End(error)
        arrived.put(end)

    threading.Thread(target=read, daemon=True, name="reader").start()
    while True:
        window, end = _take(arrived, size, patience)
        if window:
            yield window
        if end is not None:
            if end.error is not None:
                raise end.error
            return


def _take(arrived: queue.Queue[T | _End], size: int, patience: float) -> tuple[list[T], _End | None]:
    window: list[T] = []
    wait: float | None = None  # the first item may take for ever
    while len(window) < size:
        try:
            item = arrived.get(timeout=wait)
        except queue.Empty:
            break
        if isinstance(item, _End):
            return window, item
        window.append(item)
        wait = patience
    return window, None
