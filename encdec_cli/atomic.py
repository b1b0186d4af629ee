"""The only way this package writes a file: temporary name, fsync, rename; a manifest with SHA-256 last.

A reader finds the old content or the new, never a mixture, whenever the writer was killed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encdec_cli.errors import BundleError, ResourceError

MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into one sentence that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"disk full ({error.strerror}); free some space and start again: what was saved before is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"no permission to write ({error.strerror}); choose another --output"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            advice = f"a file stands where a folder is needed ({error.strerror}); choose another --output"
        elif error.errno == errno.EISDIR:
            advice = f"a folder stands where a file is needed ({error.strerror}); choose another --output"
        else:
            advice = f"cannot be written ({error.strerror or error})"
        raise ResourceError(f"{path}: {advice}.") from error


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a folder; the rename has been done all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step. Raises ResourceError; the old file is then untouched."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def cache_folder() -> Path:
    """Return where things are kept that can be made again: `encdec` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG says that a relative path is to be ignored.
    return (Path(chosen) if chosen.startswith("/") else Path.home() / ".cache") / "encdec"


def json_bytes(value: Any) -> bytes:
    """Return `value` as JSON with sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def need_room(path: Path, size: int) -> None:
    """Raise ResourceError unless there are `size` bytes free below the parent of `path`, which is there.

    Before anything is written, so that a full disk is met with what it held.
    """
    with disk_errors(path):
        free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ResourceError(
            f"{path}: disk full: {size:,} bytes are needed, {free:,} are free; free some space and start again: what "
            "was saved before is kept."
        )


@contextmanager
def new_folder(path: Path, loose: Collection[str] = ()) -> Iterator[Path]:
    """Fill a temporary folder (plain files only) inside the `with` block; commit it as `path` at its end.

    Every file is flushed, the manifest is written last (of all but the `loose` files, which may differ from one
    making of the folder to the next), then one rename makes the folder visible. If the
    block fails nothing is left behind and an older `path` is untouched. An older `path` of ours is replaced:
    it is moved aside first and deleted after, and `recover` brings it back if we die in between. A folder
    with other things in it is never replaced: ResourceError, before any work is done.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        _refuse_foreign(path)
        _sweep(path)
        temporary.mkdir(parents=True)
    try:
        with _own_errors(temporary, path):
            yield temporary
        with disk_errors(path):
            _seal(temporary, loose)
            _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sweep(path: Path) -> None:
    """Delete what dead processes have left of `path`; an older folder that one had moved away comes back."""
    left = _leftovers(path)
    # Process ids repeat (in containers at every start): what a killed one of our number left is ours.
    dead = [one for one, number in left.items() if number == os.getpid() or not _lives(number)]
    for one in dead:
        _delete(one)
    if len(dead) == len(left) and _aside(path).is_dir() and not path.exists():
        _aside(path).rename(path)


def _leftovers(path: Path) -> dict[Path, int]:
    """Return the temporary files and folders of `path`, each with the number of the process that made it."""
    found = ((left, left.name.rpartition("-")[2]) for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"))
    return {left: int(number) for left, number in found if number.isdecimal()}


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def _own_errors(temporary: Path, path: Path) -> Iterator[None]:
    """Let an OSError about some other file (an input that cannot be read) pass; it is not about `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and temporary not in Path(error.filename).parents:
            raise
        with disk_errors(path):
            raise


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if path.is_dir() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise ResourceError(
            f"{path}: the folder holds files but no {MANIFEST}, so this program did not write it and will not "
            "replace it; choose another --output, or remove the folder."
        )


def _seal(folder: Path, loose: Collection[str]) -> None:
    entries = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        if file.name not in loose:
            entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_file(folder / MANIFEST, json_bytes({"files": entries}))
    sync_folder(folder)


def _aside(path: Path) -> Path:
    # Not `.old`: a user may well have a folder of that name.
    return path.with_name(f"{path.name}.tmp-replaced")


def _put_in_place(temporary: Path, path: Path) -> None:
    aside = _aside(path)
    _refuse_foreign(path)
    try:
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        temporary.rename(path)
    except BaseException:
        if aside.is_dir() and not path.exists():
            aside.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder of ours so that it is never seen half deleted: it loses its name first.

    A process that dies on the way leaves what `recover(path)` deletes.
    """
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        shutil.rmtree(doomed, ignore_errors=True)
        if path.is_dir():
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path, other: Path) -> None:
    """Give a folder of ours another name; what had that name is deleted."""
    with disk_errors(path):
        shutil.rmtree(other, ignore_errors=True)
        path.rename(other)
        sync_folder(path.parent)


def recover(path: Path) -> None:
    """Undo what a killed `new_folder(path)` or `write_file(path)` left.

    The older folder comes back, what is unfinished is deleted. Call it only where no other process can be
    writing `path` (under the lock of its run).
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    aside = _aside(path)
    with disk_errors(path):
        if aside.is_dir() and not path.exists():
            aside.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        for leftover in _leftovers(path):
            _delete(leftover)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """Return the JSON value in `path`. Raises BundleError that names the file and what is wrong with it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: not a plain file.")  # reading a pipe might never end
        if status.st_size > limit:
            raise BundleError(f"{path}: larger than {limit} bytes; not a file of ours.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); the file is damaged.") from error


def verify(folder: Path) -> str:
    """Check every file of a committed folder against its manifest; return the manifest's own SHA-256.

    Raises:
        BundleError: naming the file, what was expected and what was found.
    """
    manifest = folder / MANIFEST
    listed = read_json(manifest)
    files = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(files, dict):
        raise BundleError(f"{manifest}: expected an object with 'files'; the file is damaged.")
    for name, entry in files.items():
        try:
            _check(folder, name, entry)
        except OSError as error:
            raise BundleError(f"{folder / name}: cannot be read ({error.strerror or error}).") from error
    return sha256(manifest)


def _check(folder: Path, name: str, entry: Any) -> None:
    if Path(name).name != name or name in (".", ".."):
        raise BundleError(f"{folder / MANIFEST}: '{name}' is not a plain file name.")
    if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)):
        raise BundleError(f"{folder / MANIFEST}: '{name}' lacks its size or SHA-256; the file is damaged.")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: missing, or not a plain file; the folder is damaged.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BundleError(f"{path}: expected {entry['bytes']} bytes, found {size}; the file is damaged.")
    found = sha256(path)
    if found != entry["sha256"]:
        raise BundleError(f"{path}: SHA-256 {found[:12]}… differs from the manifest's {entry['sha256'][:12]}….")
