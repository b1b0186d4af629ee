"""How decoding grows, and how long one line waits: `python -m tests.benchmarks.growth --model RUN --source test.en`.

Prints the latency of one line alone (median and 99th percentile over the lines), and the seconds of a line for beam
widths of 1 to 32, for sources of 10 to 1,000 tokens (lines joined, outputs of 20 tokens each, so that the source alone
grows), and for numbers of lines (the file repeated) with the memory at the end. One process with `--cores` threads for
latency, as many workers for the rest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.cli.models import load_bundles
from encdec_cli.decoding.beam import Beam
from encdec_cli.generation.lines import Options, generate
from encdec_cli.text.example import Example
from encdec_cli.text.windows import full_windows

from .decoding import family, proportional_memory

BEAMS = (1, 2, 4, 5, 8, 16, 32)
LENGTHS = (10, 30, 100, 300, 1000)
COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def seconds(bundle: Bundle, lines: Sequence[str], options: Options) -> float:
    """Return the seconds in which the lines are decoded, as one window after another."""
    examples = (Example(line) for line in lines)
    start = time.perf_counter()
    for _ in generate([bundle], full_windows(examples, options.window), options):
        pass
    return time.perf_counter() - start


def latency(bundle: Bundle, lines: Sequence[str], beam: int) -> str:
    """Return median and 99th percentile of the milliseconds of one line, each decoded alone."""
    options = Options(Beam(beam=beam))
    seconds(bundle, lines[:5], Options(Beam(beam=beam), batch=1))
    taken = sorted(1000 * seconds(bundle, [line], options) for line in lines)
    return f"p50 {statistics.median(taken):6.1f} ms   p99 {taken[int(0.99 * len(taken))]:6.1f} ms"


def of_length(bundle: Bundle, lines: Sequence[str], tokens: int, count: int) -> list[str]:
    """Return `count` lines of at most `tokens` tokens, made of whole words of `lines` one after the other."""
    words = itertools.cycle(word for line in lines for word in line.split())
    made = []
    for _ in range(count):
        text: list[str] = []
        while len(bundle.source.encode(" ".join(text))) < tokens:
            text += itertools.islice(words, max(1, tokens // 20))
        made.append(" ".join(text[:-1]))
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="most lines of the last table")
    options = parser.parse_args()
    lines = options.source.read_text(encoding="utf-8").splitlines()[:1000]
    (bundle,) = load_bundles([options.model], "cpu", [], options.precision)
    text = replace(bundle.recipe.text, max_source=LENGTHS[-1] + 2)
    bundle.recipe = replace(bundle.recipe, text=text)  # whether it makes sense or not
    torch.set_num_threads(options.cores)
    for beam in (1, 5):
        print(f"one line alone, beam {beam}: {latency(bundle, lines[:300], beam)}", flush=True)
    print("\nbeam   ms a line   to beam 1")
    base = 0.0
    for beam in BEAMS:
        taken = 1000 * seconds(bundle, lines, Options(Beam(beam=beam), workers=options.cores)) / len(lines)
        base = base or taken
        print(f"{beam:>4}   {taken:9.2f}   {taken / base:9.2f}", flush=True)
    print("\nsource tokens   ms a line (beam 5, outputs of 20 tokens)")
    for tokens in LENGTHS:
        if tokens < bundle.longest_source:
            made = of_length(bundle, lines, tokens, 128)
            strategy = Beam(beam=5, min_length=20, max_length=20)
            taken = 1000 * seconds(bundle, made, Options(strategy, workers=options.cores)) / len(made)
            print(f"{tokens:>13}   {taken:9.2f}", flush=True)
    print("\n    lines   ms a line (beam 1)   MiB")
    for count in (count for count in COUNTS if count <= options.most):
        repeated = list(itertools.islice(itertools.cycle(lines), count))
        taken = 1000 * seconds(bundle, repeated, Options(Beam(beam=1), workers=options.cores)) / count
        memory = sum(map(proportional_memory, family(os.getpid())))
        print(f"{count:>9,}   {taken:18.3f}   {memory:5.0f}", flush=True)


if __name__ == "__main__":
    main()
