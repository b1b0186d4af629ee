"""What a reranker is, and how it stands between a search and what is written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.generation.lines import Candidate, Generated, Options, generate
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class Reranker:
    """A way to choose among outputs: a dataclass that is called; its fields are keys of `--rerank name,key=value`."""

    def load(self, device: str) -> None:
        """Load the models that it needs; called once, before the first line."""

    @abstractmethod
    def __call__(self, example: Example, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return a score for each candidate of one line, the highest for the best. There is at least one."""


def rerank(result: Generated, reranker: Reranker, n_best: int) -> Generated:
    """Return the result with its `n_best` best candidates by the reranker; equal ones keep their order."""
    if not result.candidates:
        return result
    scores = reranker(result.example, result.candidates)
    scored = [replace(one, rerank_score=score) for one, score in zip(result.candidates, scores, strict=True)]
    order = sorted(range(len(scored)), key=lambda place: -scores[place])
    return replace(result, candidates=[scored[place] for place in order[:n_best]])


def generate_reranked(
    bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options, reranker: Reranker
) -> Generator[Generated, None, None]:
    """Decode like `generate`, with all `strategy.beam` candidates of a line for the reranker to choose among."""
    everything = replace(options, n_best=options.strategy.beam)
    with closing(generate(bundles, windows, everything)) as results:
        for result in results:
            yield rerank(result, reranker, options.n_best)
