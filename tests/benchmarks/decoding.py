"""Speed of decoding against CTranslate2, Hugging Face and plain PyTorch: `python -m tests.benchmarks.decoding`.

    encdec train recipes/multi30k.yaml data.root=multi30k
    python -m tests.benchmarks.decoding --model runs/multi30k --source test.en --reference test.de

Every engine is a process of its own that has loaded the same weights; they decode the same lines in turn, repetition
after repetition, from text to text. The table gives the median of sentences and tokens a second with its spread, the
peak of memory (proportional set size, workers included), scores, the share of outputs equal to ours in fp32, and how
many times faster our best is. CTranslate2 runs with the best of several settings of threads and batch, found first. An
engine whose package is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sacrebleu

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.export import export

BATCHES = (32, 64)


@dataclass
class Engine:
    """One row of the table."""

    name: str
    words: list[str]
    """Arguments of the process."""
    process: Any = None
    seconds: list[float] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tokens: int = 0
    memory: float = 0.0
    """MiB at the peak."""

    def start(self) -> None:
        """Start the process and wait until it has loaded."""
        command = [sys.executable, "-m", "tests.benchmarks.engines", *self.words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{self.name}: did not load")

    def run(self, count: bool = True) -> float:
        """Decode all lines once; return the seconds, and keep them if they count."""
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        answer = json.loads(self.process.stdout.readline())
        done.set()
        watcher.join()
        self.outputs, self.tokens = answer["outputs"], answer["tokens"]
        if count:
            self.seconds.append(answer["seconds"])
        return float(answer["seconds"])

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.2):
            self.memory = max(self.memory, sum(map(proportional_memory, family(self.process.pid))))


def family(pid: int) -> list[int]:
    """Return a process and its children."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = path.read_text().split() if path.exists() else []
    return [pid, *map(int, children)]


def proportional_memory(pid: int) -> float:
    """Return the MiB of a process, pages that it shares counted in parts; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def engines(options: argparse.Namespace, exports: Path) -> list[Engine]:
    """Return every engine whose package is here."""
    common = ["--model", str(options.model), "--lines", str(options.source), "--beam", str(options.beam)]
    common += ["--cores", str(options.cores)]
    rows = [
        Engine(f"encdec, {precision}", ["ours", *common, "--precision", precision, "--batch", str(options.batch)])
        for precision in options.precisions.split(",")
    ]
    if importlib.util.find_spec("ctranslate2"):
        rows += [_best_ctranslate2(options, exports, common, kind) for kind in ("float32", "int8")]
    if importlib.util.find_spec("transformers") and not options.fast:
        rows.append(Engine("Hugging Face generate, fp32", ["huggingface", *common, "--batch", str(options.batch)]))
    if not options.fast:
        rows.append(Engine("plain PyTorch, cache, fp32", ["plain", *common, "--batch", str(options.batch)]))
    return rows


def _best_ctranslate2(options: argparse.Namespace, exports: Path, common: list[str], kind: str) -> Engine:
    """Return CTranslate2 with its fastest setting, each tried once after warming up."""
    from encdec_cli.bundle.ctranslate2 import CTranslate2

    folder = exports / kind
    export(CTranslate2("none" if kind == "float32" else kind), Bundle.load(options.model), folder, None)
    tried: dict[float, Engine] = {}
    threads = {f"{options.cores}x1", f"1x{options.cores}"}
    for setting, batch in itertools.product(sorted(threads), BATCHES):
        words = ["--export", str(folder), "--precision", kind, "--threads", setting, "--batch", str(batch)]
        row = Engine(f"CTranslate2, {kind} ({setting}, batch {batch})", ["ctranslate2", *common, *words])
        row.start()
        row.run(count=False)
        tried[row.run(count=False)] = row
        row.stop()
    return tried[min(tried)]


def show(rows: list[Engine], references: list[str] | None) -> None:
    """Print the table."""
    ours = [row for row in rows if row.name.startswith("encdec")]
    base = ours[0].outputs
    best = min(statistics.median(row.seconds) for row in ours)
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  sent/s  (min - max)      tokens/s   MiB   BLEU   chrF   equal   best ours / it")
    for row in rows:
        seconds = statistics.median(row.seconds)
        count = len(row.outputs)
        spread = f"({count / max(row.seconds):.1f} - {count / min(row.seconds):.1f})"
        scores = "    -      -"
        if references is not None:
            bleu = sacrebleu.corpus_bleu(row.outputs, [references]).score
            scores = f"{bleu:6.2f} {sacrebleu.corpus_chrf(row.outputs, [references]).score:6.2f}"
        equal = sum(one == other for one, other in zip(row.outputs, base, strict=True)) / count
        print(
            f"{row.name:{width}} {count / seconds:7.1f}  {spread:16} {row.tokens / seconds:8.0f} {row.memory:6.0f} "
            f"{scores} {equal:7.3f} {seconds / best:10.2f}"
        )


def main() -> None:
    """Decode with every engine in turn and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="bundle or run")
    parser.add_argument("--source", type=Path, required=True, help="lines to decode")
    parser.add_argument("--reference", type=Path, help="their references, for BLEU and chrF")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="of ours, Hugging Face and plain PyTorch")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precisions", default="fp32,bf16,int8", help="of ours")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="leave out Hugging Face and plain PyTorch")
    options = parser.parse_args()
    references = options.reference.read_text(encoding="utf-8").split("\n")[:-1] if options.reference else None
    with tempfile.TemporaryDirectory() as exports:
        rows = engines(options, Path(exports))
        try:
            for row in rows:
                row.start()
                row.run(count=False)
            for _ in range(options.repetitions):
                for row in rows:
                    row.run()
                    time.sleep(0.1)
        finally:
            for row in rows:
                row.stop()
    print(f"beam {options.beam}, {len(rows[0].outputs):,} lines, {options.cores} cores, wall time")
    show(rows, references)


if __name__ == "__main__":
    main()
