"""One way of training in a process of its own, driven by training.py.

It answers each line `run` on stdin, after one epoch over the same pairs, by one JSON object on stdout: wall seconds,
CPU-seconds of all its threads, real target tokens (EOS counted), updates, and MiB of memory at its peak. Each
tool makes, shuffles and pads its batches itself, in the time that is measured.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encdec_cli.allocator import keep_freed
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.sampler import Sampler
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import BOS, EOS, PAD, UNK
from encdec_cli.training.adam import Adam
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.memory import peak_resident, reset_peak
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import choose

from .huggingface import arguments
from .plain import PlainTrainer
from .speed import SIZES, Pairs, our_model, plain_model, prepared, synthetic

RATE, BETAS, SMOOTHING, DROPOUT, CLIP = 1e-4, (0.9, 0.98), 0.1, 0.1, 1.0


class Clock:
    """Wall and CPU seconds between `start` and `stop`."""

    def start(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]


Epoch = Callable[[Clock], tuple[int, tuple[float, float]]]
"""Trains on all pairs once; returns the number of updates, and what the clock said that it started and stopped."""


def micro_batches(pairs: Pairs, tokens: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches of an epoch as `encdec train` makes them: of like length, at most `tokens` tokens a side."""
    lengths = [np.array([len(x) for x in side]) for side in (pairs.sources, pairs.targets)]
    for rows in Sampler(lengths[0], lengths[1], tokens, "benchmark", 1).batches(epoch):
        yield collate([pairs.sources[i] for i in rows], [pairs.targets[i] for i in rows], rows.tolist())


def encdec(pairs: Pairs, options: argparse.Namespace) -> Epoch:
    """Return the parts of `encdec train` that an update goes through; `--accumulate` micro-batches an update."""
    keep_freed()
    model = our_model(pairs.vocab, options.size)
    optimizer, update = our_update(model, options.precision, options.accumulate)
    gc.freeze()

    def epoch(clock: Clock) -> tuple[int, tuple[float, float]]:
        before = optimizer.updates
        clock.start()
        waiting: list[Batch] = []
        for batch in micro_batches(pairs, options.tokens // options.accumulate, optimizer.updates):
            waiting.append(batch)
            if len(waiting) == options.accumulate:
                update(waiting)
                waiting = []
        if waiting:
            update(waiting)
        return optimizer.updates - before, clock.stop()

    return epoch


def our_update(model: Transformer, precision: str, most: int) -> tuple[Optimizer, Callable[[list[Batch]], None]]:
    """Return the optimizer of a model, and what `encdec train` does of an update of at most so many micro-batches."""
    optimizer = Optimizer([(Adam(decoupled=False, betas=BETAS), model.named_parameters())])
    device = optimizer.parameters[0].device
    chosen = choose(precision, device)
    model.packs = model.can_pack(chosen.dtype, device.type)
    chosen.apply(model)
    gradients = Gradients(model, optimizer.parameters, CrossEntropy(SMOOTHING), most)

    def update(parts: list[Batch]) -> None:
        tokens = sum(int(part.target_lengths.sum()) for part in parts)
        for _, gradient in gradients.of(parts, 1 / tokens, seed=optimizer.updates):
            optimizer.collect(gradient)
        optimizer.clip(CLIP)
        optimizer.step(RATE)

    return optimizer, update


def plain(pairs: Pairs, options: argparse.Namespace) -> Epoch:
    """Return a loop over `nn.Transformer`.

    Its batches are those of the tutorials, a fixed number of sentences from a shuffled `DataLoader`, or with
    `--batches sorted` ours, as only a careful user would make them.
    """
    model = plain_model(pairs.vocab, options.size)
    trainer = PlainTrainer(model, options.precision == "bf16")
    numbers = itertools.count()
    rows = [
        (torch.from_numpy(np.append(source, EOS)), torch.from_numpy(np.r_[BOS, target, EOS]))
        for source, target in zip(pairs.sources, pairs.targets, strict=True)
    ]

    def padded(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        sides = zip(*examples, strict=True)
        return tuple(nn.utils.rnn.pad_sequence(list(side), batch_first=True, padding_value=PAD) for side in sides)

    shuffled = torch.utils.data.DataLoader(rows, options.sentences, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]

    def epoch(clock: Clock) -> tuple[int, tuple[float, float]]:
        clock.start()
        batches: Any = shuffled
        if options.batches == "sorted":
            ours = micro_batches(pairs, options.tokens, next(numbers))
            batches = ((batch.source, batch.known_target) for batch in ours)
        updates = 0
        for source, target in batches:
            trainer.update(source.long(), target.long())
            updates += 1
        return updates, clock.stop()

    return epoch


def transformers(pairs: Pairs, options: argparse.Namespace) -> Epoch:
    """Return Hugging Face's `Seq2SeqTrainer` with a Marian model, batches grouped by length."""
    import transformers as hf
    from tokenizers import Tokenizer, models

    words = {"<pad>": PAD, "<unk>": UNK, "<s>": BOS, "</s>": EOS}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), pad_token="<pad>", eos_token="</s>"
    )
    model = hf.MarianMTModel(hf.MarianConfig(**arguments(pairs.vocab, *SIZES[options.size]), dropout=DROPOUT))
    examples = [
        {"input_ids": [*map(int, source), EOS], "labels": [*map(int, target), EOS], "length": len(source) + 1}
        for source, target in zip(pairs.sources, pairs.targets, strict=True)
    ]
    settings = hf.Seq2SeqTrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=options.precision == "bf16",
        num_train_epochs=1,
        per_device_train_batch_size=options.sentences,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=True,
        learning_rate=RATE,
        adam_beta2=BETAS[1],
        label_smoothing_factor=SMOOTHING,
        max_grad_norm=CLIP,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Timed(hf.TrainerCallback):
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = self.clock.stop()

    def epoch(clock: Clock) -> tuple[int, tuple[float, float]]:
        timed = Timed(clock)
        collator = hf.DataCollatorForSeq2Seq(tokenizer, model=model)
        trainer = hf.Seq2SeqTrainer(model, settings, collator, train_dataset=examples, callbacks=[timed])
        trainer.train()
        return trainer.state.global_step, timed.seconds

    return epoch


def joeynmt(pairs: Pairs, options: argparse.Namespace) -> Epoch:
    """Return JoeyNMT's `TrainManager`, which has no half precision on a CPU; its batches are of a fixed size."""
    from joeynmt import training

    folder = Path(tempfile.mkdtemp())
    for name, count in (("train", None), ("dev", 2)):
        for language, side in (("xx", pairs.sources), ("yy", pairs.targets)):
            lines = (" ".join(f"t{id}" for id in ids) + "\n" for ids in side[:count])
            (folder / f"{name}.{language}").write_text("".join(lines))
    words = ["<unk>", "<pad>", "<s>", "</s>", *(f"t{id}" for id in range(4, pairs.vocab))]
    (folder / "words").write_text("\n".join(words) + "\n")

    def epoch(clock: Clock) -> tuple[int, tuple[float, float]]:
        found: dict[str, Any] = {}

        class Timed(training.TrainManager):  # type: ignore[misc]
            def _train_step(self, batch: Any) -> Any:
                if not found:
                    found["begun"] = clock.start()
                return super()._train_step(batch)

            def _save_checkpoint(self, *_: Any) -> None:  # the first thing after the last update
                found.update(seconds=clock.stop(), updates=self.stats.steps)

        training.TrainManager, before = Timed, training.TrainManager
        try:
            training.train(0, 1, joeynmt_config(folder, options), skip_test=True)
        finally:
            training.TrainManager = before
        return found["updates"], found["seconds"]

    return epoch


def joeynmt_config(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a user would write as YAML."""
    layers, dim, heads, inner = SIZES[options.size]
    stack = {
        "type": "transformer",
        "num_layers": layers,
        "num_heads": heads,
        "embeddings": {"embedding_dim": dim, "scale": True, "dropout": DROPOUT},
        "hidden_size": dim,
        "ff_size": inner,
        "dropout": DROPOUT,
        "layer_norm": "pre",
    }
    side = {"level": "word", "voc_file": str(folder / "words"), "max_length": 1000}
    (folder / "run").mkdir(exist_ok=True)
    return {
        "name": "benchmark",
        "model_dir": str(folder / "run"),
        "use_cuda": False,
        "normalization": "tokens",
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "dev"),
            "dataset_type": "plain",
            "src": {"lang": "xx", **side},
            "trg": {"lang": "yy", **side},
        },
        "training": {
            "optimizer": "adam",
            "adam_betas": BETAS,
            "learning_rate": RATE,
            "learning_rate_min": 1e-9,
            "scheduling": "exponential",  # its default, plateau, is given an argument that torch has dropped
            "clip_grad_norm": CLIP,
            "label_smoothing": SMOOTHING,
            "normalization": "tokens",
            "batch_type": "sentence",
            "batch_size": options.sentences,
            "epochs": 1,
            "validation_freq": 1_000_000,
            "logging_freq": 100,
            "overwrite": True,
        },
        "testing": {"eval_metrics": [], "beam_size": 1},
        "model": {"tied_embeddings": True, "tied_softmax": True, "encoder": stack, "decoder": dict(stack)},
    }


ENGINES = {"encdec": encdec, "plain": plain, "transformers": transformers, "joeynmt": joeynmt}


def pairs_of(options: argparse.Namespace) -> Pairs:
    """Return the pairs to train on: some of the prepared data, as they come, or synthetic ones."""
    pairs = prepared(options.data) if options.data else synthetic(options.pairs, options.vocabulary)
    return Pairs(pairs.sources[: options.pairs], pairs.targets[: options.pairs], pairs.vocab)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this program and the one that drives it have in common."""
    parser.add_argument("--data", type=Path, help="data folder that `encdec preprocess` made; default: synthetic pairs")
    parser.add_argument("--vocabulary", type=int, default=8000, help="of synthetic pairs")
    parser.add_argument("--pairs", type=int, default=2000, help="of one epoch")
    parser.add_argument("--tokens", type=int, default=4096, help="of an update of ours, padding included")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))


def main() -> None:
    """Prepare, then train an epoch for every line `run`."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training_engines", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--size", choices=SIZES, default="small")
    add_options(parser)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of an update of ours")
    parser.add_argument("--sentences", type=int, default=128, help="of a batch of the others")
    parser.add_argument("--batches", choices=["shuffled", "sorted"], default="shuffled", help="of nn.Transformer")
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    torch.manual_seed(1)
    pairs = pairs_of(options)
    tokens = sum(len(target) + 1 for target in pairs.targets)
    with redirect_stdout(sys.stderr):
        epoch = ENGINES[options.engine](pairs, options)
    print("ready", flush=True)
    for _ in sys.stdin:
        with redirect_stdout(sys.stderr):
            updates, (wall, cpu) = epoch(Clock())
        peak = peak_resident() / 2**20
        answer = {"wall": wall, "cpu": cpu, "tokens": tokens, "updates": updates, "memory": peak}
        gc.collect()
        reset_peak()  # gives back what is free, since all the others wait with theirs
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
