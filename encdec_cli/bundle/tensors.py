"""Named tensors in a safetensors file, with checks that the library leaves to its caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encdec_cli.data.shard import read_header
from encdec_cli.errors import BundleError

MAX_TENSORS = 100_000


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Return the tensors as the bytes of a safetensors file; equal tensors give equal bytes."""
    return safetensors.torch.save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises BundleError if it is missing, damaged, or has a larger header than ours."""
    with _readable(path):
        return safetensors.torch.load_file(path)


def read_rows(parts: Sequence[Path], rows: Mapping[str, slice] | None = None) -> dict[str, Tensor]:
    """Read some rows of tensors whose rows stand one after the other in several files; all of those not in `rows`.

    Of a tensor that is wanted in part nothing else comes into memory. Raises BundleError as `read_tensors`.
    """
    found: dict[str, list[Tensor]] = {}
    above: dict[str, int] = {}
    for path in parts:
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shape = part.get_shape()
                wanted = rows.get(name) if rows else None
                if not shape or wanted is None:
                    found.setdefault(name, []).append(file.get_tensor(name))
                    continue
                start = above.get(name, 0)
                above[name] = start + shape[0]
                begin, end = max(wanted.start - start, 0), min(wanted.stop - start, shape[0])
                found.setdefault(name, []).append(part[begin : max(begin, end)])
    return {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in found.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Check the header of a safetensors file; let what goes wrong in the block be a BundleError that names it."""
    try:
        # A 60 MB header of empty tensors costs the library a gigabyte and a duplicate name is taken silently.
        with path.open("rb") as file:
            header, _ = read_header(file)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors, at most {MAX_TENSORS} expected")
        yield
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
