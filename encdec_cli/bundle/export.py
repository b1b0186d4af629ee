"""What every export target shares: refusing what it cannot express, the folder, and the comparison on a probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from encdec_cli import __version__, atomic
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, collate
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.force import score_targets
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import CheckError, DataError, UsageError
from encdec_cli.text.example import Example

MARKER = "export.json"
"""The file by which a folder is known as an export."""
_BATCH = 32


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from its model."""

    difference: float
    """Largest difference of a token's log-probability."""
    equal: float
    """Smallest share of lines with an equal greedy output."""


@dataclass(frozen=True)
class Agreement:
    """How an export compares with its model on a probe."""

    lines: int
    """Lines compared."""
    tokens: int
    """Target tokens whose log-probabilities were compared, EOS included."""
    difference: float
    """Largest difference of a token's natural log-probability; NaN if a score is not a number."""
    equal: float
    """Share of lines with an equal greedy output."""
    equal_beam: float
    """Share of lines with an equal output of the recipe's beam; shown, not demanded: searches may differ."""
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        """Whether both numbers are within the tolerance."""
        return self.difference <= self.tolerance.difference and self.equal >= self.tolerance.equal

    def plain(self) -> dict[str, Any]:
        """Return every number by its name, as plain JSON types."""
        return {
            "lines": self.lines,
            "tokens": self.tokens,
            "largest-difference": self.difference if self.difference < float("inf") else None,
            "largest-difference-allowed": self.tolerance.difference,
            "equal-greedy": self.equal,
            "equal-greedy-demanded": self.tolerance.equal,
            "equal-beam": self.equal_beam,
            "agrees": self.holds,
        }


class DisagreementError(CheckError):
    """The export does not do what the model does; nothing was written."""

    def __init__(self, agreement: Agreement, folder: Path) -> None:
        tolerance = agreement.tolerance
        super().__init__(
            f"{folder}: the export does not agree with the model on {agreement.lines} lines: largest difference of a "
            f"log-probability {agreement.difference:.6f} (at most {tolerance.difference:g}), equal greedy outputs "
            f"{agreement.equal:.1%} (at least {tolerance.equal:.0%}); nothing was written. "
            "Without --check it is written as it is."
        )
        self.agreement = agreement


class Exporter(Protocol):
    """A target: a dataclass, registered by its name, that writes another program's format."""

    def problems(self, bundle: Bundle) -> list[str]:
        """Return everything about the model that the target cannot express, each beginning with the recipe's key."""

    def write(self, bundle: Bundle, folder: Path) -> None:
        """Write the target's files, and a README.txt that shows how to use them alone, into an empty folder."""

    def check(self, bundle: Bundle, folder: Path, sources: Sequence[Example]) -> Agreement:
        """Run the model and what `write` wrote on the same lines. Raises DataError if none of them has text."""

    def facts(self) -> dict[str, Any]:
        """Return the target's name and the options it was written with, as plain JSON types."""


def export(
    exporter: Exporter, bundle: Bundle, folder: Path, probe: Sequence[Example] | None = None
) -> Agreement | None:
    """Write `folder`, all of it or nothing: the target's files, the tokenizers, and what they were made from.

    With a probe the export is compared with the model before it is put in place.

    Raises:
        UsageError: if the target cannot express the model, or `folder` holds something that is not an export.
        DisagreementError: if the two differ by more than the target's tolerance.
    """
    problems = exporter.problems(bundle)
    if problems:
        raise UsageError("\n".join(problems))
    _refuse_foreign(folder)
    agreement = None
    with atomic.new_folder(folder) as temporary:
        exporter.write(bundle, temporary)
        (temporary / "source.tokenizer").write_bytes(bundle.source.to_bytes())
        if bundle.target is not bundle.source:
            (temporary / "target.tokenizer").write_bytes(bundle.target.to_bytes())
        facts = {
            "encdec": __version__,
            **exporter.facts(),
            "task": bundle.recipe.task.plain(),
            "model": bundle.recipe.model.plain(),
            "source_tokenizer": bundle.source.kind,
            "target_tokenizer": bundle.target.kind,
        }
        (temporary / MARKER).write_bytes(atomic.json_bytes(facts))
        if probe is not None:
            agreement = exporter.check(bundle, temporary, probe)
            if not agreement.holds:
                raise DisagreementError(agreement, folder)
    return agreement


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / MARKER).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"--output {folder}: exists and is no export ({MARKER} is missing), so it is not replaced; "
            "choose another name, or remove it."
        )


@dataclass(frozen=True)
class Search:
    """How both programs search."""

    limit: int
    """Most tokens of an output, EOS left aside."""
    beam: int
    """Hypotheses kept for each line."""
    length_penalty: float
    """As in our beam search: exponent of the length, EOS included."""


@dataclass
class Probe:
    """The lines of a probe as a model reads them, and what it makes of them."""

    sources: list[list[int]]
    """Source ids of each line, without EOS."""
    targets: list[list[int]]
    """Target ids whose log-probabilities are compared: the example's own, else the model's greedy output."""
    search: Search


@dataclass
class Outputs:
    """What one program makes of a probe: a list for each, with one entry a line."""

    scores: list[list[float]]
    """Natural log-probability of every target token and of EOS."""
    greedy: list[list[int]]
    """Target ids of greedy search, without EOS."""
    beam: list[list[int]]
    """Target ids of the best hypothesis of beam search, without EOS."""


def run_model(bundle: Bundle, examples: Sequence[Example], search: Search) -> tuple[Probe, Outputs]:
    """Read a probe and return it with the model's own outputs.

    Lines without text are left out. Raises DataError if nothing remains.
    """
    used = [example for example in examples if example.source.strip()]
    if not used:
        raise DataError("--check: the probe has no line with text; give other lines with --probe FILE.")
    sources = [bundle.source.encode(bundle.task.source(example))[: bundle.longest_source] for example in used]
    greedy = _search(bundle, sources, search.limit, Beam(beam=1))
    best = _search(bundle, sources, search.limit, Beam(beam=search.beam, length_penalty=search.length_penalty))
    targets = []
    for example, output in zip(used, greedy, strict=True):
        known = [] if example.target is None else bundle.target.encode(bundle.task.target(example))
        targets.append(known[: search.limit] or output)
    probe = Probe(sources, targets, search)
    return probe, Outputs(_scores(bundle, probe), greedy, best)


def compare(ours: Outputs, theirs: Outputs, tolerance: Tolerance) -> Agreement:
    """Return how the outputs of two programs for one probe agree."""
    pairs = list(zip(ours.scores, theirs.scores, strict=True))
    gaps = torch.tensor([abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True)], dtype=torch.float64)
    return Agreement(
        lines=len(pairs),
        tokens=len(gaps),
        difference=float(gaps.max()),  # a NaN among them stays one
        equal=_equal(ours.greedy, theirs.greedy),
        equal_beam=_equal(ours.beam, theirs.beam),
        tolerance=tolerance,
    )


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    return sum(one == two for one, two in zip(ours, theirs, strict=True)) / len(ours)


def batches(lines: Sequence[Any]) -> Iterator[slice]:
    """Cut lines into parts of a size that any machine can decode."""
    for start in range(0, len(lines), _BATCH):
        yield slice(start, start + _BATCH)


def _batch(bundle: Bundle, sources: list[list[int]], targets: list[list[int]] | None) -> Batch:
    return collate(sources, targets, range(len(sources))).to(bundle.device)


def _search(bundle: Bundle, sources: list[list[int]], limit: int, strategy: Beam) -> list[list[int]]:
    found: list[list[int]] = []
    for part in batches(sources):
        batch = _batch(bundle, sources[part], None)
        ones = torch.ones(len(batch.rows), dtype=torch.int64)
        stepper = Stepper([bundle.model], batch.source, batch.source_mask, beam=strategy.beam)
        hypotheses = strategy(stepper, Limits(minimum=ones, maximum=ones * limit), [])
        found += [best[0].tokens for best in hypotheses]
    return found


def _scores(bundle: Bundle, probe: Probe) -> list[list[float]]:
    found: list[list[float]] = []
    for part in batches(probe.sources):
        batch = _batch(bundle, probe.sources[part], probe.targets[part])
        scores = score_targets([bundle.model], batch.source, batch.source_mask, batch.known_target).tolist()
        found += [row[: len(target) + 1] for row, target in zip(scores, probe.targets[part], strict=True)]
    return found
