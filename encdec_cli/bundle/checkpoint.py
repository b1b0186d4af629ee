"""Training state on disk: one folder a checkpoint, committed by one rename, safetensors and JSON alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from encdec_cli import atomic
from encdec_cli.bundle import tensors
from encdec_cli.errors import BundleError
from encdec_cli.models.parts import Piece

FORMAT = 1
_STATE, _PROGRESS = "state.safetensors", "progress.json"
_NAME = re.compile(r"step_(\d+)")
_DAMAGED = ".damaged"


@dataclass
class Progress:
    """All that resuming needs beside weights and optimizer state."""

    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Target tokens learned from, EOS included."""
    flops: int = 0
    """Floating-point operations of these updates."""
    real: int = 0
    """Source and target positions computed that hold a token."""
    positions: int = 0
    """Source and target positions computed, padding among them where it is."""
    loss: float = 0.0
    """Sum of the loss since the last line of the log."""
    loss_tokens: int = 0
    """Target tokens in that sum."""
    validated: int = -1
    """The update of the last validation."""
    best: float | None = None
    """The best validation score."""
    model: str = ""
    """The folder below `bundles/` of the model with that score; empty before there is one."""
    stale: int = 0
    """Validations since the last better one."""
    kept: list[int] = field(default_factory=list)
    """Updates whose bundles are kept for averaging, oldest first."""
    skipped: list[int] = field(default_factory=list)
    """Updates left out since their loss or gradient was not finite, oldest first."""
    order: str = ""
    """SHA-256 of this text before the last update and of that update's examples: of all, in their order."""
    log_lines: int = 0
    """Lines of the log that belong to this state."""
    finished: bool = False
    """Whether nothing is left to do."""


@dataclass
class Checkpoint:
    """A checkpoint in memory."""

    progress: Progress
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """What the run must have in common with its continuation: recipe, data hash, precision, threads, versions."""


def step_name(step: int) -> str:
    """Return the folder name of an update; names sort as updates do."""
    return f"step_{step:08d}"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint below `folder`, in place of an older one of the same update."""
    with saving(folder, checkpoint) as temporary:
        write_part(temporary, checkpoint.tensors)


@contextmanager
def saving(folder: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """Commit a checkpoint whose tensors are written inside the block, by `write_part`, to the folder that it gives."""
    content = {"format": FORMAT, "progress": asdict(checkpoint.progress), "facts": checkpoint.facts}
    with atomic.new_folder(folder / step_name(checkpoint.progress.step)) as temporary:
        yield temporary
        (temporary / _PROGRESS).write_bytes(atomic.json_bytes(content))


def write_part(
    folder: Path, named: dict[str, Tensor], part: int = 0, parts: int = 1, pieces: Mapping[str, Piece] | None = None
) -> None:
    """Write the tensors, or a process's pieces of them, as one of several files, which together are whole."""
    name = _STATE if parts == 1 else f"state-{part:05d}-of-{parts:05d}.safetensors"
    content = tensors.container(named, pieces)
    atomic.need_room(folder, content.size)
    with atomic.disk_errors(folder / name):
        content.write(folder / name)


def drop(folder: Path, keep: int, anchor: int | None = None) -> None:
    """Delete all but the `keep` newest checkpoints, and the one of update `anchor`.

    Of damaged ones that were set aside those that the run has passed. After a save, and when a run goes on that died
    before this.
    """
    found = steps(folder)
    for old in found[:-keep]:
        if old != anchor:
            atomic.remove_folder(folder / step_name(old))
    for aside in folder.glob(f"step_*{_DAMAGED}"):
        if found and aside.stem <= step_name(found[-1]):
            atomic.remove_folder(aside)


def steps(folder: Path) -> list[int]:
    """Return the updates of the checkpoints below `folder`, oldest first, whole or not."""
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("step_*"))
    return sorted(int(match[1]) for match in matches if match)


def models(folder: Path) -> set[str]:
    """Return the folders below `bundles/` that the checkpoints below `folder` refer to, those set aside too."""
    wanted = set()
    for path in (*(folder / step_name(step) for step in steps(folder)), *folder.glob(f"step_*{_DAMAGED}")):
        try:
            progress = _progress(path)[0]
        except BundleError:
            continue  # `newest` says so when the time comes
        wanted |= {progress.model, *map(step_name, progress.kept)}
    return wanted - {""}


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """Return the facts of the newest checkpoint below `folder` that can be read, or None; nothing is verified."""
    for step in reversed(steps(folder)):
        try:
            return _progress(folder / step_name(step))[1]
        except BundleError:
            continue  # `newest` says so when the time comes
    return None


def recover(folder: Path) -> None:
    """Bring in order what a killed process left unfinished below `folder`. Call it under the lock of the run."""
    if folder.is_dir():
        for name in {path.name.rpartition(".tmp-")[0] for path in folder.iterdir() if ".tmp-" in path.name}:
            atomic.recover(folder / name)


def newest(folder: Path, warn: Callable[[str], None]) -> int | None:
    """Return the update of the newest checkpoint that is whole, or None if there was never one.

    Damaged ones that are newer get another name, so that no later clean-up takes them for the newest, and are deleted
    when the run has passed them: what cannot be read now may be whole tomorrow. `warn` is given a sentence for each.
    Call it under the lock of the run.

    Raises:
        BundleError: if there are checkpoints and none of them is whole.
    """
    found = steps(folder)
    reasons = []
    for step in reversed(found):
        path = folder / step_name(step)
        try:
            atomic.verify(path)
            _check_listed(path)
        except BundleError as error:
            reasons.append(str(error))
            continue
        _progress(path)
        for damaged, reason in zip(reversed(found), reasons, strict=False):
            name = step_name(damaged)
            warn(f"checkpoint {name} is passed over, and kept as {name}{_DAMAGED} for now: {reason}")
            atomic.set_aside(folder / name, folder / f"{name}{_DAMAGED}")
        return step
    if found:
        raise BundleError(
            f"{folder}: no checkpoint is whole ({reasons[0].rstrip('.')}); try again if the disk has failed for a "
            "moment, else delete the folder of the run to start anew."
        )
    return None


def _check_listed(path: Path) -> None:
    """Raise BundleError if the manifest does not list what a checkpoint has: what is not listed nobody verifies."""
    files = atomic.read_json(path / atomic.MANIFEST)["files"]
    if _PROGRESS not in files or not any(name.startswith("state") for name in files):
        raise BundleError(f"{path / atomic.MANIFEST}: lists no {_PROGRESS} or no state; the file is damaged.")


def load(folder: Path, step: int, pieces: Mapping[str, Piece] | None = None) -> Checkpoint:
    """Return the checkpoint of an update; see `read`. Raises BundleError that names what is damaged."""
    atomic.verify(folder / step_name(step))
    return read(folder, step, pieces)


def read(folder: Path, step: int, pieces: Mapping[str, Piece] | None = None) -> Checkpoint:
    """Return a checkpoint that is whole. Raises BundleError that names the file which cannot be read.

    pieces: of which tensors only a piece is wanted; nothing else is read of them, however many processes wrote it.
    """
    path = folder / step_name(step)
    progress, facts = _progress(path)
    parts = sorted(path.glob("state*.safetensors"))
    named = tensors.read_pieces(parts, pieces) if pieces or len(parts) > 1 else tensors.read_tensors(path / _STATE)
    return Checkpoint(progress, named, facts)


def _progress(path: Path) -> tuple[Progress, dict[str, Any]]:
    content = atomic.read_json(path / _PROGRESS)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{path / _PROGRESS}: not a checkpoint of format {FORMAT}; use the encdec that wrote it.")
    known = {f.name for f in fields(Progress)}
    if not isinstance(content.get("progress"), dict) or content["progress"].keys() != known:
        raise BundleError(f"{path / _PROGRESS}: expected the keys {', '.join(sorted(known))}.")
    return Progress(**content["progress"]), content["facts"]
