"""Word alignments: from attention to `i-j` pairs, and which head is to be believed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, collate
from encdec_cli.decoding.attention import Head, heads, layers
from encdec_cli.errors import DataError
from encdec_cli.generation.model1 import Floats, posteriors
from encdec_cli.text.example import Example
from encdec_cli.text.tokenizer import Tokenizer

CELLS = 250_000
"""The best head is looked for on as many pairs as have this many pairs of a source and a target token in all: about
600 sentences, and seconds."""
_BATCH = 32


def word_links(bundle: Bundle, source: Sequence[int], target: Sequence[int], places: Sequence[int]) -> str:
    """Return the alignment of words as `i-j` pairs in order, source word i with target word j, both from 0.

    Words are what white space separates in the texts of the ids; the task's symbols in the source are none. Two
    words are linked where a token of one comes from a token of the other.

    source, target: ids without BOS and EOS; places: for each target token the place in the source that it comes
    from; after the last token, at EOS, it comes from nowhere.
    """
    rows = word_numbers(bundle.source, source, bundle.task.symbols())
    columns = word_numbers(bundle.target, target)
    found = {(rows[i], j) for i, j in zip(places, columns, strict=True) if i < len(source)}
    links = sorted((i, j) for i, j in found if i is not None and j is not None)
    return " ".join(f"{i}-{j}" for i, j in links)


def word_numbers(tokenizer: Tokenizer, ids: Sequence[int], symbols: Sequence[str] = ()) -> list[int | None]:
    """Return for each token which word of the text it belongs to, from 0; None for symbols and leading space."""
    numbers: list[int | None] = [None] * len(ids)
    last = len(ids)
    for place in reversed(range(len(ids))):
        words = tokenizer.decode(ids[: place + 1]).split()
        if words and words[-1] not in symbols:
            # Some of a character's bytes look like a word, even if all of them are white space.
            last = numbers[place] = min(last, sum(word not in symbols for word in words) - 1)
    return numbers


def best_head(bundle: Bundle, examples: Iterable[Example]) -> tuple[Head, int]:
    """Return the head, or the layer, whose links agree best with IBM Model 1, and on how many of the examples.

    Model 1 learns from the examples themselves which tokens belong together. The agreement is the mean probability
    that it gives to the link of a target token.

    Raises UsageError for a model without attention, DataError if no example has both sides in bounds.
    """
    known = [Head(layer, head) for layer, count in enumerate(heads(bundle.model)) for head in (*range(count), None)]
    sources, targets = _pairs(bundle, examples)
    if not sources:
        raise DataError("there is no example whose source and target are known and fit the model.")
    beliefs = posteriors(sources, targets)
    agreement = np.zeros(len(known))
    order = sorted(range(len(sources)), key=lambda row: (len(targets[row]), len(sources[row])))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = collate([sources[row] for row in rows], [targets[row] for row in rows], rows).to(bundle.device)
        agreement += _agreement(bundle, batch, [beliefs[row] for row in rows])
    return known[int(agreement.argmax())], len(sources)


def _pairs(bundle: Bundle, examples: Iterable[Example]) -> tuple[list[list[int]], list[list[int]]]:
    """Return ids of sources and targets that the model reads whole, until there are enough."""
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    limits = [bundle.recipe.text.max_target, bundle.model.max_positions]
    most = min(limit for limit in limits if limit is not None) - 1
    cells = 0
    for example in examples:
        source = bundle.source.encode(bundle.task.source(example))
        target = bundle.target.encode(bundle.task.target(example))
        if 0 < len(source) <= bundle.longest_source and 0 < len(target) <= most:
            sources.append(source)
            targets.append(target)
            cells += len(source) * len(target)
        if cells >= CELLS:
            break
    return sources, targets


@torch.inference_mode()
def _agreement(bundle: Bundle, batch: Batch, beliefs: Sequence[Floats]) -> Floats:
    """Return the sum of the probabilities of all links, for the heads of each layer and then their mean.

    beliefs: for each pair of the batch the probabilities [tgt_len, src_len].
    """
    belief = torch.zeros(len(beliefs), batch.known_target.shape[1] - 1, batch.source.shape[1])
    for row, matrix in enumerate(beliefs):
        belief[row, : matrix.shape[0], : matrix.shape[1]] = torch.from_numpy(matrix)
    found = []
    for weights in layers(bundle.model, batch.source, batch.source_mask, batch.known_target):
        links = torch.cat((weights, weights.mean(1, keepdim=True)), 1).argmax(-1).cpu()
        found.append(belief.gather(2, links.transpose(1, 2)).sum((0, 1), dtype=torch.float64))
    return np.asarray(torch.cat(found).numpy())
