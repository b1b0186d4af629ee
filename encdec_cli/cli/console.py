"""All that is meant for people goes to stderr, through here; stdout belongs to results."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, Protocol

from encdec_cli.errors import EncdecError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def printable(text: str) -> str:
    """Return `text` with everything escaped that could steer a terminal; line feeds stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def say(sentence: str) -> None:
    """Print a sentence on stderr. A stderr that is gone is no reason to stop the work."""
    if sys.stderr is None:
        return
    try:
        print(printable(sentence), file=sys.stderr, flush=True)
    except OSError:
        return


def warn(sentence: str) -> None:
    """Print a warning on stderr."""
    say(f"encdec: warning: {sentence}")


def fail(sentence: str) -> None:
    """Print an error on stderr: one sentence after the name of the program, several mistakes below it."""
    mistakes = sentence.count("\n") + 1
    say(f"encdec: error: {sentence}" if mistakes == 1 else f"encdec: error: {mistakes} mistakes\n{sentence}")


def leave(error: EncdecError) -> NoReturn:
    """Fail from a thread while the main one hangs in a call of a library: nothing is tidied up but the terminal."""
    if interactive():
        sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    fail(str(error))
    os._exit(error.code)


def interactive() -> bool:
    """Tell whether stderr is a terminal on which a line can be drawn again."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Return how wide the terminal on stderr is; 80 if there is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


class Bar(Protocol):
    """Shows how far a piece of work is."""

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are behind us; `note` is a short text such as the loss."""


class _Quiet:
    def update(self, done: int, note: str = "") -> None:
        pass


class _Rich:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=printable(note))


@contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Bar]:
    """Show a bar on stderr inside the `with` block, if stderr is a terminal; `say` then prints above it.

    Args:
        what: the word before the bar.
        total: the number of steps; None if it is not known.
        done: the steps done before, when work is taken up again.
    """
    if not interactive():
        yield _Quiet()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    # Rich itself obeys NO_COLOR.
    with Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=False, transient=True) as bar:
        yield _Rich(bar, bar.add_task(what, total=total, completed=done, note=""))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines with aligned columns, two spaces apart, no spaces at the ends of lines."""
    cells = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    padded = [[cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _width(text: str) -> int:
    """Return the columns a text takes on a terminal: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
