"""Named tensors in a safetensors file, with checks that the library leaves to its caller."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from encdec_cli.errors import BundleError

MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Return the tensors as the bytes of a safetensors file; equal tensors give equal bytes."""
    return safetensors.torch.save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        BundleError: naming the file, if it is missing, damaged, or its header is larger than any of ours.
    """
    try:
        _check_header(path)
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}).") from error


def _check_header(path: Path) -> None:
    # A 60 MB header of empty tensors costs the library a gigabyte and a duplicate name is taken silently.
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError(f"{len(head)} bytes long")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes, at most {MAX_HEADER} expected")
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors, at most {MAX_TENSORS} expected")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return names


def load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copy tensors into a module; BundleError names the first that is missing, unknown or of another shape."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise BundleError(f"{origin}: lacks '{name}', which the model needs; it belongs to another model.")
        if name not in own:
            raise BundleError(f"{origin}: holds '{name}', which the model does not know; it belongs to another model.")
        if own[name].shape != tensors[name].shape:
            raise BundleError(
                f"{origin}: '{name}' has shape {list(tensors[name].shape)}, the model expects {list(own[name].shape)}."
            )
    module.load_state_dict(tensors)
