"""Named tensors in a safetensors file, with checks that the library leaves to its caller."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from encdec_cli.data.shard import read_header
from encdec_cli.errors import BundleError

MAX_TENSORS = 100_000


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Return the tensors as the bytes of a safetensors file; equal tensors give equal bytes."""
    return safetensors.torch.save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises BundleError if it is missing, damaged, or has a larger header than ours."""
    try:
        # A 60 MB header of empty tensors costs the library a gigabyte and a duplicate name is taken silently.
        with path.open("rb") as file:
            header, _ = read_header(file)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors, at most {MAX_TENSORS} expected")
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}).") from error


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
