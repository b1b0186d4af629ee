"""Lines to lines: the only way from text to text, for the commands, for validation and for export checks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.hypothesis import Hypothesis, Strategy
from encdec_cli.errors import BundleError
from encdec_cli.generation.phrases import constraint_ids
from encdec_cli.generation.search import Job, Search
from encdec_cli.generation.workers import Workers
from encdec_cli.text.example import Example

WINDOW_BATCHES = 64
"""Batches in a window: sorting within it by length saves most of the padding."""
_TOKENS_PER_SENTENCE = 48


@dataclass
class Options:
    """How to decode."""

    strategy: Strategy
    n_best: int = 1
    """Candidates returned for each line, at most `strategy.beam`."""
    batch: int = 64
    """Most sentences decoded together; fewer where they are long."""
    workers: int = 1
    """Processes of one thread each that decode, on a CPU; 1 decodes in this process, with its threads."""
    exact: bool = False
    """Whether a line's output must not depend on its neighbours, the threads and the workers in a single bit."""


@dataclass
class Candidate:
    """One output for a line."""

    text: str
    score: float
    token_scores: list[float]
    """Natural log-probability of each token, that of EOS last."""
    finished: bool
    """False where the length limit cut the output."""


@dataclass
class Generated:
    """The outputs for one example, best first, and what happened on the way."""

    example: Example
    candidates: list[Candidate]
    truncated: bool = False
    """Whether the source was longer than the model reads and was cut."""

    @property
    def status(self) -> str:
        """`empty` (nothing to decode), `truncated` (source cut), `max-length` (output cut) or `ok`."""
        if not self.candidates:
            return "empty"
        if self.truncated:
            return "truncated"
        return "ok" if self.candidates[0].finished else "max-length"


@dataclass
class _Line:
    """A line on its way: its place in the window, its source ids, and in the end its result."""

    place: int
    result: Generated
    job: Job


def check_ensemble(bundles: Sequence[Bundle]) -> None:
    """Raise BundleError unless all models read and write the same ids."""
    first = bundles[0]
    for other in bundles[1:]:
        for side in ("source", "target"):
            ours = (first.source if side == "source" else first.target).vocabulary
            theirs = (other.source if side == "source" else other.target).vocabulary
            if ours.sha256 != theirs.sha256:
                raise BundleError(
                    f"models of an ensemble must share their vocabularies: the {side} vocabularies differ "
                    f"({len(ours)} tokens, {ours.sha256[:8]}… and {len(theirs)} tokens, {theirs.sha256[:8]}…); "
                    "train them on the same prepared data."
                )


def generate(
    bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options
) -> Generator[Generated, None, None]:
    """Decode windows of examples; yield one result for each example, in order, as batches finish.

    Several bundles are an ensemble. The text of a candidate never holds a line break.
    """
    check_ensemble(bundles)
    with closing(_Decoder(Search(bundles, options.strategy), options)) as decoder:
        for window in windows:
            yield from _decode_window(bundles[0], window, decoder)


def first_text(result: Generated) -> str:
    """Return the best output, or an empty line for an empty source."""
    return result.candidates[0].text if result.candidates else ""


class _Decoder:
    """Decodes groups of jobs here, or by worker processes once there are several groups at a time."""

    def __init__(self, search: Search, options: Options) -> None:
        self.options = options
        self._search = search
        self._workers: Workers | None = None

    def map(self, groups: Sequence[Sequence[Job]]) -> Iterator[tuple[int, list[list[Hypothesis]]]]:
        """Yield the number of each group and its hypotheses, as they are done."""
        if len(groups) > 1 and self.options.workers > 1:
            self._workers = self._workers or Workers(self._search, self.options.workers)
            yield from self._workers.map(groups)
            return
        threads = torch.get_num_threads()
        for number, group in enumerate(groups):
            torch.set_num_threads(1 if self.options.exact else threads)
            try:
                found = self._search(group)
            finally:
                torch.set_num_threads(threads)
            yield number, found

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()


def _decode_window(bundle: Bundle, window: Sequence[Example], decoder: _Decoder) -> Iterator[Generated]:
    options = decoder.options
    lines = [_read(bundle, place, example) for place, example in enumerate(window)]
    ready = [not line.job.source for line in lines]
    given = 0
    groups = list(_groups([line for line in lines if line.job.source], options))
    for number, found in decoder.map([[line.job for line in group] for group in groups]):
        for line, hypotheses in zip(groups[number], found, strict=True):
            line.result.candidates = [_candidate(bundle, line, h) for h in hypotheses[: options.n_best]]
            ready[line.place] = True
        while given < len(lines) and ready[given]:
            yield lines[given].result
            given += 1
    yield from (line.result for line in lines[given:])


def _read(bundle: Bundle, place: int, example: Example) -> _Line:
    ids = bundle.source.encode(bundle.task.source(example)) if example.source.strip() else []
    most = bundle.longest_source
    constraints = [constraint_ids(bundle.target, one) for one in example.constraints]
    return _Line(place, Generated(example, [], truncated=len(ids) > most), Job(ids[:most], constraints))


def _groups(lines: list[_Line], options: Options) -> Iterator[list[_Line]]:
    """Cut the lines, longest first, into groups of at most `batch` sentences and a bounded number of tokens."""
    lines = sorted(lines, key=lambda line: (-len(line.job.source), line.place))
    # Few lines are shared out evenly. An exact output is computed alone: kernels are chosen by the size of a batch.
    batch = 1 if options.exact else min(options.batch, max(1, -(-len(lines) // options.workers)))
    start = 0
    while start < len(lines):
        size = min(batch, max(1, options.batch * _TOKENS_PER_SENTENCE // (len(lines[start].job.source) + 1)))
        yield lines[start : start + size]
        start += size


def _candidate(bundle: Bundle, line: _Line, hypothesis: Hypothesis) -> Candidate:
    text = bundle.task.write(line.result.example, bundle.target.decode(hypothesis.tokens))
    # One line in, one line out: byte fallback can write any character.
    text = text.replace("\r", " ").replace("\n", " ")
    return Candidate(text, hypothesis.score, hypothesis.token_scores, hypothesis.finished)
