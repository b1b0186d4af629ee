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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.sampler import Sampler
from encdec_cli.models.transformer import Transformer
from encdec_cli.training import flops
from encdec_cli.training.adam import Adam
from encdec_cli.training.ceiling import matrix_ceiling
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import choose

from .plain import PAD, PlainTransformer

DEVICE = torch.device("cuda")
SIZES = {"big": (6, 1024, 16, 4096), "base": (6, 512, 8, 2048), "small": (3, 256, 4, 1024)}
DROPOUT = 0.1


@dataclass
class Variant:
    """One row of the table."""

    name: str
    update: Callable[[Batch], object]
    """Learns from one batch."""


def batches_of(tokens: int, count: int, vocab: int) -> list[Batch]:
    """Draw pairs of random ids, 27 +- 14 tokens, and return `count` batches of them on the GPU."""
    random = np.random.default_rng(1)
    lengths = random.normal(27, 14, 200 * count * tokens // 5000).round().clip(3, 100).astype(int)
    others = (lengths + random.normal(0, 3, len(lengths))).round().clip(3, 100).astype(int)
    batches = []
    for rows in Sampler(others, lengths, tokens, "benchmark", 1).batches(0)[:count]:
        sides = ([random.integers(4, vocab, side[i]) for i in rows] for side in (others, lengths))
        batches.append(collate(*sides, rows.tolist()).to(DEVICE))
    return batches


def our_model(size: str, vocab: int) -> Transformer:
    """Build our model; the same weights every time."""
    layers, dim, heads, inner = SIZES[size]
    torch.manual_seed(1)
    sizes = {"encoder_layers": layers, "decoder_layers": layers, "d_model": dim, "heads": heads, "feed_forward": inner}
    return Transformer(Transformer.Config(**sizes, dropout=DROPOUT), vocab, vocab).to(DEVICE)


def ours(name: str, size: str, vocab: int, compile_: bool) -> Variant:
    """Return our training: the parts of one update as `encdec train` puts them together."""
    model = our_model(size, vocab).train()
    optimizer = Optimizer([(Adam(decoupled=False), model.named_parameters())])
    choose("bf16", DEVICE).apply(model)
    if compile_:
        model.compile_layers()
    gradients = Gradients(model, optimizer.parameters, CrossEntropy(0.1), 1)

    def update(batch: Batch) -> None:
        tokens = int(batch.target_lengths.sum())
        for _, gradient in gradients.of([batch], 1 / tokens, seed=1):
            optimizer.collect(gradient)
        optimizer.clip(1.0)
        optimizer.step(1e-4)

    return Variant(name, update)


def plain(name: str, model: nn.Module, logits: Callable[[Batch], Tensor]) -> Variant:
    """Return a loop as a user writes it: autocast, whole logits, `nn.CrossEntropyLoss`, fused Adam."""
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=PAD)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True)

    def update(batch: Batch) -> float:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(logits(batch).flatten(0, 1), batch.known_target[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return Variant(name, update)


def transformer_loop(name: str, size: str, vocab: int, compile_: bool) -> Variant:
    """Return the plain loop round `nn.Transformer`."""
    layers, dim, heads, inner = SIZES[size]
    model: Any = PlainTransformer(vocab, layers, dim, heads, inner, DROPOUT).to(DEVICE).train()
    model.drop_only_after_sublayers()
    call = torch.compile(model, dynamic=True) if compile_ else model
    return plain(name, model, lambda batch: call(batch.source, batch.known_target[:, :-1]))


def marian_loop(name: str, size: str, vocab: int) -> Variant:
    """Return the plain loop round the Marian model of `transformers`."""
    from transformers import MarianConfig, MarianMTModel

    layers, dim, heads, inner = SIZES[size]
    one = {"layers": layers, "attention_heads": heads, "ffn_dim": inner}
    shape = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in one.items()}
    ids = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    rates = {"dropout": DROPOUT, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = MarianConfig(vocab_size=vocab, d_model=dim, scale_embedding=True, **shape, **ids, **rates)
    model: Any = MarianMTModel(config).to(DEVICE).train()

    def logits(batch: Batch) -> Tensor:
        target = batch.known_target[:, :-1]
        found: Tensor = model(
            input_ids=batch.source,
            attention_mask=batch.source_mask.long(),
            decoder_input_ids=target,
            decoder_attention_mask=(target != PAD).long(),
            use_cache=False,
        ).logits
        return found

    return plain(name, model, logits)


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
    formula = flops.find(our_model(size, vocab), 0.1, (vocab, vocab), str(DEVICE))
    shapes = [
        (*batch.source.shape, batch.known_target.shape[1] - 1, int(batch.target_lengths.sum())) for batch in batches
    ]
    return sum(formula.flops_of(*shape) for shape in shapes)


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
