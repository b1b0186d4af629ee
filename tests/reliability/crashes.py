"""Processes that die, are asked to stop, or find no room: the run ends as if nothing had happened."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.bench import RUN, SAVES, Bench, not_whole, spoken

Result = tuple[str, "str | None"]
"""A case, and what is wrong with how it went."""
LIMIT = 2
"""Seconds from a signal to the end of the process."""


def random_kills(bench: Bench) -> Iterator[Result]:
    """T1: kill -9 at random moments, one to five times a run, the preparation of data included."""
    chance = random.Random(bench.seed)
    bench.unbroken(*RUN)
    for number in bench.some(list(range(100))):
        run, kills = bench.new(), chance.randint(1, 5)
        for _ in range(kills):
            lines = _lines(run) + chance.randint(0, 12)
            command = bench.start(run, *RUN)
            while command.code() is None and _lines(run) < lines:
                time.sleep(0.002)
            time.sleep(chance.random() * (0.4 if lines == 0 else 0.05))
            command.send(signal.SIGKILL)
            command.wait()
        yield f"run {number}, {kills} kills", bench.finish(run, *RUN)


def _lines(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at_every_call(bench: Bench) -> Iterator[Result]:
    """T2: kill -9 at every system call that changes the folder of a run, from its start to its end."""
    yield from _kills(
        bench, SAVES, r"rename|fsync|mkdir|rmdir|symlink|symlinkat|unlink|unlinkat|write|ftruncate|openat"
    )


def kill_in_every_deletion(bench: Bench) -> Iterator[Result]:
    """T10: kill -9 at every call that deletes or moves, with two checkpoints kept: the best and the newest stay."""
    yield from _kills(bench, (*SAVES, "train.save_every=1", "train.keep=2"), r"unlink|unlinkat|rmdir|rename")


def _kills(bench: Bench, overrides: tuple[str, ...], calls: str) -> Iterator[Result]:
    for name, number, what in bench.some(system_calls(bench, overrides, calls)):
        run, output = bench.with_data(*overrides), bench.folder / "strace"
        killed = bench.start(run, *overrides, STRACE=str(output), INJECT=f"{name}:signal=SIGKILL:when={number}")
        wrong = None if killed.wait() == -signal.SIGKILL else f"not killed: {killed.stderr[-300:]}"
        wrong = wrong or not_whole(run, (run / "bundle").is_symlink())
        yield f"{name} {number} ({what})", wrong or bench.finish(run, *overrides)


def system_calls(bench: Bench, overrides: tuple[str, ...], calls: str) -> list[tuple[str, int, str]]:
    """Name, number among its like, and file of each system call that changes something below a run's folder."""
    run, output = bench.with_data(*overrides), bench.folder / "strace-counted"
    command = bench.start(run, *overrides, STRACE=str(output))
    assert command.wait() == 0, command.stderr
    found, counts = [], dict.fromkeys(calls.split("|"), 0)
    for line in output.read_text(errors="replace").split("\n"):
        name = line.partition("(")[0]
        if name not in counts:
            continue
        counts[name] += 1
        path = re.search(rf"{re.escape(str(run))}/?([^\s\",>]*)", line)
        if path and " = -1 " not in line and (name != "openat" or "O_CREAT" in line):
            found.append((name, counts[name], re.sub(r"tmp-\d+", "tmp", path[1])))
    shutil.rmtree(run)
    return found


def signals(bench: Bench) -> Iterator[Result]:
    """T3: SIGTERM, SIGINT, SIGHUP and two SIGINT, wherever a run may be, and at random moments.

    In the data, the first update and a later one, a validation, the try of the average, a save, and
    where a model is published.
    """
    kinds = [(signal.SIGTERM, 1, 143), (signal.SIGINT, 1, 130), (signal.SIGHUP, 1, 143), (signal.SIGINT, 2, 130)]
    places = [("read", 1), ("update", 1), ("update", 4), ("search", 1), ("search", 3)]
    places += [("fsync", 9), ("rename", 6), ("symlink", 1)]
    cases = [(kind, place) for place in places for kind in kinds]
    for (number, times, code), (point, count) in bench.some(cases):
        run = bench.new() if point == "read" else bench.with_data(*SAVES)
        bench.unbroken(*SAVES)
        told = bench.folder / "told"
        told.unlink(missing_ok=True)
        command = bench.start(run, *SAVES, FAULT=f"{point}:{count}:{int(number)}:{times}", TOLD=str(told))
        wrong = spoken(command, (code,))
        if told.exists():
            bench.took(command.seconds(told), LIMIT)
        wrong = wrong or not_whole(run, (run / "bundle").is_symlink())
        yield f"{signal.Signals(number).name} x {times} in {point} {count}", wrong or bench.finish(run, *SAVES)
    chance = random.Random(bench.seed)
    for moment in bench.some(list(range(40))):
        run, (number, _, code) = bench.new(), chance.choice(kinds[:3])
        command, lines = bench.start(run, *RUN), chance.randint(0, 40)
        while command.code() is None and _lines(run) < lines:
            time.sleep(0.002)
        time.sleep(chance.random() * (0.4 if lines == 0 else 0.05))
        ended = command.code() is not None
        command.send(number)
        wrong = spoken(command, (0,) if ended else (code, -number) if lines == 0 else (code,))  # before it listened
        yield f"{signal.Signals(number).name} at moment {moment}", wrong or bench.finish(run, *RUN)


def full_disk(bench: Bench) -> Iterator[Result]:
    """T4: no room, no quota, or a broken disk, at every call that writes below the folder of a run."""
    calls = system_calls(bench, SAVES, r"write|fsync|openat|mkdir|rename|ftruncate")
    errors = ("ENOSPC", "EDQUOT", "EIO", "EFBIG")
    cases = [(*call, errors[number % len(errors)]) for number, call in enumerate(calls)]
    for name, number, what, error in bench.some(cases):
        run, output = bench.with_data(*SAVES), bench.folder / "strace"
        command = bench.start(run, *SAVES, STRACE=str(output), INJECT=f"{name}:error={error}:when={number}")
        wrong = spoken(command, (6,), "cannot be written" if error == "EIO" else "disk full")
        wrong = wrong or not_whole(run, (run / "bundle").is_symlink())
        yield f"{error} in {name} {number} ({what})", wrong or bench.finish(run, *SAVES)
