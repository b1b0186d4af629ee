"""Predicted and measured peak memory of training, for ten shapes, each in a process of its own.

    python -m tests.benchmarks.memory

The prediction is the one of `encdec train --dry-run`; measured is the peak of the process during three updates, after
which the optimizer's state is written as a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from encdec_cli.bundle.tensors import container
from encdec_cli.data.batch import collate
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Train
from encdec_cli.training import memory
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.rules import make_optimizer

# type, layers, width, feed-forward, heads, vocabulary, tokens, source length, target length, threads, micro-batches
SHAPES = [
    ("bf16", 4, 128, 256, 4, 4000, 1024, 20, 20, 2, 2, False),
    ("bf16", 4, 128, 256, 4, 4000, 4096, 20, 20, 1, 1, False),
    ("fp32", 4, 128, 256, 4, 4000, 1024, 20, 20, 1, 4, False),
    ("fp32", 3, 256, 1024, 4, 8000, 4096, 30, 30, 1, 1, False),
    ("bf16", 3, 256, 1024, 4, 8000, 4096, 30, 30, 2, 2, False),
    ("bf16", 3, 256, 1024, 4, 8000, 4096, 30, 30, 2, 2, True),
    ("bf16", 6, 512, 2048, 8, 8000, 2048, 60, 60, 1, 1, False),
    ("fp32", 2, 128, 512, 4, 32000, 2048, 100, 40, 1, 2, False),
    ("bf16", 2, 128, 512, 4, 1000, 4096, 40, 200, 1, 1, False),
    ("fp32", 2, 256, 512, 4, 100, 8192, 200, 100, 2, 4, False),
]


def measure(number: int) -> dict[str, int]:
    """Predict and measure one shape in this process; bytes."""
    kind, layers, dim, inner, heads, vocab, tokens, source, target, threads, accumulate, again = SHAPES[number]
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Transformer(Transformer.Config(layers, layers, dim, heads, inner, dropout=0.1), vocab, vocab)
    model.checkpointing = again
    rows = np.arange(tokens // max(source, target))
    random = torch.Generator().manual_seed(1)
    ids = [
        [torch.randint(4, vocab, (length - 1 - i % 2,), generator=random).tolist() for i in range(len(rows))]
        for length in (source, target)
    ]

    def load(wanted: np.ndarray):
        return collate([ids[0][i] for i in wanted], [ids[1][i] for i in wanted], wanted.tolist())

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    model.packs = model.can_pack(dtype, "cpu")
    optimizer = make_optimizer(model, Train(), (), dtype)
    model.to(dtype)
    gradients = Gradients(model, optimizer.parameters, CrossEntropy(0.1), accumulate)
    need = memory.Forecast(gradients, optimizer, accumulate, vocab, load, model).need(rows)
    before = memory.reset_peak()
    for update in range(3):
        for _, gradient in gradients.of([load(rows)] * accumulate, 1.0, update):
            optimizer.collect(gradient)
            del gradient
        optimizer.clip(1.0)
        optimizer.step(1e-3)
    gradients.close()
    with tempfile.TemporaryDirectory() as folder:
        container(optimizer.state()).write(Path(folder) / "state.safetensors")
    peak = memory.peak_resident()
    update = need.gradients + need.activations + need.waste
    return {"predicted": need.total - need.growth + update, "measured": peak, "growth": update, "grown": peak - before}


def in_a_process(number: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--one", str(number)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    one = parser.parse_args().one
    if one is not None:
        print(json.dumps(measure(one)))
        return
    print("| shape | predicted MiB | measured MiB | predicted / measured | growth predicted / measured |")
    print("|---|---|---|---|---|")
    for number, shape in enumerate(SHAPES):
        found = in_a_process(number)
        kind, layers, dim, _, _, vocab, tokens, source, target, threads, accumulate, again = shape
        name = f"{kind}, {layers} + {layers} layers of {dim}, vocabulary {vocab:,}, {accumulate} x {tokens:,} tokens"
        name += f" ({source} to {target}), {threads} threads" + (", checkpointing" if again else "")
        sizes = f"{found['predicted'] >> 20:,} | {found['measured'] >> 20:,}"
        ratios = f"{found['predicted'] / found['measured']:.2f} | {found['growth'] / found['grown']:.2f}"
        print(f"| {name} | {sizes} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
