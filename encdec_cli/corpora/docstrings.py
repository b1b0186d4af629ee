"""Docstrings: body to first line, from the source files of Python and of the installed packages.

The files are parsed, never imported, and nothing of them is part of this project.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from encdec_cli.atomic import cache_folder, write_file
from encdec_cli.corpora.corpus import Corpus, known_split, share
from encdec_cli.errors import DataError, ResourceError
from encdec_cli.text.example import Example

_FORMAT = 1
"""Raised when the rules below change, so that older caches are not used."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encdec_cli"}
_SUMMARY_WORDS = range(3, 21)
_BODY_WORDS = range(12, 121)
_LARGEST_FILE = 4 << 20
# Parsing is slow and most files have no docstring of two paragraphs.
_TWO_PARAGRAPHS = re.compile(rb'(?:"""|\'\'\')\s*[^\n]{8,}\n[ \t]*\n')
_SECTION = re.compile(
    r"""^\s*(?:
        (?:args?|arguments?|params?|parameters?|keyword\ arg(?:ument)?s|attributes|inputs?|outputs?|shape|
           returns?|yields?|raises|examples?|see\ also|references)\s*::?\s*$
        | (?:args?|arguments?|parameters?|returns?|raises|examples?)\s*::?\s
        | [:@](?:param|type|return|returns|rtype|raise|raises|arg|keyword)\b
        | >>>
        | \.\.\s
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_UNDERLINE = re.compile(r"^\s*([-=~^*#])\1{2,}\s*$")


@dataclass
class Docstrings(Corpus):
    """The body of a docstring as the source, its first line as the target.

    First lines of 3 to 20 words, bodies of 12 to 120 up to the first section (Parameters, Returns, Examples …).
    One body has one target. The split depends on the body alone: 5 in 100 are valid, 5 in 100 test. Reading
    takes some seconds once; the pairs are then cached in $XDG_CACHE_HOME/encdec or ~/.cache/encdec.
    """

    packages: list[str] = field(default_factory=list)
    """Top-level modules and packages to read, such as [json, numpy]; empty reads all."""

    def read(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split. Raises DataError if no source file has a docstring."""
        known_split(split)
        for source, target in self._pairs():
            if split_of(source) == split:
                yield Example(source, target)

    def _pairs(self) -> list[tuple[str, str]]:
        cache = cache_folder() / f"docstrings-{self.fingerprint()[:24]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [(str(source), str(target)) for source, target in json.loads(cache.read_bytes())]
        pairs = list(unique_pairs(_source_files(_roots(), self.packages)))
        if not pairs:
            if self.packages:
                names = ", ".join(self.packages)
                raise DataError(f"data.packages: no docstring found in {names}; name installed ones, such as json.")
            raise DataError("corpus 'docstrings': no docstring found; are the .py files of Python installed?")
        with contextlib.suppress(ResourceError):  # a cache that cannot be written only costs time
            write_file(cache, json.dumps(pairs, ensure_ascii=False).encode(errors="replace"))
        return pairs

    def fingerprint(self) -> str:
        """Return a digest of the installed distributions, their versions and Python's."""
        installed = sorted(f"{one.metadata['Name']} {one.version}" for one in distributions())
        facts = [_FORMAT, platform.python_version(), sorted(self.packages), installed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def split_of(source: str) -> str:
    """Return the split to which a source belongs, whatever else is installed."""
    place = share(source)
    if place < 500:
        return "test"
    return "valid" if place < 1000 else "train"


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))


def _source_files(roots: list[Path], packages: list[str]) -> Iterator[Path]:
    """Yield Python files below the roots, in alphabetical order."""
    for root in roots:
        for name, folders, files in os.walk(root):
            folder = Path(name)
            folders[:] = sorted(entry for entry in folders if entry not in _SKIPPED_FOLDERS)
            if folder == root and packages:
                folders[:] = [entry for entry in folders if entry in packages]
            for file in sorted(files):
                if file.endswith(".py") and (folder != root or not packages or file[:-3] in packages):
                    yield folder / file


def unique_pairs(paths: Iterator[Path]) -> Iterator[tuple[str, str]]:
    """Yield (body, first line) of every docstring that qualifies; a body that comes again is left out."""
    seen: set[str] = set()
    for path in paths:
        for docstring in _docstrings(path):
            pair = pair_of(docstring)
            if pair and pair[0] not in seen:
                seen.add(pair[0])
                yield pair


def _docstrings(path: Path) -> Iterator[str]:
    try:
        code = path.read_bytes() if path.stat().st_size <= _LARGEST_FILE else b""
        if not _TWO_PARAGRAPHS.search(code):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(code)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # not ours to mend: templates, other versions' syntax
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield docstring


def pair_of(docstring: str) -> tuple[str, str] | None:
    """Return the body and the first line of a docstring, or None if they do not qualify."""
    first, _, rest = inspect.cleandoc(docstring).partition("\n")
    lines = rest.split("\n")
    if lines[0].strip() or first.startswith((".. ", ">>>")):
        return None  # a first sentence over two lines has no line that says it all
    body: list[str] = []
    for line in lines:
        if _SECTION.match(line):
            break
        if _UNDERLINE.match(line):
            del body[-1:]
            break
        body.append(line)
    source, target = " ".join(" ".join(body).split()), " ".join(first.split())
    if len(source.split()) in _BODY_WORDS and len(target.split()) in _SUMMARY_WORDS:
        return source, target
    return None
