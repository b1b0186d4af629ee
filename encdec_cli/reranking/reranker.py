"""What a reranker is, and how it stands between a search and what is written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.config import parse_component
from encdec_cli.errors import UsageError
from encdec_cli.generation.lines import Candidate, Generated, Options, generate
from encdec_cli.registry import rerankers
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class Reranker:
    """A way to choose among outputs: a dataclass that is called; its fields are keys of `--rerank name,key=value`."""

    def load(self, device: str) -> None:
        """Load the models that it needs; called once, before the first line."""

    @abstractmethod
    def __call__(self, example: Example, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return a score for each candidate of one line, the highest for the best. There is at least one."""

    def together(self, lines: Sequence[Generated]) -> Sequence[Sequence[float]]:
        """Return the scores of the candidates of each of some lines, which have been decoded together.

        One that asks models overrides it, so that they read larger batches.
        """
        return [self(line.example, line.candidates) for line in lines]


def rerank(lines: Sequence[Generated], reranker: Reranker, n_best: int) -> list[Generated]:
    """Return each line with its `n_best` best candidates by the reranker; equal ones keep their order."""
    scores = reranker.together(lines)
    return [_ordered(line, row, n_best) for line, row in zip(lines, scores, strict=True)]


def _ordered(line: Generated, scores: Sequence[float], n_best: int) -> Generated:
    scored = [replace(one, rerank_score=score) for one, score in zip(line.candidates, scores, strict=True)]
    order = sorted(range(len(scored)), key=lambda place: -scores[place])
    return replace(line, candidates=[scored[place] for place in order[:n_best]])


def decode(
    bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options, named: str | None
) -> Generator[Generated, None, None]:
    """Decode as `generate` does; where a reranker is `named`, order the outputs of each line anew by it.

    Raises UsageError if there is nothing to order, or no such reranker.
    """
    if not named:
        return generate(bundles, windows, options)
    reranker: Reranker = parse_component(named, rerankers, "--rerank")
    if options.strategy.beam == 1:
        raise UsageError(f"--rerank {named}: the search gives 1 output a line; it needs a beam of several to order.")
    reranker.load(str(bundles[0].device))
    if options.exact or options.workers > 1:
        torch.set_num_threads(1)  # the workers have the other cores; and what is exact must not depend on their number
    return generate_reranked(bundles, windows, options, reranker)


def generate_reranked(
    bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options, reranker: Reranker
) -> Generator[Generated, None, None]:
    """Decode like `generate`, with all `strategy.beam` candidates of a line for the reranker to choose among."""
    everything = replace(options, n_best=options.strategy.beam)
    return generate(bundles, windows, everything, lambda lines: rerank(lines, reranker, options.n_best))
