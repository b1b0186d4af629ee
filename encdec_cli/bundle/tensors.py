"""Named tensors in a safetensors file, with checks that the library leaves to its caller."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encdec_cli.data.container import Container, Entry, read_header
from encdec_cli.errors import BundleError
from encdec_cli.models.parts import Piece

MAX_TENSORS = 100_000
_PIECES = "pieces"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def container(tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece] | None = None) -> Container:
    """Return a file with the tensors, ready to be written one by one; equal tensors give equal bytes.

    pieces: what those tensors are that are pieces of others; it is noted in the file, for `read_pieces`.
    """
    noted = {name: (piece.shape, piece.spans) for name, piece in (pieces or {}).items() if name in tensors}
    metadata = {_PIECES: json.dumps(noted, sort_keys=True)} if noted else None
    return Container({name: _entry(name, tensor.detach()) for name, tensor in tensors.items()}, metadata)


def _entry(name: str, tensor: Tensor) -> Entry:
    if tensor.dtype not in _DTYPES:
        raise BundleError(f"'{name}' is of {tensor.dtype}, which cannot be stored; use a real or whole type.")

    def data() -> memoryview:
        numbers: memoryview = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return numbers

    return Entry(_DTYPES[tensor.dtype], tensor.itemsize, tuple(tensor.shape), data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises BundleError if it is missing, damaged, or has a larger header than ours."""
    with _readable(path):
        return safetensors.torch.load_file(path)


def read_pieces(parts: Sequence[Path], wanted: Mapping[str, Piece] | None = None) -> dict[str, Tensor]:
    """Read pieces of tensors of which several files have pieces; all of those not in `wanted`.

    Of a tensor that is wanted in part nothing else comes into memory. Raises BundleError as `read_tensors`, and if the
    files together lack some of what is wanted.
    """
    found: dict[str, Tensor] = {}
    read: dict[str, int] = {}
    for path in parts:
        with _readable(path), safe_open(path, framework="pt") as file:
            pieces = _pieces_in(file.metadata())
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                own = pieces.get(name, Piece.whole(part.get_shape()))
                piece = wanted.get(name, Piece.whole(own.shape)) if wanted else Piece.whole(own.shape)
                if not own.shape:
                    found[name], read[name] = file.get_tensor(name), 1
                    continue
                if name not in found:
                    found[name], read[name] = part[:0].new_empty(piece.size), 0
                for here, there in piece.overlaps(own):
                    numbers = part[here]
                    found[name][there] = numbers
                    read[name] += numbers.numel()
    for name, tensor in found.items():
        if read[name] != tensor.numel():
            raise BundleError(
                f"{parts[0].parent}: the files of '{name}' do not make a whole; they are damaged, or of a "
                "version that did not note their rows."
            )
    return found


def _pieces_in(metadata: Mapping[str, str] | None) -> dict[str, Piece]:
    """Return what `container` has noted in a file. Raises ValueError if that is something else."""
    try:
        noted = json.loads((metadata or {}).get(_PIECES, "{}"))
        return {
            name: Piece(tuple(shape), tuple(tuple((begin, end) for begin, end in dim) for dim in spans))
            for name, (shape, spans) in noted.items()
        }
    except (AttributeError, TypeError) as error:
        raise ValueError(f"its pieces are noted in another way: {error}") from error


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
