"""The folder of a run: where its parts lie, who holds it, and which run is the newest.

runs/mt/
  data/                 what `preprocess` made
  checkpoints/step_N/   all that resuming needs; what could not be read is `step_N.damaged` until the run has passed it
  bundles/step_N/       models that scored best, kept for use and for averaging
  bundle -> bundles/…   the model to use: the best one of the newest checkpoint
  log.jsonl             one JSON object a line
  tensorboard/          the same for TensorBoard, where the recipe asks for it
  spent.json            time, energy and money, of all starts; in a model's folder as it was then
  run.json              what the run is made of, written when it starts or goes on
  room-N.json           how large a micro-batch may be, where memory was not enough for one that processes share
  lock                  who is writing here
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from encdec_cli import atomic
from encdec_cli.errors import ResourceError, UsageError

RUNS = Path("runs")
FACTS = "run.json"
SPENT = "spent.json"
"""What a run has cost; in each of its models, what it had cost by then. No repetition gives it again."""


def data_folder(run: Path) -> Path:
    """Return where a run keeps its prepared data."""
    return run / "data"


def default_run(recipe: Path) -> Path:
    """Return the run folder of a recipe when --output is not given: `runs/<name of the recipe>`."""
    return RUNS / recipe.stem


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder: nobody else may write in it. The system lets go of it if this process dies.

    If the block fails before it wrote anything, folders that did not exist before are deleted again.
    Raises ResourceError that names the process which holds it, or says why the folder cannot be written.
    """
    with atomic.disk_errors(run):
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
    descriptor = _hold(run)
    try:
        yield
    except BaseException:
        _remove_unused(run, made)
        raise
    finally:
        os.close(descriptor)


def _hold(run: Path) -> int:
    """Return a descriptor that holds the lock of a run."""
    with atomic.disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run, os.read(descriptor, 1000).decode(errors="replace").strip()) from None
        except OSError as error:
            with suppress(OSError):  # nobody can hold it
                (run / "lock").unlink()
                run.rmdir()
            raise ResourceError(
                f"{run}: this file system gives no locks ({error.strerror or error}); choose another --output."
            ) from error
        # Whoever failed in between has deleted the file that is held here: the next one would make its own.
        if os.fstat(descriptor).st_nlink == 0:
            raise _in_use(run, "")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with atomic.disk_errors(run):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def need_access(run: Path) -> None:
    """Raise ResourceError if a part of the run that training lets grow cannot: before hours of work, not after them."""
    for folder in (run / "checkpoints", run / "bundles"):
        with atomic.disk_errors(folder):
            if not folder.exists():
                continue
            next(folder.iterdir(), None)  # fails if it is a file
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    log = run / "log.jsonl"
    with atomic.disk_errors(log):
        if log.exists() and not log.is_file() and not log.is_dir():
            raise OSError(errno.EINVAL, "not a plain file")  # to open a pipe would wait for a reader
        if log.exists():
            log.open("ab").close()


def _in_use(run: Path, holder: str) -> ResourceError:
    holder = holder or "another process"
    return ResourceError(f"{run}: in use by {holder}; wait for it, stop it, or choose another --output.")


def _remove_unused(run: Path, made: Sequence[Path]) -> None:
    """Delete the folders `made` for a run, from the innermost, if the run holds its lock alone."""
    with suppress(OSError):  # somebody else uses one of them: it stays
        if made and [path.name for path in run.iterdir()] == ["lock"]:
            (run / "lock").unlink()
            for folder in made:
                folder.rmdir()


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


def newest_run() -> tuple[Path, str]:
    """Return the run below `RUNS` that was trained last, of those that have a model, and words on why it is the one.

    Raises UsageError that says how to name a model if there is none.
    """
    found = [(_trained(folder), folder) for folder in RUNS.glob("*") if (folder / "bundle" / "bundle.json").is_file()]
    if not found:
        raise UsageError(
            f"no model: none was named with --model or ENCDEC_MODEL, and there is no finished or running run "
            f"below ./{RUNS}; train one with `encdec train RECIPE`."
        )
    when, newest = max(found)
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    which = f"the newest of {len(found)} runs" if len(found) > 1 else "the only run"
    return newest, f"{which} with a model, last trained {last}"


def _trained(run: Path) -> float:
    """Return when a run was last trained: its log grows with it, while the best model may be long made."""
    paths = (run / "log.jsonl", run / "bundle" / "bundle.json")
    return max(path.stat().st_mtime for path in paths if path.is_file())


def default_model() -> tuple[Path, str]:
    """Return the model to use when none is named, and words on why: $ENCDEC_MODEL, else the newest run."""
    named = os.environ.get("ENCDEC_MODEL")
    return (Path(named), "ENCDEC_MODEL") if named else newest_run()
