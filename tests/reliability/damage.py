"""Folders that are damaged, shared, changed or already done."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from encdec_cli.atomic import MANIFEST, sha256
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.run import SPENT
from encdec_cli.data.prepared import Prepared
from encdec_cli.errors import BundleError
from tests.reliability.bench import RUN, SAVES, Bench, spoken
from tests.reliability.crashes import Result
from tests.test_nonfinite import equal

LIMIT = 1
"""Seconds in which a process says that the folder has another run."""


def _flip(bit: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[bit // 8 % len(content)] ^= 1 << bit % 8
        path.write_bytes(content)

    return change


def _zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _ways(chance: random.Random) -> dict[str, Callable[[Path], None]]:
    return {
        "a byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
        "half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "empty": lambda path: os.truncate(path, 0),
        "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "zeros": _zeroed,
        "deleted": Path.unlink,
        "a folder": _folder,
        "a link to itself": _loop,
        **{f"bit {bit}": _flip(bit) for bit in (chance.randrange(1 << 40) for _ in range(20))},
    }


def damaged_files(bench: Bench) -> Iterator[Result]:
    """T5: every file of a checkpoint, of a model and of prepared data, damaged in 28 ways."""
    overrides = (*SAVES, "train.save_every=1", "train.keep=2")
    unbroken, chance = bench.unbroken(*overrides), random.Random(bench.seed)
    older, newest = checkpoint.steps(unbroken / "checkpoints")
    good = checkpoint.load(unbroken / "checkpoints", older)
    parts = {
        f"checkpoints/{checkpoint.step_name(newest)}": lambda run: _falls_back(run, older, good),
        "bundle": lambda run: _refused(run, lambda: Bundle.load(run / "bundle")),
        "data": lambda run: _refused(run, lambda: Prepared.open(run / "data")),
    }
    cases = [
        (part, file.name, way, change, judge)
        for part, judge in parts.items()
        for file in sorted((unbroken / part).iterdir())
        if file.name != SPENT  # nothing depends on it
        for way, change in _ways(chance).items()
        if (file.name, way) != (MANIFEST, "a byte less")  # the line feed at its end: it says the same without it
    ]
    for part, name, way, change, judge in bench.some(cases):
        run = bench.new()
        shutil.copytree(unbroken, run, symlinks=True)
        change(run / part / name)
        yield f"{part}/{name}: {way}", judge(run)
        shutil.rmtree(run)


def _falls_back(run: Path, older: int, good: checkpoint.Checkpoint) -> str | None:
    said: list[str] = []
    step = checkpoint.newest(run / "checkpoints", said.append)
    found = None if step is None else checkpoint.read(run / "checkpoints", step)
    if found is None or found.progress != good.progress or not equal(found.tensors, good.tensors):
        return "not the checkpoint before"
    return None if len(said) == 1 and str(run) in said[0] else f"said {said}"


def _refused(run: Path, load: Callable[[], object]) -> str | None:
    try:
        load()
    except BundleError as error:
        return None if str(run) in str(error) else f"does not name the file: {error}"
    return "loaded in silence"


def simultaneous_starts(bench: Bench) -> Iterator[Result]:
    """T6: four processes start in one folder at once."""
    for number in bench.some(list(range(50))):
        run, hold = bench.new(), bench.folder / "hold"
        hold.touch()
        commands = [bench.start(run, *SAVES, HOLD=str(hold)) for _ in range(4)]
        deadline = time.monotonic() + 60
        while sum(command.code() is None for command in commands) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        hold.unlink()
        codes = sorted(command.wait() for command in commands)
        losers = [command for command in commands if command.code() == 6]
        wrong = None if codes == [0, 6, 6, 6] else f"exit codes {codes}"
        for command in losers:
            bench.took(command.seconds(), LIMIT)
        wrong = wrong or next(filter(None, (spoken(command, (6,), "in use by") for command in losers)), None)
        bench.unbroken(*SAVES)
        yield f"round {number}", wrong or bench.finish(run, *SAVES)


def finished_run(bench: Bench) -> Iterator[Result]:
    """T9: a finished run is started again with as many updates, and with fewer."""
    for steps in (40, 30):
        run = bench.new()
        shutil.copytree(bench.unbroken(*RUN), run, symlinks=True)
        before = _files(run)
        wrong = spoken(bench.start(run, *RUN, f"train.steps={steps}"), (0,), "nothing to do")
        yield f"train.steps={steps}", wrong or (None if _files(run) == before else "a file was touched")


def _files(run: Path) -> dict[Path, tuple[int, str]]:
    return {
        path: (path.stat().st_mtime_ns, sha256(path))
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock"
    }
