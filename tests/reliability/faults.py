"""A plugin for runs under test: at the k-th call of a function, a signal; or system calls that fail or kill, by strace.

`FAULT=fsync:3:9` kills at the third `os.fsync`; `FAULT=search:1:15:2` sends two SIGTERM, and `TOLD=FILE` is written
just before. `STRACE=FILE` writes the system calls to FILE, and `INJECT=write:error=ENOSPC:when=4` lets one fail.
`HOLD=FILE` waits in the reading of data as long as FILE stands.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from encdec_cli.corpora.files import Files
from encdec_cli.decoding.beam import Beam
from encdec_cli.training.gradients import Gradients

CALLS = "openat,write,fsync,rename,unlink,unlinkat,mkdir,rmdir,symlink,symlinkat,ftruncate"
POINTS = {
    **dict.fromkeys(("mkdir", "rename", "unlink", "symlink", "rmdir", "fsync"), os),
    "read": Files,
    "search": Beam,
    "update": Gradients,
}
_METHODS = {"read": "read", "search": "__call__", "update": "of"}


def arm(point: str, number: int, signal: int, times: int = 1) -> None:
    """Send a signal to this process at the `number`-th call of a point."""
    owner, name = POINTS[point], _METHODS.get(point, point)
    original, seen = getattr(owner, name), [0]

    def call(*arguments: Any, **options: object) -> object:
        # What is decoded to predict the memory has one length.
        seen[0] += point != "search" or arguments[0].min_length != arguments[0].max_length
        if seen[0] == number:
            if "TOLD" in os.environ:
                Path(os.environ["TOLD"]).write_text("now")
            for _ in range(times):
                os.kill(os.getpid(), signal)
        return original(*arguments, **options)

    setattr(owner, name, call)


def attach(output: str, inject: str | None) -> None:
    """Let strace follow this process."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: our child may trace us
    words = ["strace", "-qq", "-y", "-p", str(os.getpid()), "-o", output, "-e", f"trace={CALLS}"]
    subprocess.Popen([*words, *(["-e", f"inject={inject}"] if inject else [])], stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)


def hold(file: Path) -> None:
    """Wait before data is read."""
    read = Files.read

    def held(self: Files, split: str) -> object:
        while file.exists():
            time.sleep(0.01)
        return read(self, split)

    Files.read = held


if "FAULT" in os.environ:
    _point, *_numbers = os.environ["FAULT"].split(":")
    arm(_point, *map(int, _numbers))
if "STRACE" in os.environ:
    attach(os.environ["STRACE"], os.environ.get("INJECT"))
if "HOLD" in os.environ:
    hold(Path(os.environ["HOLD"]))
