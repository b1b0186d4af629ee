"""Speed of beam search against plain PyTorch: `python -m tests.benchmarks.speed`; of training: see training.py.

All variants see the same batches in turn, repetition after repetition, in one process; the table gives medians, the
spread, and the ratio of our speed to that of each plain variant. On a machine that others use too, `--threads 1
--cpu-time` gives the steadier figures. Prepared data (`--data`, a folder that
`encdec preprocess` made) gives real lengths; else they are drawn like those of short sentences (13 +- 5 tokens).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encdec_cli.data.batch import collate
from encdec_cli.data.store import Store
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.models.packed import pack
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.precision import choose

from .plain import Cached, PlainTransformer, Uncached, beam_search

SIZES = {"small": (3, 256, 4, 1024), "base": (6, 512, 8, 2048), "big": (6, 1024, 16, 4096)}
"""Layers a side, width, heads and inner width."""
DROPOUT = 0.1


@dataclass
class Pairs:
    """Sources [src_len] and targets [tgt_len] of ids, and the size of their vocabulary."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    vocab: int


@dataclass
class Variant:
    """One row of the table."""

    name: str
    run: Callable[[], int]
    """Does the whole work once and returns its size, in tokens or sentences."""
    ours: bool = False


def synthetic(examples: int, vocab: int, mean: int = 13, deviation: int = 5, longest: int = 40) -> Pairs:
    """Draw pairs of random ids, longer with longer; unless told otherwise as long as short sentences."""
    random = np.random.default_rng(1)
    lengths = random.normal(mean, deviation, examples).round().clip(3, longest).astype(int)
    others = (lengths + random.normal(0, 2, examples)).round().clip(3, longest).astype(int)

    def ids(length: int) -> np.ndarray:
        return random.integers(4, vocab, length)

    return Pairs([ids(n) for n in others], [ids(n) for n in lengths], vocab)


def prepared(folder: Path) -> Pairs:
    """Read the training split of a folder that `encdec preprocess` made with a shared vocabulary."""
    store = Store.open(folder, "train")
    if store.sides is None:
        raise SystemExit(f"{folder}: no training examples; give the folder that `encdec preprocess` made.")
    count = min(len(store), 50_000)
    vocab = max(side.size for side in store.sides)
    sources, targets = (np.split(side.tokens, side.lengths.cumsum()[:-1]) for side in store.gather(range(count)))
    return Pairs(sources, targets, vocab)


def our_model(vocab: int, size: str = "small") -> Transformer:
    """Build our model with the sizes of the benchmark; the same weights every time."""
    torch.manual_seed(1)
    layers, dim, heads, inner = SIZES[size]
    return Transformer(Transformer.Config(layers, layers, dim, heads, inner, DROPOUT), vocab, vocab)


def plain_model(vocab: int, size: str = "small") -> PlainTransformer:
    """Build the plain model with the weights of `our_model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.Transformer speaks of nested tensors
        plain = PlainTransformer(vocab, *SIZES[size], DROPOUT)
    plain.load_state_dict(plain.state_dict() | plain_weights(our_model(vocab, size).state_dict()))
    return plain


def plain_weights(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names of the plain model."""
    plain = {"embedding.weight": ours["target_embedding.weight"]}
    names = {"joined": "in_proj_", "output": "out_proj.", "inner": "linear1.", "outer": "linear2."}
    norms = {"attention_residual": 1, "cross_residual": 2, "feed_forward_residual": 3}
    for name, tensor in ours.items():
        stack, *rest = name.split(".")
        if stack in ("encoder_norm", "decoder_norm"):
            plain[f"transformer.{stack[:7]}.norm.{rest[-1]}"] = tensor
        if stack not in ("encoder", "decoder"):
            continue
        number, part, *inner, kind = rest
        layer = f"transformer.{stack}.layers.{number}"
        if part in norms:
            place = 2 if (stack, part) == ("encoder", "feed_forward_residual") else norms[part]
            plain[f"{layer}.norm{place}.{kind}"] = tensor
        elif part == "feed_forward":
            plain[f"{layer}.{names[inner[0]]}{kind}"] = tensor
        elif inner[0] == "query":
            joined = ours[name.replace("query", "joined")]
            plain[f"{layer}.multihead_attn.in_proj_{kind}"] = torch.cat((tensor, joined))
        elif part == "attention" or inner[0] == "output":
            module = "self_attn" if part == "attention" else "multihead_attn"
            plain[f"{layer}.{module}.{names[inner[0]]}{kind}"] = tensor
    return plain


def generation_variants(pairs: Pairs, sentences: int, batch: int, beam: int) -> tuple[list[Variant], dict[str, list]]:
    """Return every way of beam search, and the outputs that each leaves behind.

    The weights are random, so an output is as long as it may be: as long as its target.
    """
    chosen = sorted(range(len(pairs.sources))[:sentences], key=lambda i: (len(pairs.targets[i]), len(pairs.sources[i])))
    parts = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    sources = [collate([pairs.sources[i] for i in part], None, part).source for part in parts]
    maxima = [[len(pairs.targets[i]) for i in part] for part in parts]
    outputs: dict[str, list] = {}

    def ours(name: str, precision: str) -> Variant:
        model = our_model(pairs.vocab).eval()
        choose(precision, "cpu").apply(model)
        pack(model)  # as `encdec generate` does
        search = Beam(beam=beam, length_penalty=1.0)

        def run() -> int:
            outputs[name] = []
            for source, maximum in zip(sources, maxima, strict=True):
                limits = Limits(torch.zeros(len(maximum), dtype=torch.int64), torch.tensor(maximum))
                found = search(Stepper([model], source, source != 0, beam), limits, [])
                outputs[name] += [hypotheses[0].tokens for hypotheses in found]
            return sentences

        return Variant(name, run, ours=True)

    def plain(name: str, decoder: type[Cached] | type[Uncached]) -> Variant:
        model = plain_model(pairs.vocab).eval()

        @torch.no_grad()
        def run() -> int:
            outputs[name] = []
            for source, maximum in zip(sources, maxima, strict=True):
                outputs[name] += beam_search(decoder(model, source, beam), len(maximum), beam, maximum)
            return sentences

        return Variant(name, run)

    return [
        ours("ours, auto", "auto"),
        ours("ours, fp32", "fp32"),
        plain("textbook cache, fp32", Cached),
        plain("no cache, fp32", Uncached),
    ], outputs


def measure(variants: Sequence[Variant], repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return units per second of every repetition, by variant; one repetition more goes before, unmeasured."""
    speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for repetition in range(repetitions + 1):
        for variant in variants:
            begin = clock()
            size = variant.run()
            if repetition:
                speeds[variant.name].append(size / (clock() - begin))
    return speeds


def show(title: str, unit: str, variants: Sequence[Variant], speeds: dict[str, list[float]]) -> None:
    """Print one table: a row a variant, and how many times faster each of ours is."""
    ours = [variant.name for variant in variants if variant.ours]
    width = max(len(variant.name) for variant in variants)
    print(f"\n{title}\n{'':{width}}  {unit:>9}   min - max   " + "   ".join(f"{name} / it" for name in ours))
    for variant in variants:
        values = speeds[variant.name]
        median = statistics.median(values)
        ratios = (f"{statistics.median(speeds[name]) / median:{len(name) + 5}.2f}" for name in ours)
        spread = f"{min(values):.4g} - {max(values):.4g}"
        print(f"{variant.name:{width}}  {median:9.4g}   {spread}   " + "   ".join(ratios))


def equal_outputs(outputs: dict[str, list]) -> str:
    """Return how many outputs of each variant are those of the first plain one, as one line."""
    reference = outputs["textbook cache, fp32"]
    shares = (f"{name} {sum(a == b for a, b in zip(o, reference, strict=True))}" for name, o in outputs.items())
    return f"outputs equal to the textbook cache's, of {len(reference)}: " + "; ".join(shares)


def main() -> None:
    """Search with every variant in turn and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.speed", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder made by `encdec preprocess`; default: synthetic pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of all threads in place of wall time")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=8000, help="of synthetic pairs")
    parser.add_argument("--sentences", type=int, default=64, help="to generate in one repetition")
    parser.add_argument("--batch", type=int, default=64, help="sentences decoded together")
    parser.add_argument("--beam", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = prepared(options.data) if options.data else synthetic(10_000, options.vocabulary)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(
        f"torch {torch.__version__}, {options.threads} threads, {'CPU' if options.cpu_time else 'wall'} time, "
        f"vocabulary {pairs.vocab}; auto is {choose('auto', 'cpu').name}"
    )
    variants, outputs = generation_variants(pairs, options.sentences, options.batch, options.beam)
    show(f"beam {options.beam}", "sent/s", variants, measure(variants, options.repetitions, clock))
    print(equal_outputs(outputs))


if __name__ == "__main__":
    main()
