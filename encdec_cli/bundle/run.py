"""The folder of a run: where its parts lie, who holds it, and which run is the newest.

runs/mt/
  data/                 what `preprocess` made
  checkpoints/step_N/   all that resuming needs
  bundles/step_N/       models that scored best, kept for use and for averaging
  bundle -> bundles/…   the model to use: the best one of the newest checkpoint
  log.jsonl             one JSON object a line
  lock                  who is writing here
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from encdec_cli import atomic
from encdec_cli.errors import ResourceError, UsageError

RUNS = Path("runs")


def data_folder(run: Path) -> Path:
    """Return where a run keeps its prepared data."""
    return run / "data"


def default_run(recipe: Path) -> Path:
    """Return the run folder of a recipe when --output is not given: `runs/<name of the recipe>`."""
    return RUNS / recipe.stem


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder: nobody else may write in it. The system lets go of it if this process dies.

    Raises ResourceError that names the process which holds it, or says why the folder cannot be written.
    """
    with atomic.disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise ResourceError(
                f"{run}: in use by {holder}; wait for it, stop it, or choose another --output."
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with atomic.disk_errors(run):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield
    finally:
        os.close(descriptor)


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing another one in one step."""
    wanted = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == wanted:
        return
    temporary = link.with_name(f"{link.name}.tmp-{os.getpid()}")
    with atomic.disk_errors(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(wanted)
        temporary.rename(link)
        atomic.sync_folder(link.parent)


def recover(run: Path) -> None:
    """Delete what a killed process left unfinished of the link and of the files of a run. Call it under its lock."""
    with atomic.disk_errors(run):
        for leftover in run.glob("*.tmp-*"):
            if leftover.name.rpartition("-")[2].isdigit() and (leftover.is_symlink() or leftover.is_file()):
                leftover.unlink()


def newest_run() -> Path:
    """Return the run below `RUNS` whose bundle is the newest.

    Raises UsageError that says how to name a model if there is none.
    """
    found = [folder for folder in RUNS.glob("*") if (folder / "bundle" / "bundle.json").is_file()]
    if not found:
        raise UsageError(
            f"no model: none was named with --model or ENCDEC_MODEL, and there is no finished or running run "
            f"below ./{RUNS}; train one with `encdec train RECIPE`."
        )
    return max(found, key=lambda folder: (folder / "bundle" / "bundle.json").stat().st_mtime_ns)


def default_model() -> Path:
    """Return the model to use when none is named: $ENCDEC_MODEL, else the newest run's."""
    named = os.environ.get("ENCDEC_MODEL")
    return Path(named) if named else newest_run()
