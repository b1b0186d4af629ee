"""The safetensors format: its header, read with limits, and files of it, written without a copy of what goes in.

The library's own writers order metadata by chance, and first copy all tensors, which for the state of a run is the
largest thing in memory. https://huggingface.co/docs/safetensors tells of the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

_HEADER_LIMIT = 16 << 20
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    dtype: str
    """As the format names it: F32, BF16, I64 …"""
    width: int
    """Bytes of a number."""
    shape: tuple[int, ...]
    data: memoryview | Callable[[], memoryview]
    """The numbers, little-endian and contiguous, or what gives them when their turn comes."""

    @property
    def size(self) -> int:
        """Bytes of all numbers."""
        return self.width * prod(self.shape)


class Container:
    """A file that is to be written; equal tensors and metadata give equal bytes.

    Args:
        entries: the tensors by name, in any order.
        metadata: strings by name; their order is that of the file.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        # The widest first: all stay aligned.
        self._entries = sorted(entries.items(), key=lambda item: (-item[1].width, item[0]))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin = 0
        for name, entry in self._entries:
            end = begin + entry.size
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + begin
        """Bytes of the file."""

    def write(self, path: Path) -> None:
        """Write the file, into a folder that `atomic.new_folder` is filling."""
        with path.open("wb", buffering=_BUFFER) as file:  # small tensors go together
            file.write(self._header)
            for _, entry in self._entries:
                file.write(entry.data() if callable(entry.data) else entry.data)


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its data begin.

    Raises ValueError or RecursionError if it is damaged, or larger than any of ours.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"the file has {size} bytes, less than its header needs ({8 + length})")
    if length > _HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes is larger than the allowed {_HEADER_LIMIT}")
    header = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in the header")
    return found
