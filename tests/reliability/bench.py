"""What the tests share: a reference run, its unbroken result, and the ways to start and to judge one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from encdec_cli.atomic import MANIFEST, verify
from encdec_cli.bundle import checkpoint
from encdec_cli.errors import BundleError
from tests.conftest import copy_task
from tests.forked import Command, Forks

FAULTS = Path(__file__).parent / "faults.py"
RUN = ("train.steps=40", "train.save_every=5", "train.validate_every=10", "train.log_every=1", "train.average=2")
"""The reference run: 40 updates, two layers of width 32, dropout 0.1, one thread, bf16 where the machine has it."""
SAVES = ("train.steps=6", "train.save_every=2", "train.validate_every=3", "train.log_every=1", "train.average=2")
"""A run that hardly does anything but save."""


class Bench:
    """A folder with a corpus, and runs of it."""

    def __init__(self, folder: Path, seed: int, share: float) -> None:
        self.folder = folder
        self.seed = seed
        self.share = share
        """The share of the cases that is run, where there are many."""
        self.recipe = copy_task(folder / "corpus", train=2000)
        self.forks = Forks(folder / "commands")
        self.slowest: float | None = None
        """The longest that a case of this test took, in seconds, where the time is promised."""
        self._late: str | None = None
        self._unbroken: dict[tuple[str, ...], Path] = {}
        self._count = 0

    def took(self, seconds: float, limit: float) -> None:
        """Take down how long something took that has a limit."""
        self.slowest = max(self.slowest or 0.0, seconds)
        if seconds > limit:
            self._late = f"{seconds:.1f} s, promised: {limit} s"

    def late(self) -> str | None:
        """Say what took too long since this was asked last."""
        said, self._late = self._late, None
        return said

    def some(self, cases: list) -> list:
        """Every n-th case, so that their share is about `share`."""
        count = max(1, round(len(cases) * self.share)) if cases else 0
        return [cases[number * len(cases) // count] for number in range(count)]

    def new(self) -> Path:
        """The folder of a run that is not there yet."""
        self._count += 1
        return self.folder / f"run-{self._count}"

    def start(self, run: Path, *overrides: str, bound: bool = False, **environment: str) -> Command:
        """Start `encdec train`; as one whom the permissions of files bind, if asked."""
        words = ("train", self.recipe, *overrides, "--plugin", FAULTS, "--output", run)
        return self.forks.start(*words, bound=bound, **environment)

    def unbroken(self, *overrides: str) -> Path:
        """The folder of a run with these overrides that nothing disturbed."""
        if overrides not in self._unbroken:
            run = self.new()
            command = self.start(run, *overrides)
            assert command.wait() == 0, command.stderr
            self._unbroken[overrides] = run
        return self._unbroken[overrides]

    def with_data(self, *overrides: str) -> Path:
        """A new run whose data is prepared."""
        run = self.new()
        shutil.copytree(self.unbroken(*overrides) / "data", run / "data")
        return run

    def finish(self, run: Path, *overrides: str) -> str | None:
        """Start the same command once more, without faults; say what is not as if nothing had happened."""
        command = self.start(run, *overrides)
        if command.wait() != 0:
            return f"does not go on: {command.stderr[-300:]}"
        wrong = "; ".join(differences(self.unbroken(*overrides), run))
        left = [str(path) for path in run.rglob("*") if ".tmp-" in path.name]
        shutil.rmtree(run)
        return wrong or (f"left behind: {left}" if left else None)


def differences(unbroken: Path, run: Path) -> list[str]:
    """What differs between two finished runs: every byte of data, checkpoints, bundles and log but the clock.

    A signal saves where it comes, so an older checkpoint may be of another update, but there are as many.
    """
    ours, theirs = fingerprint(unbroken), fingerprint(run)
    steps = [checkpoint.steps(one / "checkpoints") for one in (unbroken, run)]
    if len(steps[0]) != len(steps[1]):
        return [f"checkpoints of the updates {steps[1]}, not {steps[0]}"]
    older = {f"checkpoints/{checkpoint.step_name(step)}" for found in steps for step in found[:-1]}
    names = (ours.keys() | theirs.keys()) - (older - (ours.keys() & theirs.keys()))
    return [f"{name} differs" for name in sorted(names) if ours.get(name) != theirs.get(name)]


def fingerprint(run: Path) -> dict[str, object]:
    folders = [run / "data", run / "bundle", *run.glob("checkpoints/*"), *run.glob("bundles/*")]
    found: dict[str, object] = {str(f.relative_to(run)): (f / MANIFEST).read_bytes() for f in folders}
    log = [json.loads(line) for line in (run / "log.jsonl").read_bytes().split(b"\n")[:-1]]
    return found | {"log": [{key: value for key, value in line.items() if key != "clock"} for line in log]}


def not_whole(run: Path, saved: bool) -> str | None:
    """Say what of a run is damaged that must never be: the model in use, every checkpoint, at least one if `saved`."""
    try:
        if (run / "bundle").is_symlink():
            verify(run / "bundle")
        steps = checkpoint.steps(run / "checkpoints")
        for step in steps:
            verify(run / "checkpoints" / checkpoint.step_name(step))
    except BundleError as error:
        return str(error)
    return "no checkpoint" if saved and not steps else None


def spoken(command: Command, codes: tuple[int, ...], *words: str) -> str | None:
    """Say what is wrong with how a command ended: the code, a traceback, a word that is missing."""
    code = command.wait()
    if code not in codes:
        return f"exit code {code}, expected {codes}: {command.stderr[-300:]}"
    if "Traceback" in command.stderr:
        return f"a traceback: {command.stderr[-500:]}"
    missing = [word for word in words if word not in command.stderr]
    return f"not said: {missing}: {command.stderr[-300:]}" if missing else None
