"""Your own files: parallel text, TSV, or JSON lines; plain, gzip, or `-` for stdin."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encdec_cli.corpora.corpus import Corpus, known_split
from encdec_cli.errors import DataError, UsageError
from encdec_cli.text.example import Example
from encdec_cli.text.lines import LineReport, read_lines, read_parallel, seekable_stdin

_STDIN = "-"
_CHECK = "check the path in the recipe, which counts from data.root, or else from the current folder"


@dataclass
class SplitFiles:
    """The files of one split. Either `source` and `target` are paths, or they name columns or fields of one file.

    Paths may be patterns (`part-*.en.gz`): the matches are read in alphabetical order.
    """

    source: str | int = ""
    """Path; or the column of a TSV (number from 0, or name with `header`); or the field of a JSON object."""
    target: str | int = ""
    """As `source`."""
    tsv: str = ""
    """Path of a file with tab-separated columns."""
    jsonl: str = ""
    """Path of a file with a JSON object a line. A field that is a list (of turns) is joined by tabs."""
    header: bool = False
    """The first line of the TSV names its columns."""

    def __post_init__(self) -> None:
        if self.tsv and self.jsonl:
            raise UsageError("a split has tsv or jsonl, not both.")
        if self.source == "":
            self._name_sides()
        if self.target == "":
            raise UsageError("target is missing; without it nothing can be learned from a split or compared with it.")
        if self.tsv:
            self._check_columns()
        elif self.header:
            raise UsageError("header: only a TSV has one; give tsv, or leave header out.")
        elif isinstance(self.source, int) or isinstance(self.target, int):
            raise UsageError("source and target are column numbers only with tsv; give names, or tsv.")

    def _name_sides(self) -> None:
        if self.tsv:
            self.source, self.target = 0, 1 if self.target == "" else self.target
        elif self.jsonl:
            self.source, self.target = "source", self.target or "target"
        else:
            raise UsageError("a split needs source and target (paths), or tsv, or jsonl.")

    def _check_columns(self) -> None:
        for side, column in (("source", self.source), ("target", self.target)):
            if isinstance(column, str) and not self.header:
                raise UsageError(f"{side}: column '{column}' is a name, so the TSV needs header: true; or use numbers.")
            if isinstance(column, int) and column < 0:
                raise UsageError(f"{side}: column {column} must be 0 or more.")

    def patterns(self) -> list[str]:
        """Return the paths or patterns of all files."""
        return [self.tsv or self.jsonl] if self.tsv or self.jsonl else [str(self.source), str(self.target)]


@dataclass
class Files(Corpus):
    """Examples from files. Rows with an empty side are dropped from train and valid (and counted), kept in test.

    The fingerprint is made of names, sizes and times of change; stdin always counts as unchanged.
    """

    root: str = "."
    """Folder to which the paths are relative."""
    train: SplitFiles | None = None
    valid: SplitFiles | None = None
    test: SplitFiles | None = None

    def __post_init__(self) -> None:
        # Not fields: they are no keys of a recipe.
        self._reports: dict[str, LineReport] = {}
        self._dropped: dict[str, str] = {}
        self._stdin_start: int | None = None
        given = {"train": self.train, "valid": self.valid, "test": self.test}
        splits = [name for name, files in given.items() if files for path in files.patterns() if path == _STDIN]
        if len(splits) > 1:
            raise UsageError(
                f"{splits[-1]}: stdin ('-') can be one file alone, but it is named for {' and '.join(splits)}; "
                "put the others into files."
            )

    def _files(self, split: str) -> SplitFiles | None:
        return {"train": self.train, "valid": self.valid, "test": self.test}[known_split(split)]

    def read(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split. Raises DataError naming file and line."""
        files = self._files(split)
        if files is None:
            return
        report = self._reports[split] = LineReport()
        dropped, first = 0, ""
        for place, example in self._rows(files, report):
            if split != "test" and not (example.source.strip() and (example.target or "").strip()):
                dropped, first = dropped + 1, first or place
                continue
            yield example
        self._dropped.pop(split, None)
        if dropped:
            rows = "row" if dropped == 1 else "rows"
            self._dropped[split] = f"{split}: {dropped} {rows} with an empty side dropped (first {first})."

    def _rows(self, files: SplitFiles, report: LineReport) -> Iterator[tuple[str, Example]]:
        if _STDIN in files.patterns():
            self._rewind_stdin()
        if files.tsv:
            for path in self._paths(files.tsv):
                yield from _tsv(path, files, report)
        elif files.jsonl:
            for path in self._paths(files.jsonl):
                yield from _jsonl(path, files, report)
        else:
            for paths in self._parallel(files):
                for number, (source, target) in enumerate(read_parallel(paths, report), start=1):
                    yield f"{paths[0]}:{number}", Example(source, target)

    def _rewind_stdin(self) -> None:
        """Begin stdin anew: training data are read more than once."""
        if self._stdin_start is None:
            self._stdin_start = seekable_stdin()
        os.lseek(sys.stdin.fileno(), self._stdin_start, os.SEEK_SET)

    def _parallel(self, files: SplitFiles) -> list[list[Path]]:
        sides = [self._paths(pattern) for pattern in files.patterns()]
        if len({len(side) for side in sides}) > 1:
            raise DataError(
                f"{files.source} matches {len(sides[0])} files and {files.target} {len(sides[1])}; expected one "
                "target file for each source file."
            )
        return [list(paths) for paths in zip(*sides, strict=True)]

    def _paths(self, pattern: str) -> list[Path]:
        if pattern == _STDIN:
            return [Path(_STDIN)]
        path = Path(self.root).expanduser() / pattern
        if path.exists() or not glob.has_magic(pattern):
            return [path]
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 Path.glob wants relative patterns
        if not matches:
            raise DataError(f"{path}: no file matches this pattern; {_CHECK}.")
        return matches

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and times of change of all files."""
        facts: list[Any] = []
        for files in (self.train, self.valid, self.test):
            for pattern in files.patterns() if files else []:
                facts += map(file_facts, self._paths(pattern))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def notes(self) -> list[str]:
        """Return what the last read of each split dropped, and the oddities it met."""
        odd = [f"{split}: {said}" for split, report in self._reports.items() for said in report.sentences()]
        return [*self._dropped.values(), *odd]


def file_facts(path: Path) -> list[Any]:
    """Return name, size and time of change of a file. Raises DataError where it is not to be found."""
    if path == Path(_STDIN):
        return [_STDIN]
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {_CHECK}.") from error
    return [str(path), status.st_size, status.st_mtime_ns]


def _tsv(path: Path, files: SplitFiles, report: LineReport) -> Iterator[tuple[str, Example]]:
    names: list[str] = []
    wanted = [files.source, files.target]
    columns = [column for column in wanted if isinstance(column, int)]
    for number, line in enumerate(read_lines(path, report), start=1):
        place, cells = f"{path}:{number}", line.split("\t")
        if number == 1 and files.header:
            names = cells
            columns = [_column(column, names, place) for column in wanted]
            continue
        if len(cells) <= max(columns):
            raise DataError(f"{place}: {len(cells)} columns; expected at least {max(columns) + 1}, separated by tabs.")
        record = {names[i] if i < len(names) else str(i): cell for i, cell in enumerate(cells) if i not in columns}
        yield place, Example(cells[columns[0]], cells[columns[1]], record)


def _column(column: str | int, names: list[str], place: str) -> int:
    if isinstance(column, int):
        return column
    if column not in names:
        raise DataError(f"{place}: no column '{column}' in the header: {', '.join(names)}.")
    return names.index(column)


def _jsonl(path: Path, files: SplitFiles, report: LineReport) -> Iterator[tuple[str, Example]]:
    for number, line in enumerate(read_lines(path, report), start=1):
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON ({error}); expected one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(record).__name__}.")
        source = _field(record, str(files.source), place)
        target = _field(record, str(files.target), place)
        rest = {key: value for key, value in record.items() if key not in (files.source, files.target)}
        yield place, Example(source, target, rest)


def _field(record: dict[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        return "\t".join(" ".join(turn.split()) for turn in value)
    if value is None:
        raise DataError(f"{place}: no field '{name}'; found {', '.join(record) or 'an empty object'}.")
    raise DataError(f"{place}: field '{name}': expected text or a list of texts, found {type(value).__name__}.")
