"""Folders that cannot be used, names that are odd, and runs that are continued with something changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.bench import SAVES, Bench, spoken
from tests.reliability.crashes import Result
from tests.test_verdicts import ROWS, changed, facts_of_a_run, verdict

LIMIT = 2
"""Seconds within which a folder is refused, before any data is read."""
LONGEST = 255
"""Bytes of a name that a file system takes."""


def _closed(mode: int) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "closed").mkdir()
        (place / "closed").chmod(mode)
        return place / "closed" / "run"

    return make


def _run_without(mode: int, part: str = "") -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "run" / part).mkdir(parents=True)
        (place / "run" / part).chmod(mode)
        return place / "run"

    return make


def _log(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "run" / "log.jsonl").touch(0o400)
    return place / "run"


def _file(path: str, output: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).touch()
        return place / output

    return make


def _link(target: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "run").symlink_to(target)
        return place / "run"

    return make


def _name(*names: str) -> Callable[[Path], Path]:
    return lambda place: place.joinpath(*names)


PERMISSION, FILE = "no permission", "a file stands where a folder is needed"
BAD = {
    "a parent that is read-only": (_closed(0o500), PERMISSION),
    "a parent that may not be entered": (_closed(0o600), PERMISSION),
    "a run that is read-only": (_run_without(0o500), PERMISSION),
    "a run that may not be entered": (_run_without(0o600), PERMISSION),
    "checkpoints that are read-only": (_run_without(0o500, "checkpoints"), PERMISSION),
    "bundles that are read-only": (_run_without(0o500, "bundles"), PERMISSION),
    "a log that is read-only": (_log, PERMISSION),
    "a file in its place": (_file("run", "run"), FILE),
    "a file in place of its parent": (_file("file", "file/run"), FILE),
    "a file in place of its checkpoints": (_file("run/checkpoints", "run"), FILE),
    "a folder in place of its log": (_file("run/log.jsonl/x", "run"), "a folder stands where a file is needed"),
    "a link to itself": (_link("run"), FILE),
    "a link to nowhere": (_link("nowhere/at/all"), FILE),
    "a name of 256 bytes": (_name("n" * (LONGEST + 1)), "name too long"),
    "256 bytes in letters of two": (_name("ä" * (LONGEST // 2 + 1)), "name too long"),
    "a path of 5,000 bytes": (_name(*["n" * 199] * 25), "name too long"),
}
"""How it is made, and what is said of it."""
GOOD = {
    "a parent that is missing": _name("not", "yet", "there", "run"),
    "spaces, quotes, a dollar and a line feed": _name(" läuft 走\n$(x) 'y' * "),
    "a name of 255 bytes": _name("n" * LONGEST),
    "255 bytes, in letters of two and one": _name("ä" * (LONGEST // 2) + "n"),
}


def unusable_folders(bench: Bench) -> Iterator[Result]:
    """T7: folders that cannot be written, files and links in their place, odd and long names, for a user not root."""
    cases = {**BAD, **{name: (make, "") for name, make in GOOD.items()}}
    for name, (make, word) in cases.items():
        place = bench.new()
        place.mkdir()
        output = make(place)
        # Where the folder is bad, the first reading of data is the end of the process: it must not come to that.
        command = bench.start(output, *SAVES, bound=True, **({"FAULT": "read:1:9"} if name in BAD else {}))
        wrong = spoken(command, (2, 6) if name in BAD else (0,), word)
        if name in BAD:
            bench.took(command.seconds(), LIMIT)
            lines = command.stderr.rstrip("\n").count("\n") + 1
            wrong = wrong or (None if lines == 1 else f"{lines} lines: {command.stderr}")
        yield name, wrong
        for path in place.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(place)


def changed_things(bench: Bench) -> Iterator[Result]:
    """T8: one thing changed in a run that goes on: refused, noted or silent, as the table above says."""
    facts = facts_of_a_run(bench.folder)
    for key, promised in ROWS:
        found = verdict(facts, changed(facts, key))
        yield key, None if found == promised else f"{found}, promised: {promised}"
