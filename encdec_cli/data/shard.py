"""One file of token ids: a safetensors shard, mapped into memory and never loaded.

A shard holds the flat tokens of both sides and where each example begins. The format is the public one, so
any safetensors library reads it; the header is read here, with limits, because a hostile or damaged header
must cost neither memory nor a traceback.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from encdec_cli.data.container import Container, Entry, read_header
from encdec_cli.errors import BundleError

Ids = npt.NDArray[Any]
"""Token ids: uint16 where the vocabulary fits, else uint32."""
Ints = npt.NDArray[np.int64]

SIDES = ("source", "target")
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_TENSORS = {"source.tokens", "source.offsets", "target.tokens", "target.offsets"}


@dataclass(frozen=True)
class Side:
    """What a shard knows about the vocabulary of one side: its number of tokens and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Views into one mapped file; index 0 is the source side, 1 the target side."""

    tokens: tuple[Ids, Ids]
    """Flat source and target ids."""
    offsets: tuple[Ints, Ints]
    """Where each example begins, and one more: where the last one ends."""
    sides: tuple[Side, Side]

    def __len__(self) -> int:
        return len(self.offsets[0]) - 1


def write_shard(path: Path, tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write one shard, into a folder that `atomic.new_folder` is filling: equal tensors give equal bytes."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    parts = {name: value.astype(value.dtype.newbyteorder("<"), copy=False) for name, value in tensors.items()}
    entries = {name: Entry(names[part.dtype], part.itemsize, part.shape, part.data) for name, part in parts.items()}
    Container(entries, metadata).write(path)


def read_shard(path: Path, split: str) -> Shard:
    """Map one shard of a split. Raises BundleError that names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            header, start = read_header(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"{path}: cannot be mapped into memory ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    entries = _entries(path, header, len(mapped) - start)
    views = {name: _view(mapped, entry, start) for name, entry in entries.items()}
    sides = _metadata(path, header, split, len(views["source.offsets"]) - 1)
    for name in SIDES:
        _check_offsets(path, name, views[f"{name}.offsets"], len(views[f"{name}.tokens"]))
    if len(views["source.offsets"]) != len(views["target.offsets"]):
        raise _damaged(path, "source and target have different numbers of examples")
    return Shard(
        (views["source.tokens"], views["target.tokens"]), (views["source.offsets"], views["target.offsets"]), sides
    )


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: {what}; the shard is damaged, or not one of ours.")


def _entries(path: Path, header: dict[str, Any], data: int) -> dict[str, tuple[str, int, int]]:
    """Return dtype, begin and end of each tensor, after checking that they fill `data` bytes exactly."""
    names = set(header) - {"__metadata__"}
    if names != _TENSORS:
        raise _damaged(path, f"expected the tensors {', '.join(sorted(_TENSORS))}, found {sorted(names)[:8]}")
    entries = {name: _entry(path, name, header[name]) for name in sorted(names)}
    place = 0
    for _, begin, end in sorted(entries.values(), key=lambda entry: entry[1:]):
        if begin != place:
            raise _damaged(path, f"tensors overlap or leave a hole at byte {place} of the data")
        place = end
    if place != data:
        raise _damaged(path, f"expected {place} bytes of data, found {data}")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[str, int, int]:
    keys = {"dtype", "shape", "data_offsets"}
    if not (isinstance(entry, dict) and set(entry) == keys and isinstance(entry["dtype"], str)):
        raise _damaged(path, f"'{name}' lacks dtype, shape or data_offsets")
    allowed = ("I64",) if name.endswith(".offsets") else ("U16", "U32")
    if entry["dtype"] not in allowed:
        raise _damaged(path, f"'{name}' has dtype {entry['dtype'][:20]!r}, expected {' or '.join(allowed)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_naturals(shape, 1) and _naturals(offsets, 2)):
        raise _damaged(path, f"'{name}' has a shape or data_offsets that are not whole numbers")
    if offsets[1] - offsets[0] != shape[0] * _DTYPES[entry["dtype"]].itemsize:
        raise _damaged(path, f"'{name}' has a shape that does not fit its number of bytes")
    return entry["dtype"], offsets[0], offsets[1]


def _naturals(value: Any, length: int) -> bool:
    whole = isinstance(value, list) and len(value) == length
    return whole and all(type(number) is int and 0 <= number <= 1 << 62 for number in value)


def _view(mapped: mmap.mmap, entry: tuple[str, int, int], start: int) -> npt.NDArray[Any]:
    dtype, begin, end = _DTYPES[entry[0]], entry[1], entry[2]
    if begin == end:
        return np.zeros(0, dtype)
    return np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, start + begin)


def _metadata(path: Path, header: dict[str, Any], split: str, count: int) -> tuple[Side, Side]:
    metadata = header.get("__metadata__")
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _damaged(path, "the header has no metadata")
    if metadata.get("format") != "1":
        raise BundleError(f"{path}: format {str(metadata.get('format'))[:20]!r}, this version reads format '1'.")
    if metadata.get("split") != split or metadata.get("count") != str(count):
        raise _damaged(path, f"the metadata do not say {count} examples of '{split}'")
    sides = []
    for name in SIDES:
        size = metadata.get(f"{name}.vocabulary", "")
        if not re.fullmatch(r"[0-9]{1,10}", size):
            raise _damaged(path, f"the metadata lack the size of the {name} vocabulary")
        sides.append(Side(int(size), metadata.get(f"{name}.vocabulary.sha256", "")))
    return sides[0], sides[1]


def _check_offsets(path: Path, name: str, offsets: Ints, tokens: int) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != tokens or bool((offsets[1:] < offsets[:-1]).any()):
        raise _damaged(path, f"'{name}.offsets' do not rise from 0 to the {tokens} tokens of '{name}.tokens'")
    if len(offsets) > 1 and int(np.diff(offsets).max()) > np.iinfo(np.int32).max:
        raise _damaged(path, f"'{name}.offsets' hold an example of 2^31 tokens or more")
