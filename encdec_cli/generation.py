"""Lines to lines: the only way from text to text, for the commands, for validation and for export checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, collate
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy, length_limit
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import BundleError
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
    ids: list[int] = field(default_factory=list)


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


def generate(bundles: Sequence[Bundle], windows: Iterable[Sequence[Example]], options: Options) -> Iterator[Generated]:
    """Decode windows of examples; yield one result for each example, in order, as batches finish.

    Several bundles are an ensemble. The text of a candidate never holds a line break.
    """
    check_ensemble(bundles)
    for window in windows:
        yield from _decode_window(bundles, window, options)


def first_text(result: Generated) -> str:
    """Return the best output, or an empty line for an empty source."""
    return result.candidates[0].text if result.candidates else ""


def _decode_window(bundles: Sequence[Bundle], window: Sequence[Example], options: Options) -> Iterator[Generated]:
    bundle = bundles[0]
    lines = [_read(bundle, place, example) for place, example in enumerate(window)]
    ready = [not line.ids for line in lines]
    given = 0
    for group in _groups([line for line in lines if line.ids], options.batch):
        batch = collate([line.ids for line in group], None, [line.place for line in group])
        for line, hypotheses in zip(group, _search(bundles, batch, options), strict=True):
            line.result.candidates = [_candidate(bundle, line, h) for h in hypotheses[: options.n_best]]
            ready[line.place] = True
        while given < len(lines) and ready[given]:
            yield lines[given].result
            given += 1
    yield from (line.result for line in lines[given:])


def _read(bundle: Bundle, place: int, example: Example) -> _Line:
    ids = bundle.source.encode(bundle.task.source(example)) if example.source.strip() else []
    most = bundle.longest_source
    return _Line(place, Generated(example, [], truncated=len(ids) > most), ids[:most])


def _groups(lines: list[_Line], batch: int) -> Iterator[list[_Line]]:
    """Cut the lines, longest first, into batches of at most `batch` sentences and a bounded number of tokens."""
    lines = sorted(lines, key=lambda line: (-len(line.ids), line.place))
    start = 0
    while start < len(lines):
        size = min(batch, max(1, batch * _TOKENS_PER_SENTENCE // (len(lines[start].ids) + 1)))
        yield lines[start : start + size]
        start += size


@torch.inference_mode()
def _search(bundles: Sequence[Bundle], batch: Batch, options: Options) -> list[list[Hypothesis]]:
    strategy = options.strategy
    device = bundles[0].device
    mask = batch.source_mask
    lengths = mask.sum(1).tolist()
    models = [bundle.model for bundle in bundles]
    maximum = torch.tensor([length_limit(strategy.max_length, length - 1) for length in lengths])
    for model in models:
        if model.max_positions is not None:
            maximum = maximum.clamp(max=model.max_positions - 1)  # BOS has a position too
    limits = Limits(minimum=torch.ones_like(maximum), maximum=maximum)
    stepper = Stepper(models, batch.source.to(device), mask.to(device), beam=strategy.beam)
    return strategy(stepper, limits, rules=[])


def _candidate(bundle: Bundle, line: _Line, hypothesis: Hypothesis) -> Candidate:
    text = bundle.task.write(line.result.example, bundle.target.decode(hypothesis.tokens))
    # One line in, one line out: byte fallback can write any character.
    text = text.replace("\r", " ").replace("\n", " ")
    return Candidate(text, hypothesis.score, hypothesis.token_scores, hypothesis.finished)
