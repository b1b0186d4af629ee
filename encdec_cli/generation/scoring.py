"""How likely models find given targets: the only way from pairs of texts to log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import collate
from encdec_cli.decoding.attention import Head, align
from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.force import score_targets
from encdec_cli.errors import LineError
from encdec_cli.generation.alignment import word_links
from encdec_cli.generation.lines import check_ensemble
from encdec_cli.generation.search import longest_output, read_sources, threads
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import EOS

_TOKENS_PER_TARGET = 48


@dataclass
class Scored:
    """A target, and how likely the models find it given its source."""

    example: Example
    tokens: list[str]
    """The tokens of the target, `</s>` last."""
    token_scores: list[float]
    """Natural log-probability of each token."""
    truncated: bool
    """Whether the source was longer than the model reads and was cut; targets are never cut."""
    alignment: str | None = None
    """Words of the source and of the target that belong together, `0-0 1-2 …`, where that was asked for."""

    @property
    def log_probability(self) -> float:
        """Of the whole target, the natural logarithm."""
        return math.fsum(self.token_scores)


def perplexity(log_probability: float, tokens: int) -> float:
    """Return exp of the mean negative log-probability of a token; infinite where that is no number."""
    try:
        return math.exp(-log_probability / tokens)
    except OverflowError:
        return math.inf


@dataclass
class _Pair:
    """A pair on its way: its ids without EOS, and in the end its result."""

    sources: list[list[int]]
    """As each model reads it."""
    target: list[int]
    result: Scored


def score(
    bundles: Sequence[Bundle],
    windows: Iterable[Sequence[Example]],
    batch: int = 64,
    exact: bool = False,
    head: Head | None = None,
    ensemble: Ensemble = MEAN,
    longest: int | None = None,
) -> Iterator[Scored]:
    """Score windows of examples whose targets are known; yield one result for each example, in order.

    What is empty is scored as the model reads it: an empty source is EOS alone, an empty target is the one token EOS.

    Args:
        bundles: one model, or an ensemble.
        windows: what is sorted together by length.
        batch: most pairs scored together; fewer where they are long.
        exact: whether a result must not depend on its neighbours or the threads in a single bit.
        head: what word alignments are read from, of the first model; None: there are none.
        ensemble: how several models are averaged.
        longest: tokens after which targets are cut; None: they are not.

    Raises:
        LineError: for a target longer than the model reads; lines are counted over all windows.
    """
    check_ensemble(bundles, ensemble)
    read = 0
    for window in windows:
        pairs = [_read(bundles, number, example, longest) for number, example in enumerate(window, start=read + 1)]
        read += len(pairs)
        for group in _groups(pairs, 1 if exact else batch):
            with threads(exact):
                _score(bundles, group, head, ensemble)
        yield from (pair.result for pair in pairs)


def _read(bundles: Sequence[Bundle], number: int, example: Example, longest: int | None) -> _Pair:
    first = bundles[0]
    sources, cut = read_sources(bundles, example)
    target = first.target.encode(first.task.target(example))[:longest]
    most = longest_output(bundles)
    if most is not None and len(target) > most:
        raise LineError(
            number, f"a target of {len(target):,} tokens, and the model reads at most {most:,}; shorten it."
        )
    pieces = [first.target.vocabulary.token(token) for token in (*target, EOS)]
    return _Pair(sources, target, Scored(example, pieces, [], truncated=cut))


def _groups(pairs: list[_Pair], batch: int) -> Iterator[list[_Pair]]:
    """Cut the pairs, longest first, into groups of at most `batch` and a bounded number of tokens."""
    pairs = sorted(pairs, key=lambda pair: (-len(pair.target), -len(pair.sources[0])))
    start = 0
    while start < len(pairs):
        longest = len(pairs[start].target) + max(len(pair.sources[0]) for pair in pairs[start : start + batch])
        size = min(batch, max(1, batch * 2 * _TOKENS_PER_TARGET // (longest + 1)))
        yield pairs[start : start + size]
        start += size


def _score(bundles: Sequence[Bundle], pairs: list[_Pair], head: Head | None, ensemble: Ensemble) -> None:
    """Fill in the results of some pairs, computed together."""
    targets = [pair.target for pair in pairs]
    read = zip(*(pair.sources for pair in pairs), strict=True)
    batches = [collate(ids, targets, range(len(pairs))).to(bundles[0].device) for ids in read]
    batch, models = batches[0], [bundle.model for bundle in bundles]
    sources, masks = [one.source for one in batches], [one.source_mask for one in batches]
    scores = score_targets(models, sources, masks, batch.known_target, ensemble).tolist()
    for pair, row in zip(pairs, scores, strict=True):
        pair.result.token_scores = row[: len(pair.target) + 1]
    if head is not None:
        places = align(models[0], head, batch.source, batch.source_mask, batch.known_target).tolist()
        for pair, row in zip(pairs, places, strict=True):
            pair.result.alignment = word_links(bundles[0], pair.sources[0], pair.target, row[: len(pair.target)])
