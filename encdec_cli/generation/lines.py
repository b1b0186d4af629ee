"""Lines to lines: the only way from text to text, for the commands, for validation and for export checks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.attention import Head
from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.hypothesis import Hypothesis, Strategy
from encdec_cli.errors import BundleError, DataError, LineError, UsageError
from encdec_cli.generation.alignment import word_links
from encdec_cli.generation.phrases import constraint_ids
from encdec_cli.generation.rules import RuleBook
from encdec_cli.generation.search import Job, Search, read_sources, threads
from encdec_cli.generation.workers import Workers
from encdec_cli.text.example import Example

WINDOW = 4096
"""Lines in a window: sorting within it by length saves most of the padding."""
ROWS = 640
"""Hypotheses decoded together unless told otherwise: with fewer, much of a step's time is spent between operations."""
GROUPS = 4
"""So many batches for each of several workers or more, of FEW sentences or more."""
FEW = 64
_TOKENS_PER_SENTENCE = 48
TROUBLES = ("empty", "truncated", "max-length")
"""Nothing to decode, source cut, best output cut: what a line's status may be beside `ok`."""


@dataclass
class Options:
    """How to decode."""

    strategy: Strategy
    n_best: int = 1
    """Candidates returned for each line, at most `strategy.beam`."""
    batch: int = 0
    """Most sentences decoded together, fewer where they are long; 0 takes as many as make ROWS hypotheses."""
    workers: int = 1
    """Processes of one thread each that decode, on a CPU; 1 decodes in this process, with its threads."""
    exact: bool = False
    """Whether a line's output must not depend on its neighbours, the threads and the workers in a single bit."""
    ensemble: Ensemble = MEAN
    """How several models are averaged."""
    head: Head | None = None
    """What word alignments are read from, of the first model; None: there are none."""
    coverage: bool = False
    """Whether candidates tell how much of the source they leave unread."""

    def __post_init__(self) -> None:
        usual = 1 if self.strategy.one_by_one else max(1, ROWS // self.strategy.rows)
        self.batch = self.batch or usual

    @property
    def window(self) -> int:
        """Lines that are read and sorted together."""
        return max(WINDOW, self.batch)

    def fitting(self, longest: int) -> int:
        """Return how many sentences of at most so many source tokens are decoded together."""
        return min(self.batch, max(1, self.batch * _TOKENS_PER_SENTENCE // (longest + 1)))


@dataclass
class Candidate:
    """One output for a line."""

    text: str
    score: float
    token_scores: list[float]
    """Natural log-probability of each token, that of EOS last."""
    finished: bool
    """False where the length limit cut the output."""
    tokens: list[int]
    """Target ids, without EOS."""
    alignment: str | None = None
    """Words of the source and of the output that belong together, `0-0 1-2 …`, where that was asked for."""
    unread: float | None = None
    """Share of source tokens that it has hardly looked at, where that was asked for; see `coverage.low_coverage`."""
    rerank_score: float | None = None
    """What a reranker ordered it by, if there was one."""


@dataclass
class Generated:
    """The outputs for one example, best first, and what happened on the way."""

    example: Example
    candidates: list[Candidate]
    truncated: bool = False
    """Whether the source was longer than the model reads and was cut."""
    source: list[int] = field(default_factory=list)
    """The ids that the model read, without EOS."""

    @property
    def troubles(self) -> list[str]:
        """Those of TROUBLES that hold."""
        if not self.candidates:
            return ["empty"]
        cut = {"truncated": self.truncated, "max-length": not self.candidates[0].finished}
        return [name for name, holds in cut.items() if holds]

    @property
    def status(self) -> str:
        """The first of the troubles, or `ok`."""
        return next(iter(self.troubles), "ok")


Finish = Callable[[Sequence[Generated]], Sequence[Generated]]
"""What may be done with the results of lines that were decoded together; it returns one for each."""


@dataclass
class _Line:
    """A line on its way: its place in the window, its source ids, and in the end its result."""

    place: int
    result: Generated
    job: Job


def check_ensemble(bundles: Sequence[Bundle], ensemble: Ensemble) -> None:
    """Raise BundleError unless all models write the same ids, UsageError unless each has a weight or none has."""
    count = len(ensemble.weights)
    if count not in (0, len(bundles)) or count == 1:
        raise UsageError(f"--weights: found {count}, and {len(bundles)} times --model; give one number for each.")
    ours = bundles[0].target.vocabulary
    for other in bundles[1:]:
        theirs = other.target.vocabulary
        if ours.sha256 != theirs.sha256:
            raise BundleError(
                "models of an ensemble must share their target vocabulary: these differ "
                f"({len(ours)} tokens, {ours.sha256[:8]}… and {len(theirs)} tokens, {theirs.sha256[:8]}…); "
                "train them on the same prepared data."
            )


def generate(
    bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options, finish: Finish = list
) -> Generator[Generated, None, None]:
    """Decode windows of examples; yield one result for each example, in order, as batches finish.

    Each batch goes through `finish` while the workers decode the next ones; lines with nothing to decode do not.

    Several bundles are an ensemble: each reads the source by its own task and tokenizer, the first writes the text.
    The text of a candidate never holds a line break.

    Raises LineError for one that the task or the strategy cannot read; the results of
    those before it are yielded first.
    """
    check_ensemble(bundles, options.ensemble)
    before = 0
    asked = (options.n_best, options.ensemble, options.head, options.coverage)
    search = Search(bundles, options.strategy, *asked)
    with closing(_Decoder(search, options)) as decoder:
        for window in windows:
            lines, unreadable = _read_window(bundles, window, search.rules, before)
            yield from _decode_lines(bundles[0], lines, decoder, finish)
            if unreadable:
                raise unreadable
            before += len(window)


def first_text(result: Generated) -> str:
    """Return the best output, or an empty line for an empty source."""
    return result.candidates[0].text if result.candidates else ""


class _Decoder:
    """Decodes groups of jobs here, or by worker processes once there are several groups at a time."""

    def __init__(self, search: Search, options: Options) -> None:
        self.options = options
        self.search = search
        self._workers: Workers | None = None

    def map(self, groups: Sequence[Sequence[Job]]) -> Iterator[tuple[int, list[list[Hypothesis]]]]:
        """Yield the number of each group and its hypotheses, as they are done."""
        if len(groups) > 1 and self.options.workers > 1:
            self._workers = self._workers or Workers(self.search, self.options.workers)
            yield from self._workers.map(groups)
            return
        for number, group in enumerate(groups):
            with threads(self.options.exact):
                found = self.search(group)
            yield number, found

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()


def _read_window(
    bundles: Sequence[Bundle], window: Sequence[Example], rules: RuleBook, before: int
) -> tuple[list[_Line], LineError | None]:
    """Return the lines that can be read, up to the first that cannot, and the error that names it."""
    lines: list[_Line] = []
    try:
        for place, example in enumerate(window):
            lines.append(_read(bundles, place, example, rules))
    except DataError as error:
        return lines, LineError(before + len(lines) + 1, str(error))
    return lines, None


def _read(bundles: Sequence[Bundle], place: int, example: Example, rules: RuleBook) -> _Line:
    prefix = rules.prefix(example)
    if not example.source.strip():
        return _Line(place, Generated(example, []), Job([]))
    kept, cut = read_sources(bundles, example)
    constraints = [constraint_ids(bundles[0].target, one) for one in example.constraints]
    result = Generated(example, [], truncated=cut, source=kept[0])
    return _Line(place, result, Job(kept[0], kept[1:], prefix, constraints))


def _decode_lines(bundle: Bundle, lines: Sequence[_Line], decoder: _Decoder, finish: Finish) -> Iterator[Generated]:
    options = decoder.options
    ready = [not line.job.source for line in lines]
    given = 0
    groups = list(_groups([line for line in lines if line.job.source], options))
    for number, found in decoder.map([[line.job for line in group] for group in groups]):
        for line, hypotheses in zip(groups[number], found, strict=True):
            line.result.candidates = [_candidate(bundle, line, h) for h in hypotheses]
            ready[line.place] = True
        _finish(groups[number], finish)
        while given < len(lines) and ready[given]:
            yield lines[given].result
            given += 1
    yield from (line.result for line in lines[given:])


def _finish(group: Sequence[_Line], finish: Finish) -> None:
    for line, result in zip(group, finish([line.result for line in group]), strict=True):
        line.result = result


def _groups(lines: list[_Line], options: Options) -> Iterator[list[_Line]]:
    """Cut the lines, longest first, into groups of at most `batch` sentences and a bounded number of tokens."""
    lines = sorted(lines, key=lambda line: (-len(line.job.source), line.place))
    batch = options.batch
    if options.exact:  # computed alone: kernels are chosen by the size of a batch
        batch = 1
    elif options.workers > 1:
        # Few lines are shared out evenly; of more, each worker gets some groups, so that none waits long for another.
        each = -(-len(lines) // options.workers)
        batch = min(batch, max(-(-each // GROUPS), min(each, FEW)))
    start = 0
    while start < len(lines):
        size = min(batch, options.fitting(len(lines[start].job.source)))
        yield lines[start : start + size]
        start += size


def _candidate(bundle: Bundle, line: _Line, hypothesis: Hypothesis) -> Candidate:
    text = bundle.task.write(line.result.example, bundle.target.decode(hypothesis.tokens))
    # One line in, one line out: byte fallback can write any character.
    text = text.replace("\r", " ").replace("\n", " ")
    links = None
    if hypothesis.alignment is not None:
        links = word_links(bundle, line.job.source, hypothesis.tokens, hypothesis.alignment)
    written = (hypothesis.score, hypothesis.token_scores, hypothesis.finished, hypothesis.tokens)
    return Candidate(text, *written, links, hypothesis.unread)
