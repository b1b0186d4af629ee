"""The proof, on the user's machine, that a run that is killed ends as one that is not: both are made and compared."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encdec_cli import atomic
from encdec_cli.bundle.run import FACTS, SPENT, data_folder
from encdec_cli.errors import CheckError
from encdec_cli.training.log import CLOCK

SHORT = (
    *("train.steps={steps}", "train.log_every=1", "train.save_every=3", "train.validate_every=10"),
    *("train.valid_lines=10", "train.patience=0", "train.keep=1", "parallel.tensor=1"),
)
"""What makes a copy of a run short. A checkpoint every three updates, so that most kills lose some."""
_POLL = 0.003


@dataclass(frozen=True)
class Proof:
    """What has been proven: differences are sentences, none of them if all is well."""

    kills: int
    runs: int
    updates: int
    seconds: float
    differences: list[str]


def prove(words: Sequence[str], kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> Proof:
    """Train a short copy of a run once unbroken, and again with `kills` kills -9 at random moments; compare the bytes.

    A run that ends before all kills are done is compared, and another one is begun.

    Args:
        words: what follows `encdec train` on the command line, without `--output`.
        kills: how often a process is killed; each time it is started again.
        seed: of the moments.
        folder: empty; it holds the runs.
        say: is given sentences for the user.

    Raises:
        CheckError: if a process ends otherwise than it should.
    """
    began, chance = time.monotonic(), random.Random(seed)
    steps = 20 + kills
    words = [*words, *(each.format(steps=steps) for each in SHORT)]
    unbroken = folder / "unbroken"
    moments = _Moments(chance, *_unbroken(words, unbroken, steps))
    # Of `auto` what that run has found: the free memory may be another by now.
    words.append(f"train.tokens={atomic.read_json(unbroken / FACTS)['recipe']['train']['tokens']}")
    say(f"trained {steps} updates without a break; now again, with {kills} kills -9")
    differences: list[str] = []
    done = runs = 0
    while done < kills:
        run = folder / f"killed-{runs}"
        runs += 1
        shutil.copytree(data_folder(unbroken), data_folder(run))
        for _ in _killed(words, run, kills - done, moments):
            done += 1
            say(f"kill {done} of {kills}: {_lines(run)} lines in the log")
        differences += [f"{run}: {what}" for what in compare(unbroken, run)]
        if not differences:
            shutil.rmtree(run)
    return Proof(done, runs, steps, time.monotonic() - began, differences)


@dataclass(frozen=True)
class _Moments:
    """Chooses when to kill, from how long things take here."""

    chance: random.Random
    start: float
    """Seconds from the start of a process to its first line in the log."""
    update: float
    """Seconds of an update, validations and saves included."""

    def next(self) -> tuple[int, float]:
        """Return how many lines of the log to wait for, and how many seconds after them.

        No lines in one case of four: before learning goes on, while what the last death left is brought in order.
        """
        if self.chance.random() < 0.25:
            return 0, self.chance.random() * self.start
        return self.chance.randint(1, 5), self.chance.random() * 3 * self.update


def _unbroken(words: Sequence[str], run: Path, steps: int) -> tuple[float, float]:
    """Train a run to its end; return what `_Moments` wants to know."""
    began = time.monotonic()
    process = _start(words, run)
    try:
        _wait(process, run, 1)
        first = time.monotonic()
    except BaseException:
        process.kill()
        raise
    _finish(process, run)
    return first - began, (time.monotonic() - first) / steps


def _killed(words: Sequence[str], run: Path, most: int, moments: _Moments) -> Iterator[None]:
    """Train a run to its end with up to `most` kills, and yield after each."""
    for _ in range(most):
        lines, seconds = moments.next()
        lines += _lines(run) if lines else 0
        process = _start(words, run)
        try:
            alive = _wait(process, run, lines)
            time.sleep(seconds if alive else 0)
        finally:
            process.kill()
        if process.wait() != -signal.SIGKILL:  # it was quicker
            _check(process.returncode, run)
            return
        yield
    _finish(_start(words, run), run)


def _start(words: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "encdec_cli", "train", *words, "--output", str(run)]
    # Out of reach of a Ctrl-C that is meant for us: a signal would save, which is not what is tried here.
    with _words_of(run).open("wb") as words_of:
        return subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words_of, start_new_session=True
        )


def _words_of(run: Path) -> Path:
    """Return the file of what the process that trains a run says."""
    return run.with_name(f"{run.name}.stderr")


def _finish(process: subprocess.Popen[bytes], run: Path) -> None:
    try:
        process.wait()
    finally:
        process.kill()
    _check(process.returncode, run)


def _check(code: int, run: Path) -> None:
    if code != 0:
        last = _words_of(run).read_text(errors="replace").strip().split("\n")[-1]
        raise CheckError(f"--prove-resume: {run} ended with exit code {code}: {last}")


def _wait(process: subprocess.Popen[bytes], run: Path, lines: int) -> bool:
    """Wait until the log has so many lines; False if the process ended before."""
    while _lines(run) < lines:
        if process.poll() is not None:
            return False
        time.sleep(_POLL)
    return True


def _lines(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def compare(unbroken: Path, run: Path) -> Iterator[str]:
    """Yield, in sentences, what differs between two runs that should be one: weights, moments, order, log, model."""
    for name in ("checkpoints", "bundle"):
        ours, theirs = _sums(unbroken / name), _sums(run / name)
        for file in sorted(ours.keys() | theirs.keys()):
            if ours.get(file) != theirs.get(file):
                yield f"{name}/{file} differs"
    first, other = _log(unbroken), _log(run)
    if len(first) != len(other):
        yield f"the log has {len(other)} lines, not {len(first)}"
    for a, b in zip(first, other, strict=False):
        keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        if keys:
            yield f"log.jsonl: update {a['step']}: {', '.join(sorted(keys))} differ"
            break


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, manifests too, but for what the run has cost."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SPENT]
    return {str(path.relative_to(folder)): atomic.sha256(path) for path in files}


def _log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_bytes().split(b"\n")[:-1]]
    return [{key: value for key, value in line.items() if key != CLOCK} for line in lines]
