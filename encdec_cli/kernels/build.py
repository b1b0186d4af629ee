"""The C functions of this folder, compiled by the machine's own compiler at their first use.

The compiler is `cc`, or what the environment variable CC names; an empty CC asks for none. What is compiled is kept in
the user's cache folder, under a digest of all that decides it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from encdec_cli.atomic import cache_folder, write_file
from encdec_cli.errors import ResourceError

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# Nothing that lets sums change their order: rows must not depend on how many there are.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
CHUNK = 64
"""Logits under one maximum."""
COLUMNS = 96
"""Columns of a gradient that are turned together: six vectors."""
_SIZES = (f"-DCHUNK={CHUNK}", f"-DCOLUMNS={COLUMNS}")
_ONE_AT_A_TIME = Lock()


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None where they cannot be compiled."""
    with _ONE_AT_A_TIME:
        try:
            return _loaded()
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # no home, no room, no compiler …
            return None


@cache
def wide() -> bool:
    """Return whether the processor has the registers without which torch is faster in training: AVX-512 or AVX2."""
    found = library()
    return found is not None and bool(found.has_product(0))


@cache
def panel() -> int:
    """Return how many outputs' weights lie together in a packed matrix on this processor."""
    return int(function("panel_outputs")())


@cache
def function(name: str) -> Any:
    """Return one of the compiled functions, where there are any."""
    return getattr(library(), name)


def _loaded() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler:
        return None
    facts = [*(source.read_text() for source in SOURCES), *FLAGS, *_SIZES, *compiler, platform.machine(), _processor()]
    kept = cache_folder() / f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    with suppress(OSError):
        return _with_types(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        written = [str(source) for source in SOURCES if source.suffix == ".c"]
        command = [*compiler, *FLAGS, *_SIZES, *written, "-o", str(made), "-lm"]
        subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)  # noqa: S603
        found = _with_types(ctypes.CDLL(str(made)))
        with suppress(ResourceError):  # then the next process compiles again
            write_file(kept, made.read_bytes())
        return found


def _with_types(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, types in {
        "scan": [pointer, number, number, pointer, pointer, pointer, number],
        "candidates": [pointer] * 4 + [number] * 4 + [pointer] * 3,
        "product": [pointer, number, pointer, pointer, pointer, number, number, flag],
        "map_rows": [pointer, number, *[pointer] * 4, number, number, flag],
        "map_columns": [pointer, number, number, *[pointer] * 5, number, number],
        "decoder_layer": [pointer, pointer],
        "encoder_layer": [pointer, pointer],
        "norm": [pointer, number, number, pointer, pointer, ctypes.c_float, flag, pointer],
        "attend": [pointer] * 6,
        "norm_gradient": [pointer, pointer, number, number, pointer, ctypes.c_float, flag, number, pointer, pointer],
        "add_blocks": [pointer, number, number, pointer],
        "dropout": [*[pointer] * 3, number, number, ctypes.c_float, ctypes.c_int32, pointer],
        "agreement": [pointer, number, number, pointer, pointer, *[ctypes.c_float] * 3, pointer, pointer],
        "cross_entropy": [pointer, number, number, *[pointer] * 3, *[ctypes.c_float] * 2, pointer, pointer],
    }.items():
        one = getattr(found, name)
        one.argtypes, one.restype = [*types, flag], None  # type: ignore[misc]
    found.draw.argtypes, found.draw.restype = [pointer, pointer, number], None
    found.has_product.argtypes, found.has_product.restype = [number], flag
    found.panel_outputs.argtypes, found.panel_outputs.restype = [], number
    found.words_at_once.argtypes, found.words_at_once.restype = [flag], number
    found.attend_in_training.argtypes = [pointer, number, number, flag]
    found.attend_in_training.restype = flag
    found.part.argtypes, found.part.restype = [*[pointer] * 4, *[number] * 4, *[pointer] * 4], flag
    return found


def _processor() -> str:
    """Return what tells processors apart for a compiler; machines may share a home."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()
