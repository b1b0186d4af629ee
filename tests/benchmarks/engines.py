"""One way of decoding in a process of its own: `python -m tests.benchmarks.engines NAME …`, driven by decoding.py.

It loads the model, then answers each line `run` on stdin by one JSON object on stdout: the seconds that it took from
text to text, the outputs, and their tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.cli.models import load_bundles
from encdec_cli.data.batch import collate
from encdec_cli.decoding.beam import Beam
from encdec_cli.generation.lines import Options, generate
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import BOS, EOS, PAD, UNK

from .plain import Cached, PlainTransformer, beam_search
from .speed import plain_weights

LENGTH_PENALTY = 1.0
LONGEST = 200
"""Most tokens of an output."""
Run = Callable[[Sequence[str]], tuple[list[str], int]]
"""From lines to outputs and the number of their tokens, EOS left aside."""


def by_batches(bundle: Bundle, batch: int, search: Callable[[Tensor], list[list[int]]]) -> Run:
    """Return what decodes lines in batches of like length, the longest first. search: from padded ids to outputs."""

    @torch.inference_mode()
    def run(lines: Sequence[str]) -> tuple[list[str], int]:
        sources = [bundle.source.encode(line) for line in lines]
        order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
        outputs, tokens = [""] * len(lines), 0
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            ids = collate([sources[number] for number in numbers], None, numbers).source
            for number, written in zip(numbers, search(ids), strict=True):
                outputs[number], tokens = bundle.target.decode(written), tokens + len(written)
        return outputs, tokens

    return run


def ours(options: argparse.Namespace) -> Run:
    """Return `encdec generate`."""
    (bundle,) = load_bundles([options.model], "cpu", [], options.precision)
    torch.set_num_threads(options.cores)
    strategy = Beam(beam=options.beam, length_penalty=LENGTH_PENALTY, max_length=LONGEST)
    settings = Options(strategy, batch=options.batch, workers=options.cores)
    given: list[Sequence[str]] = []
    # One long search, as of one long file: the workers stay, like the threads of the other engines.
    windows = iter(lambda: [Example(line) for line in given.pop()], None)
    found = generate([bundle], windows, settings)

    def run(lines: Sequence[str]) -> tuple[list[str], int]:
        given.append(lines)
        results = list(itertools.islice(found, len(lines)))
        tokens = sum(len(result.candidates[0].token_scores) - 1 for result in results if result.candidates)
        return [result.candidates[0].text if result.candidates else "" for result in results], tokens

    return run


def ctranslate2_engine(options: argparse.Namespace) -> Run:
    """Return CTranslate2 on an export of the model; `--threads` is inter x intra."""
    import ctranslate2

    bundle = Bundle.load(options.model)
    inter, intra = map(int, options.threads.split("x"))
    translator = ctranslate2.Translator(
        str(options.export), compute_type=options.precision, inter_threads=inter, intra_threads=intra
    )
    source, target = bundle.source, bundle.target

    def run(lines: Sequence[str]) -> tuple[list[str], int]:
        pieces = [[source.vocabulary.token(id) for id in source.encode(line)] for line in lines]
        results = translator.translate_batch(
            pieces,
            beam_size=options.beam,
            length_penalty=LENGTH_PENALTY,
            max_input_length=0,
            max_decoding_length=LONGEST,
            return_end_token=True,
            disable_unk=True,
            suppress_sequences=[["<pad>"], ["<s>"]],
            max_batch_size=options.batch,
        )
        ids = [[target.vocabulary.id(t) for t in result.hypotheses[0] if t != "</s>"] for result in results]
        return [target.decode(one) for one in ids], sum(map(len, ids))

    return run


def huggingface_engine(options: argparse.Namespace) -> Run:
    """Return Hugging Face `generate` on the same weights."""
    from transformers import GenerationConfig

    from .huggingface import to_huggingface

    torch.set_num_threads(options.cores)
    bundle = Bundle.load(options.model)
    model: Any = to_huggingface(bundle)
    settings = GenerationConfig(
        num_beams=options.beam,
        length_penalty=LENGTH_PENALTY,
        early_stopping=True,
        max_new_tokens=LONGEST,
        suppress_tokens=[PAD, UNK, BOS],
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )

    def search(ids: Tensor) -> list[list[int]]:
        found = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), generation_config=settings)
        return [[id for id in row if id not in (PAD, BOS, EOS)] for row in found.tolist()]

    return by_batches(bundle, options.batch, search)


def plain_engine(options: argparse.Namespace) -> Run:
    """Return beam search with a concatenated cache over `nn.Transformer`."""
    torch.set_num_threads(options.cores)
    bundle = Bundle.load(options.model)
    config: Any = bundle.model.config
    sizes = (config.encoder_layers, config.d_model, config.heads, config.feed_forward, 0.0)
    model = PlainTransformer(len(bundle.target.vocabulary), *sizes)
    model.load_state_dict(model.state_dict() | plain_weights(bundle.model.state_dict()))
    model.eval()

    def search(ids: Tensor) -> list[list[int]]:
        maximum = [LONGEST] * len(ids)
        return beam_search(Cached(model, ids, options.beam), len(ids), options.beam, maximum)

    return by_batches(bundle, options.batch, search)


ENGINES = {"ours": ours, "ctranslate2": ctranslate2_engine, "huggingface": huggingface_engine, "plain": plain_engine}


def main() -> None:
    """Load, then decode all lines for every line `run`."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engines", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--export", type=Path, help="folder for CTranslate2")
    parser.add_argument("--lines", type=Path, required=True, help="file of sources")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--threads", default="2x1", help="of CTranslate2: inter x intra")
    options = parser.parse_args()
    lines = options.lines.read_text(encoding="utf-8").split("\n")[:-1]
    run = ENGINES[options.engine](options)
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        outputs, tokens = run(lines)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "outputs": outputs, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
