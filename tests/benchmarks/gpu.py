"""Speed of training on a GPU against others: `python -m tests.benchmarks.gpu`.

Transformer-big (6 + 6 layers, width 1024, 16 heads, feed-forward 4096, vocabulary 32,000), bf16, synthetic pairs as
long as news sentences, at most 25,000 tokens a side and update, sorted into batches of like length. Every variant
computes the same batches in turn, repetition after repetition; a table gives target tokens a second, the share of the
measured ceiling of bf16 matrix products, the most memory, and the ratio of ours to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch
from encdec_cli.training import flops
from encdec_cli.training.ceiling import matrix_ceiling
from encdec_cli.training.objective import CrossEntropy

from .huggingface import arguments
from .plain import PAD, PlainTrainer
from .speed import DROPOUT, SIZES, our_model, plain_model, synthetic
from .training_engines import SMOOTHING, micro_batches, our_update

DEVICE = torch.device("cuda")


@dataclass
class Variant:
    """One row of the table."""

    name: str
    update: Callable[[Batch], object]
    """Learns from one batch."""


def batches_of(tokens: int, count: int, vocab: int) -> list[Batch]:
    """Draw pairs of random ids, 27 +- 14 tokens, and return `count` batches of them on the GPU."""
    pairs = synthetic(200 * count * tokens // 5000, vocab, 27, 14, 100)
    return [batch.to(DEVICE) for batch in islice(micro_batches(pairs, tokens, 0), count)]


def ours(name: str, size: str, vocab: int, compile_: bool) -> Variant:
    """Return our training, in bf16."""
    model = our_model(vocab, size).to(DEVICE)
    if compile_:
        model.compile_layers()
    _, update = our_update(model, "bf16", 1)
    return Variant(name, lambda batch: update([batch]))


def plain(name: str, model: nn.Module) -> Variant:
    """Return the plain loop round a model, with autocast."""
    trainer = PlainTrainer(model.to(DEVICE), autocast=True)
    return Variant(name, lambda batch: trainer.update(batch.source, batch.known_target))


def transformer_loop(name: str, size: str, vocab: int, compile_: bool) -> Variant:
    """Return the plain loop round `nn.Transformer`."""
    model = plain_model(vocab, size)
    model.drop_only_after_sublayers()
    call: Any = torch.compile(model, dynamic=True) if compile_ else model
    return plain(name, call)


def marian_loop(name: str, size: str, vocab: int) -> Variant:
    """Return the plain loop round the Marian model of `transformers`."""
    from transformers import MarianConfig, MarianMTModel

    class Marian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rates = {"dropout": DROPOUT, "attention_dropout": 0.0, "activation_dropout": 0.0}
            self.model: Any = MarianMTModel(MarianConfig(**arguments(vocab, *SIZES[size]), **rates))

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            found: Tensor = self.model(
                input_ids=source,
                attention_mask=(source != PAD).long(),
                decoder_input_ids=target,
                decoder_attention_mask=(target != PAD).long(),
                use_cache=False,
            ).logits
            return found

    return plain(name, Marian())


def measure(variants: Sequence[Variant], batches: Sequence[Batch], repetitions: int) -> dict[str, list[float]]:
    """Return target tokens a second of every repetition; two go before, unmeasured. Prints the memory of each."""
    tokens = sum(int(batch.target_lengths.sum()) for batch in batches)
    speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for repetition in range(-2, repetitions):
        for variant in variants:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, begin = torch.cuda.memory_allocated(), time.perf_counter()
            for batch in batches:
                variant.update(batch)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if repetition == -2:
                print(f"{variant.name}: first round {seconds:.1f} s", flush=True)
            if repetition == 0:
                most = (torch.cuda.max_memory_allocated() - before) / 2**20
                print(f"{variant.name}: {most:,.0f} MiB beside weights and state", flush=True)
            if repetition >= 0:
                speeds[variant.name].append(tokens / seconds)
    return speeds


def total_flops(size: str, vocab: int, batches: Sequence[Batch]) -> int:
    """Return the FLOPs of loss and gradient of all batches."""
    formula = flops.find(our_model(vocab, size).to(DEVICE), CrossEntropy(SMOOTHING), (vocab, vocab), str(DEVICE))
    return sum(formula.flops_of(*flops.lengths(batch)) for batch in batches)


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="big")
    parser.add_argument("--tokens", type=int, default=25_000, help="of a batch and side, padding included")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None, help="variants whose names hold one of these words")
    options = parser.parse_args()
    size, vocab = options.size, options.vocabulary
    makers: dict[str, Callable[[str], Variant]] = {
        "encdec, compiled": lambda name: ours(name, size, vocab, True),
        "encdec": lambda name: ours(name, size, vocab, False),
        "nn.Transformer, autocast": lambda name: transformer_loop(name, size, vocab, False),
        "nn.Transformer, compiled": lambda name: transformer_loop(name, size, vocab, True),
        "transformers' Marian, autocast": lambda name: marian_loop(name, size, vocab),
    }
    batches = batches_of(options.tokens, options.batches, vocab)
    work = total_flops(size, vocab, batches)
    chosen = [n for n in makers if not options.only or any(word in n for word in options.only)]
    speeds = measure([makers[name](name) for name in chosen], batches, options.repetitions)
    ceiling = matrix_ceiling(torch.bfloat16, DEVICE)
    tokens = sum(int(batch.target_lengths.sum()) for batch in batches)
    best = statistics.median(speeds[chosen[0]])
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}, bf16 ceiling {ceiling / 1e12:.0f} TFLOP/s"
    )
    print(f"{'':36} {'tokens/s':>9}   min - max             of ceiling   {chosen[0]} / it")
    for name in chosen:
        values, median = speeds[name], statistics.median(speeds[name])
        spread = f"{min(values):,.0f} - {max(values):,.0f}"
        print(
            f"{name:36} {median:9,.0f}   {spread:20} {work / tokens * median / ceiling:8.1%}     {best / median:6.2f}"
        )


if __name__ == "__main__":
    main()
