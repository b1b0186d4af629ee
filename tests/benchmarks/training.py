"""Speed of training against nn.Transformer, Hugging Face and JoeyNMT: `python -m tests.benchmarks.training`.

    pip install transformers accelerate joeynmt
    encdec preprocess recipes/multi30k.yaml data.root=multi30k text.vocabulary=8000 --output RUN
    python -m tests.benchmarks.training --data RUN/data

Every tool is a process of its own that trains a new model of the same size, epoch after epoch over the same pairs, in
turn with the others; the first epoch is not counted. Ours takes `--tokens` tokens an update, padding included; the
others as many sentences an update as ours on average, so that an update has as many real tokens. Hugging Face groups
them by length, nn.Transformer and JoeyNMT take them as they are shuffled; nn.Transformer is also given our batches.
Each size, small (3+3 layers of 256) and base (6+6 of 512), has its table: real target tokens (EOS counted, padding not)
a second and a CPU-second, their spread, memory, and how many times faster our best is. A tool whose package is missing
is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from encdec_cli.data.sampler import Sampler
from encdec_cli.training.precision import choose

from .speed import SIZES
from .training_engines import add_options, pairs_of


@dataclass
class Tool:
    """One row of the table."""

    name: str
    words: list[str]
    """Arguments of the process."""
    process: Any = None
    said: Any = None
    """The file of its stderr."""
    answers: list[dict[str, float]] = field(default_factory=list)

    def start(self, common: list[str]) -> None:
        """Start the process and wait until it is ready."""
        command = [sys.executable, "-m", "tests.benchmarks.training_engines", *self.words, *common]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )
        if self.process.stdout.readline() != "ready\n":
            self.fail()

    def run(self, count: bool = True) -> None:
        """Train an epoch; keep what is answered if it counts."""
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.fail()
        if count:
            self.answers.append(json.loads(answer))

    def fail(self) -> NoReturn:
        """Exit with what the process said last."""
        self.said.seek(0)
        raise SystemExit(f"{self.name} failed:\n{self.said.read()[-2000:]}")

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()

    def speeds(self, clock: str) -> list[float]:
        """Return target tokens per second of every epoch that counts; clock: wall or cpu."""
        return [answer["tokens"] / answer[clock] for answer in self.answers]


def tools(precisions: str, sentences: int) -> list[Tool]:
    """Return every tool whose package is here, ours first."""
    rows = [Tool(f"encdec, {kind}", ["encdec", "--precision", kind]) for kind in precisions.split(",")]
    others = ["--sentences", str(sentences)]
    kinds = (("fp32", "fp32"), ("autocast bf16", "bf16"))
    for batches in ("shuffled", "sorted"):
        called = f"nn.Transformer, {'our' if batches == 'sorted' else batches} batches"
        for kind, precision in kinds:
            words = ["plain", *others, "--precision", precision, "--batches", batches]
            rows.append(Tool(f"{called}, {kind}", words))
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        for kind, precision in kinds:
            rows.append(Tool(f"transformers, {kind}", ["transformers", *others, "--precision", precision]))
    if importlib.util.find_spec("joeynmt"):
        rows.append(Tool("JoeyNMT, fp32", ["joeynmt", *others]))
    return rows


def show(rows: list[Tool], clock: str) -> None:
    """Print the table, ratios by the clock."""
    best = max(statistics.median(row.speeds(clock)) for row in rows if row.name.startswith("encdec"))
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  tokens/s  tokens/CPU-s  ({clock}: min - max)   updates    MiB  best ours / it")
    for row in rows:
        speeds, last = row.speeds(clock), row.answers[-1]
        spread = f"({min(speeds):.4g} - {max(speeds):.4g})"
        print(
            f"{row.name:{width}}  {statistics.median(row.speeds('wall')):8.4g}  "
            f"{statistics.median(row.speeds('cpu')):12.4g}  {spread:22} {last['updates']:7.0f}  "
            f"{last['memory']:5.0f} {best / statistics.median(speeds):10.2f}"
        )


def compare(rows: list[Tool], size: str, options: argparse.Namespace) -> None:
    """Let every tool train models of one size, in turn."""
    common = ["--size", size, "--pairs", str(options.pairs), "--tokens", str(options.tokens)]
    common += ["--cores", str(options.cores), "--vocabulary", str(options.vocabulary)]
    common += ["--data", str(options.data)] if options.data else []
    try:
        for row in rows:
            ours = ["--accumulate", str(options.accumulate)] if row.name.startswith("encdec") else []
            row.start([*common, *ours])
            row.run(count=False)
        for _ in range(options.repetitions):
            for row in rows:
                row.run()
    finally:
        for row in rows:
            row.stop()


def main() -> None:
    """Train with every tool in turn and print a table for each size."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--size", default="small,base", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--precisions", default="bf16,fp32", help="of ours")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches that ours makes of an update")
    parser.add_argument("--without", default="", help="parts of the names of tools to leave out, as JoeyNMT,shuffled")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="ratios of CPU-seconds in place of wall time")
    options = parser.parse_args()
    sizes = options.size.split(",")
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"--size: no size {', '.join(sorted(unknown))}")
    pairs = pairs_of(options)
    lengths = [torch.tensor([len(x) for x in side]).numpy() for side in (pairs.sources, pairs.targets)]
    updates = len(Sampler(lengths[0], lengths[1], options.tokens, "benchmark", 1))
    for size in sizes:
        rows = tools(options.precisions, max(1, round(len(lengths[0]) / updates)))
        rows = [row for row in rows if not any(part in row.name for part in filter(None, options.without.split(",")))]
        if not any(row.name.startswith("encdec") for row in rows):
            parser.error("--without leaves out encdec, which all others are compared with")
        compare(rows, size, options)
        tokens = rows[0].answers[0]["tokens"]
        print(
            f"torch {torch.__version__}, {size}, {options.cores} cores, vocabulary {pairs.vocab:,}, "
            f"{len(pairs.sources):,} pairs, {tokens:,.0f} target tokens; auto is {choose('auto', 'cpu').name}"
        )
        show(rows, "cpu" if options.cpu_time else "wall")


if __name__ == "__main__":
    main()
