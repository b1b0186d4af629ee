"""The micro-batches of training: examples by their numbers, with the noise that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.bands import Ints
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.prepared import Prepared
from encdec_cli.data.store import Ragged
from encdec_cli.decoding.draw import streams, uniform
from encdec_cli.text.resampling import Resampler
from encdec_cli.text.vocabulary import EOS, UNK
from encdec_cli.training.guide import Links
from encdec_cli.training.risk import Judge


class Feed:
    """Reads micro-batches; their noise is a function of (`train.seed`, update, example), so nothing of it is saved.

    Other subwords make other lengths: a micro-batch may have more tokens than `train.tokens`, but no example more than
    `text.max_source` and `text.max_target`: one that would stays as it is.

    Args:
        bundle: the model that learns, its tokenizers and its recipe.
        data: the training examples.
        device: where the batches are wanted.
        alone: gives a block in which the model computes in this process alone; see `Layout`.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: Prepared,
        device: str,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        recipe = bundle.recipe
        self._alone = alone
        self._device, self._store = device, data.store("train")
        self._links = Links(bundle, data, recipe.guide.alignments) if recipe.guide.weight else None
        self._seed, self._noise = recipe.train.seed, recipe.regularize
        self._limits = bundle.longest_source, bundle.longest_target
        self._judge = Judge(bundle, recipe.risk) if recipe.risk.metric else None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, bytes], Future[Batch]] = {}
        self._resamplers: list[Resampler] = []
        if amount := self._noise.subword_sampling:
            symbols = (*bundle.task.symbols(), *recipe.data.config.symbols())
            settings = recipe.text.algorithm, amount, symbols
            self._resamplers = [Resampler(tokenizer, *settings) for tokenizer in (bundle.source, bundle.target)]

    def close(self) -> None:
        """Let the thread end that reads ahead."""
        self._reader.shutdown(cancel_futures=True)

    def expect(self, rows: Ints, update: int) -> None:
        """Read some examples that will be asked for soon, while the model computes."""
        self._ahead[update, rows.tobytes()] = self._reader.submit(self._read, rows, update)

    def __call__(self, rows: Ints, update: int) -> Batch:
        """Return some examples as the micro-batch of an update, on the model's device."""
        ahead = self._ahead.pop((update, rows.tobytes()), None)
        batch = (ahead.result() if ahead else self._read(rows, update)).to(self._device)
        if self._judge is None:
            return batch
        with self._alone():
            return self._judge(batch, self._seed_of(update))

    def _seed_of(self, update: int) -> int:
        return self._seed * 1_000_003 + update

    def _read(self, rows: Ints, update: int) -> Batch:
        seed = self._seed_of(update)
        source, target = self._store.gather(rows)
        if self._resamplers:
            randoms = [Random(f"{seed} {row}") for row in rows.tolist()]
            sides = [self._resampled(side, randoms, number) for number, side in enumerate((source, target))]
            batch = collate(sides[0], sides[1], rows.tolist())
        else:
            batch = collate(source, target, rows.tolist())
        if self._links is not None:
            batch = replace(batch, links=self._links(batch))
        batch = self._hide(batch, seed, update)
        return batch.pinned() if self._device.startswith("cuda") else batch

    def _resampled(self, side: Ragged, randoms: Sequence[Random], number: int) -> list[list[int]]:
        resampler, most = self._resamplers[number], self._limits[number]
        found: list[list[int]] = []
        end = 0
        for length, random in zip(side.lengths.tolist(), randoms, strict=True):
            ids = side.tokens[end : end + length].tolist()
            end += length
            other = resampler(ids, random)
            found.append(other if len(other) <= most else ids)
        return found

    def _hide(self, batch: Batch, seed: int, update: int) -> Batch:
        """Let the model read `<unk>` in the place of some tokens."""
        noise = self._noise
        if not (noise.word_dropout_source or noise.word_dropout_target):
            return batch
        share = min(1.0, update / noise.word_dropout_warmup) if noise.word_dropout_warmup else 1.0
        source = _hidden(batch.source, share * noise.word_dropout_source, seed, batch.rows, 0)
        target = _hidden(batch.known_target, share * noise.word_dropout_target, seed, batch.rows, 1)
        return replace(batch, source=source, seen=target)


def _hidden(ids: Tensor, probability: float, seed: int, rows: Sequence[int], side: int) -> Tensor:
    """Return ids [rows, len] with UNK for each token but the special ones with a probability."""
    chance = uniform(streams(seed, rows, ids.shape[1], ids.device), side).view(ids.shape)
    return torch.where((chance < probability) & (ids > EOS), UNK, ids)
