"""A long pipe, one line in a hundred wild: `python -m tests.benchmarks.pipe --model RUN --lines 1000000`.

Prints the lines that came out, the seconds of each tenth of them, and the memory of `encdec generate` and its workers
at its end: as many lines as went in, no tenth slower than the first, and flat memory are what is promised.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from .decoding import family, proportional_memory

WILD = [
    *(b"", b"   ", b"\t", b"\xff\xfe 1", b"1\x002", b"7\r8", b"9 " * 300, b"unseen words"),
    *("1 2\u2028 3".encode(), "\ufeff1".encode()),
]


def feed(pipe: BinaryIO, count: int) -> None:
    """Write `count` lines of one to six digits, or something wild, and close the pipe."""
    chance = random.Random(1)
    with pipe:
        for _ in range(count):
            digits = " ".join(chance.choice("0123456789") for _ in range(chance.randint(1, 6)))
            pipe.write((chance.choice(WILD) if chance.random() < 0.01 else digits.encode()) + b"\n")


def main() -> None:
    """Run the pipe and print a line for each tenth."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pipe", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a small one: it is the pipe that is tried")
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    words = [sys.executable, "-m", "encdec_cli", "generate", "--model", str(options.model), "--beam", "1"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdin is None or process.stdout is None:
            raise SystemExit("no pipes")
        threading.Thread(target=feed, args=(process.stdin, options.lines), daemon=True).start()
        begin, count = time.perf_counter(), 0
        for count, _ in enumerate(process.stdout, start=1):
            if count % max(1, options.lines // 10) == 0:
                memory = sum(map(proportional_memory, family(process.pid)))
                print(f"{count:>9,} lines  {time.perf_counter() - begin:6.1f} s  {memory:6.0f} MiB", flush=True)
                begin = time.perf_counter()
    print(f"{options.lines:,} lines in, {count:,} lines out, exit code {process.returncode}")


if __name__ == "__main__":
    main()
