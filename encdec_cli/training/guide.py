"""Guided alignment: a head of the attention to the source learns to look where a word comes from.

Chen et al. 2016 (https://arxiv.org/abs/1607.01628), for the Transformer Garg et al. 2019
(https://arxiv.org/abs/1909.02074).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch
from encdec_cli.data.prepared import Prepared
from encdec_cli.decoding.attention import Head, heads
from encdec_cli.errors import DataError, UsageError
from encdec_cli.generation.alignment import word_numbers
from encdec_cli.generation.model1 import posteriors
from encdec_cli.models.model import Model
from encdec_cli.recipe import Guide
from encdec_cli.text.lines import read_lines

CELLS = 10_000_000
"""Most pairs of a source and a target word that IBM Model 1 is run on: some 80 bytes of memory each."""
_LINK = re.compile(r"(\d+)-(\d+)", re.ASCII)
_TINY = 1e-9

Pairs = list[tuple[int, int]]
"""Source word and target word, from 0, that belong together."""
Words = list[tuple[list[str], list[str]]]
"""The words of source and target of each example."""


class Links:
    """Which tokens of the training examples belong together, from links of their words.

    Words are what white space separates in the text of an example; the task's symbols in the source are none.

    Args:
        bundle: whose tokenizers cut the words.
        data: the training examples.
        path: a file in Pharaoh's format, `i-j` pairs, a line for each training example; empty: IBM Model 1 is run on
            the training examples themselves. Raises DataError, or UsageError where either cannot be done.
    """

    def __init__(self, bundle: Bundle, data: Prepared, path: str) -> None:
        self._source, self._target = bundle.source, bundle.target
        self._symbols = bundle.task.symbols()
        store = data.store("train")
        words: Words = []
        for row in range(len(store)):
            source, target = (side.tokens.tolist() for side in store.gather([row]))
            read = [word for word in self._source.decode(source).split() if word not in self._symbols]
            words.append((read, self._target.decode(target).split()))
        self._pairs = _from_file(Path(path), words, data) if path else _from_model1(words)

    def __call__(self, batch: Batch) -> Tensor:
        """Return where each target token comes from, [rows, tgt_len - 1, src_len] fp32; a row sums to 1 or is zero."""
        target = batch.known_target
        links = np.zeros((len(target), target.shape[1] - 1, batch.source.shape[1]), np.float32)
        lengths = zip(batch.source_mask.sum(1).tolist(), batch.target_lengths.tolist(), strict=True)
        for place, (row, (read, written)) in enumerate(zip(batch.rows, lengths, strict=True)):
            first = word_numbers(self._source, batch.source[place, : read - 1].tolist(), self._symbols)
            second = word_numbers(self._target, target[place, 1:written].tolist())
            known = set(self._pairs[row])
            links[place, : written - 1, : read - 1] = [[(i, j) in known for i in first] for j in second]
        found = torch.from_numpy(links)
        return found / found.sum(-1, keepdim=True).clamp(min=1)


def _from_file(path: Path, words: Words, data: Prepared) -> list[Pairs]:
    facts = data.facts["splits"]["train"]
    changed = facts["read"] - facts["kept"] + facts["truncated"]
    if changed:
        raise DataError(
            f"guide.alignments: {path} has a line for each training example, but {changed} of {facts['read']} were "
            "left out or cut as blank or too long; take them out of the training files and align those."
        )
    lines = list(read_lines(path))
    if len(lines) != len(words):
        raise DataError(
            f"{path}: {len(lines)} lines for {len(words)} training examples; expected one for each, and rows with an "
            "empty side are none."
        )
    return [
        _read(line, pair, f"{path}:{number}") for number, (line, pair) in enumerate(zip(lines, words, strict=True), 1)
    ]


def _read(line: str, pair: tuple[list[str], list[str]], where: str) -> Pairs:
    """Return the links of one line. Raises DataError naming `where` if they are no links of these words."""
    found = [_LINK.fullmatch(word) for word in line.split()]
    pairs = [(int(link[1]), int(link[2])) for link in found if link]
    if len(pairs) < len(found):
        raise DataError(f"{where}: expected links such as 0-0 1-2, found {line[:40]!r}.")
    source, target = map(len, pair)
    if any(i >= source or j >= target for i, j in pairs):
        raise DataError(
            f"{where}: a link beyond the {source} and {target} words between spaces of this example; align the very "
            "text that is trained on."
        )
    return pairs


def _from_model1(words: Words) -> list[Pairs]:
    cells = sum(len(source) * len(target) for source, target in words)
    if cells > CELLS:
        raise UsageError(
            f"guide.alignments: IBM Model 1 is for small corpora, and this one has {cells:,} pairs of words, more than "
            f"{CELLS:,}; align it with a tool such as fast_align and name its file."
        )
    numbers: dict[str, int] = {}
    ids = [[[numbers.setdefault(word, len(numbers) + 1) for word in side] for side in pair] for pair in words]
    rows = [row for row, pair in enumerate(ids) if all(pair)]
    found: list[Pairs] = [[] for _ in ids]
    chances = posteriors([ids[row][0] for row in rows], [ids[row][1] for row in rows])
    for row, matrix in zip(rows, chances, strict=True):
        # A word that rather comes from none has no link.
        real = (matrix.max(1) > 1 - matrix.sum(1)).nonzero()[0]
        found[row] = list(zip(matrix.argmax(1)[real].tolist(), real.tolist(), strict=True))
    return found


@dataclass(frozen=True)
class GuidedAttention:
    """The cross-entropy of a head's attention, given where each target token comes from (`Batch.links`)."""

    head: Head

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`. Encoder and decoder run once more, up to the head."""
        if batch.links is None:
            raise TypeError("a batch without links")
        state = model.start(model.encode(batch.source, batch.source_mask))
        weights = next(islice(model.attention(batch.decoder_input, state), self.head.layer, None))
        chosen = weights.mean(1) if self.head.head is None else weights[:, self.head.head]
        return -(batch.links * (chosen + _TINY).log()).sum() * weight


def chosen_head(model: Model, guide: Guide) -> Head:
    """Return the head that is guided. Raises UsageError if the model has no such head, or no attention."""
    counts = heads(model)
    if not -len(counts) <= guide.layer < len(counts):
        raise UsageError(f"guide.layer: {guide.layer}, but the decoder layers are 0 to {len(counts) - 1}.")
    layer = guide.layer % len(counts)
    if not 0 <= guide.head < counts[layer]:
        raise UsageError(f"guide.head: {guide.head}, but the heads of layer {layer} are 0 to {counts[layer] - 1}.")
    return Head(layer, guide.head)
