"""The one reader of text for the whole package: bytes in, lines out, every oddity counted.

A line ends at `\\n` and nowhere else; one `\\r` before it goes with it. docs/text.md has the table of what
happens with everything else.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from math import log
from pathlib import Path
from typing import IO, cast

from encdec_cli.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""A longer line is an error: it is a file of another kind, or a decompression bomb."""

_STDIN = "stdin"
_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
# One search tells whether a line needs any care at all; nearly none does.
_ODD = re.compile(rb"[\x00\x0b\x0c\r]|\xc2\x85|\xe2\x80[\xa8\xa9]")
_SEPARATORS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
_WHAT_HAPPENED = {
    "carriage_returns_stripped": "ended in CR LF: the CR was stripped",
    "invalid_utf8": "held invalid UTF-8: the bytes were replaced by U+FFFD",
    "bom": "began with a byte order mark: it was stripped",
    "nul": "held NUL: it was removed",
    "lone_cr": "held a CR that is no line end: it was kept",
    "line_separators": "held U+2028, U+2029, U+0085, VT or FF: kept, they end no line",
}


@dataclass
class LineReport:
    """How many lines were read, and how many of them were odd in each way."""

    lines: int = 0
    carriage_returns_stripped: int = 0
    invalid_utf8: int = 0
    bom: int = 0
    nul: int = 0
    lone_cr: int = 0
    line_separators: int = 0
    blank: int = 0
    """Lines of white space alone; they are kept."""
    no_final_newline: int = 0
    """Files whose last line has no newline; it is a line all the same."""
    first: dict[str, str] = field(default_factory=dict)
    """Oddity -> `file:line` where it was first met."""

    def count(self, oddity: str, name: str, number: int) -> None:
        """Count one odd line and remember the place of the first one."""
        setattr(self, oddity, getattr(self, oddity) + 1)
        self.first.setdefault(oddity, f"{name}:{number}")

    def sentences(self) -> list[str]:
        """Return one sentence for each oddity that changed a line or may surprise."""
        found = [(getattr(self, oddity), oddity, what) for oddity, what in _WHAT_HAPPENED.items()]
        return [
            f"{count} {'line' if count == 1 else 'lines'} (first {self.first[oddity]}) {what}."
            for count, oddity, what in found
            if count
        ]


def decode_line(raw: bytes, number: int, name: str, report: LineReport | None = None) -> str:
    """Return the text of one line as it was read, with or without its newline; see docs/text.md."""
    report = LineReport() if report is None else report
    report.lines += 1
    if raw.endswith(b"\n"):
        raw = raw[:-1]
        if raw.endswith(b"\r"):
            raw = raw[:-1]
            report.count("carriage_returns_stripped", name, number)
    if number == 1 and raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
        report.count("bom", name, number)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        report.count("invalid_utf8", name, number)
    if _ODD.search(raw):
        text = _odd_line(text, number, name, report)
    if not text or text.isspace():
        report.count("blank", name, number)
    return text


def _odd_line(text: str, number: int, name: str, report: LineReport) -> str:
    if "\0" in text:
        # After decoding: taking NUL out of the bytes could join two halves to a valid character.
        text = text.replace("\0", "")
        report.count("nul", name, number)
    if "\r" in text:
        report.count("lone_cr", name, number)
    if _SEPARATORS.search(text):
        report.count("line_separators", name, number)
    return text


def split_lines(stream: IO[bytes], name: str, report: LineReport | None = None) -> Iterator[str]:
    """Yield each line of a binary stream as soon as its newline has arrived.

    Raises:
        DataError: naming `name:line`, for a line over MAX_LINE_BYTES or a stream that cannot be read further.
    """
    report = LineReport() if report is None else report
    number = 0
    while True:
        number += 1
        with _read_errors(name, number):
            raw = stream.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if not raw.endswith(b"\n"):
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB; expected text with one example "
                    "a line, so split it into lines."
                )
            report.count("no_final_newline", name, number)
        yield decode_line(raw, number, name, report)


@contextmanager
def _read_errors(name: str, number: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{name}:{number}: the gzip file is damaged or cut short ({error}); fetch or compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"{name}:{number}: cannot be read ({error.strerror or error}).") from error


def read_lines(path: Path | None, report: LineReport | None = None) -> Iterator[str]:
    """Yield the lines of a file, plain or gzip; None or `-` is stdin.

    Raises:
        DataError: if the file is missing, a folder, unreadable or damaged, or has a line over MAX_LINE_BYTES.
    """
    with ExitStack() as stack:
        stream, name = _open(path, stack)
        yield from split_lines(stream, name, report)


def _open(path: Path | None, stack: ExitStack) -> tuple[IO[bytes], str]:
    if path is None or str(path) == "-":
        return _unpacked(_stdin(), _STDIN, False), _STDIN
    name = str(path)
    try:
        file = stack.enter_context(path.open("rb"))
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file.") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder; expected a text file, plain or gzip.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be opened ({error}).") from error
    return _unpacked(file, name, path.suffix == ".gz"), name


def _stdin() -> IO[bytes]:
    if sys.stdin is None:
        raise DataError("stdin is closed; give a file, or write lines to stdin.")
    # A reader of our own: Python aborts at exit if another thread still waits in sys.stdin's.
    return open(sys.stdin.fileno(), "rb", closefd=False)


def seekable_stdin() -> int:
    """Return the place at which stdin begins, for those who read it again; a pipe becomes a temporary file first."""
    pipe = _stdin()
    if stat.S_ISREG(os.fstat(pipe.fileno()).st_mode):
        return os.lseek(pipe.fileno(), 0, os.SEEK_CUR)
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(pipe, copy)
        copy.flush()
        os.dup2(copy.fileno(), pipe.fileno())
    return 0


def _unpacked(stream: IO[bytes], name: str, is_gzip: bool) -> IO[bytes]:
    # A pipe cannot be wound back, so its first bytes are looked at, not read.
    peek = stream.peek(2) if isinstance(stream, io.BufferedReader) else b""
    if is_gzip and not peek:
        raise DataError(f"{name}: empty, so not a gzip file; fetch or compress it again.")
    if is_gzip or peek[:2] == _GZIP_MAGIC:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stream, mode="rb"))
    return stream


def read_parallel(paths: Sequence[Path], report: LineReport | None = None) -> Iterator[tuple[str, ...]]:
    """Yield row after row of files that belong together line by line.

    Raises:
        DataError: at the end of the shortest file, if another goes on: both names, both counts, and the row
            from which the two no longer seem to belong together.
    """
    lengths = [array("I") for _ in paths]
    readers = [read_lines(path, report) for path in paths]
    for row in zip_longest(*readers):
        for column, line in zip(lengths, row, strict=True):
            if line is not None:
                column.append(len(line))
        if None not in row:
            yield row
    for path, column in zip(paths, lengths, strict=True):
        if len(column) != len(lengths[0]):
            raise unequal([str(paths[0]), str(path)], [lengths[0], column])


def unequal(names: Sequence[str], lengths: Sequence[Sequence[int]]) -> DataError:
    """Return the error for two texts that differ in their number of lines.

    names: of the two texts; lengths: for each text, the number of characters of each of its lines.
    """
    row = suspicious_row(lengths[0], lengths[1])
    if row == min(len(lengths[0]), len(lengths[1])):
        hint = f"up to the last common row, {row}, the lines seem to match: one text may be cut short"
    else:
        hint = f"by length they match no more from about row {row + 1}: look there for a line missing, added or broken"
    return DataError(f"{names[0]} has {len(lengths[0])} lines and {names[1]} has {len(lengths[1])}; {hint}.")


def suspicious_row(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the row (from 0) at which one of two texts most likely lost lines, judged by line lengths.

    The texts differ by d lines. For a break at row k, rows before k are compared as they stand and the rest
    shifted by d; the misfit of a row is how far the logarithm of its length ratio is from that of the whole
    texts. The k with the least total misfit is returned: one pass, no threshold to tune.
    """
    short, long = sorted((first, second), key=len)
    shift = len(long) - len(short)
    usual = log((sum(long) + 1) / (sum(short) + 1))
    best, best_row, total = 0.0, 0, 0.0
    for row, length in enumerate(short):
        here = abs(log((long[row] + 1) / (length + 1)) - usual)
        shifted = abs(log((long[row + shift] + 1) / (length + 1)) - usual)
        total += here - shifted
        if total < best or (total <= best and best_row == row):
            best, best_row = total, row + 1
    return best_row
