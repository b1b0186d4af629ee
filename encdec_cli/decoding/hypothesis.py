"""What a search returns, what bounds it, and what every strategy is."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from encdec_cli.decoding.stepper import Stepper

if TYPE_CHECKING:
    from torch import Tensor

    from encdec_cli.decoding.constraints import Constraint
    from encdec_cli.decoding.ensemble import Ensemble
    from encdec_cli.decoding.rules import Rule
    from encdec_cli.models.model import Model

_FORMULA = re.compile(r"(?:(?P<factor>\d+(?:\.\d+)?)x)?(?:(?P<plus>(?:^|\+)\d+))?")
MOST_ROWS = 100_000
"""Of one sentence."""
MOST_NATS = 1e6
"""Greatest bonus or price: beside a greater one, float32 tells no log-probabilities apart."""
_UNBOUNDED = 1 << 30
"""Tokens, or tokens for each of the source's, that no output has; what is above stands for it."""
_EXAMPLES = {"banned": "[foo, bar baz]", "boosted": "{foo: 1.5, bar baz: 2}"}


@dataclass
class Hypothesis:
    """One output of a search."""

    tokens: list[int]
    """Target ids without BOS and without EOS."""
    score: float
    """What the search ranked by (for beam search: the log-probability divided by the length penalty)."""
    token_scores: list[float]
    """Natural log-probability of each token, that of EOS last if `finished`."""
    finished: bool
    """Whether EOS was written, or the length limit cut the output."""
    alignment: list[int] | None = None
    """Which source token each token comes from, where that was asked for after the search."""
    unread: float | None = None
    """Share of source tokens that it has hardly looked at, where that was asked for after the search."""


def rank(hypothesis: Hypothesis) -> tuple[bool, float]:
    """Return what hypotheses of a sentence are sorted by: finished ones first, then by score."""
    return (not hypothesis.finished, -hypothesis.score)


@dataclass
class Limits:
    """What bounds the outputs of each sentence: the number of tokens before EOS, and what must be among them."""

    minimum: Tensor
    """[sentences], int64; 1 forbids an empty output."""
    maximum: Tensor
    """[sentences], int64."""
    constraints: Sequence[Sequence[Constraint]] = ()
    """For each sentence what must appear, if the strategy reads constraints; empty where no sentence has any."""


def length_of(formula: int | str, source_length: int) -> int:
    """Return the number of tokens that `formula` (`2x+20`, `1.5x`, 200) gives for a source of x tokens.

    Raises ValueError if the formula is none.
    """
    match = _FORMULA.fullmatch(str(formula).replace(" ", ""))
    if match is None or not any(match.groupdict().values()):
        raise ValueError(f"expected a formula such as '2x+20', '1.5x' or '200', found '{formula}'.")
    factor, plus = float(match["factor"] or 0), int((match["plus"] or "0").lstrip("+"))
    return int(min(factor, _UNBOUNDED) * source_length) + min(plus, _UNBOUNDED)


@dataclass(kw_only=True)
class Strategy:
    """A way to search: a dataclass that is called. Its fields are keys of the recipe's `decoding` section."""

    reads_constraints: ClassVar[bool] = False
    """Whether outputs hold `Limits.constraints`; only then are constraints read from the input."""

    one_by_one: ClassVar[bool] = False
    """Whether sentences are decoded fastest one at a time."""

    beam: int = 1
    """Hypotheses kept for each sentence."""
    max_length: int | str = "2x+20"
    """Most tokens in an output: a number, or a function of the source's x tokens such as `2x+20` or `1.5x`."""
    min_length: int | str = 1
    """Fewest tokens in an output, in the same way, such as `0.5x`; 0 allows an empty output. Where it is above
    max_length, max_length counts."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens is written twice in an output; 0 allows repetition."""
    no_repeat_source_ngram: int = 0
    """No sequence of this many tokens is copied from the source, for models with one vocabulary; 0 allows copies."""
    repetition_penalty: float = 1.0
    """Log-probabilities of tokens that have been written are multiplied by it (https://arxiv.org/abs/1909.05858);
    above 1 they become less likely."""
    banned: list[str] = field(default_factory=list)
    """Words and phrases that are never written."""
    boosted: dict[str, float] = field(default_factory=dict)
    """Words and phrases, each with a bonus in nats that the rank of an output gains whenever it holds it."""
    allow_unknown: bool = False
    """Whether outputs may hold `<unk>`, the token for what is not in the vocabulary."""
    prefix: str = ""
    """Text that every output begins with; a record's own field `prefix` comes first."""
    outputs: str = ""
    """A file with one allowed output a line: nothing else is written, and its lengths are the limits."""

    def __post_init__(self) -> None:
        if self.rows > MOST_ROWS:
            raise ValueError(
                f"{self.rows} hypotheses for each sentence are more than any machine decodes: {MOST_ROWS:,}."
            )
        self._check_lengths()
        for key in ("no_repeat_ngram", "no_repeat_source_ngram"):
            if (n := vars(self)[key]) < 0:
                raise ValueError(f"{key}: {n} must be 1 or more, or 0 for no such rule.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty: {self.repetition_penalty} must be above 0, such as 1.2.")
        self._check_phrases()

    def _check_lengths(self) -> None:
        for key in ("max_length", "min_length"):
            try:
                length_of(vars(self)[key], 1)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        if length_of(self.max_length, 1000) < 1:
            raise ValueError(f"max_length: {self.max_length} leaves no room for a token; expected such as '2x+20'.")

    def _check_phrases(self) -> None:
        for key, phrases in (("banned", self.banned), ("boosted", self.boosted)):
            if not all(phrase.strip() for phrase in phrases):
                raise ValueError(f"{key}: an empty phrase; expected words such as {_EXAMPLES[key]}.")
        if not all(abs(bonus) <= MOST_NATS for bonus in self.boosted.values()):
            raise ValueError(f"boosted: a bonus is at most {MOST_NATS:,.0f} nats, such as {_EXAMPLES['boosted']}.")
        if self.outputs and (self.no_repeat_ngram or self.no_repeat_source_ngram or self.banned):
            raise ValueError(
                "outputs: the list alone says what is written; leave out no_repeat_ngram, no_repeat_source_ngram and "
                "banned, and take out of the list what must not be written."
            )

    @property
    def rows(self) -> int:
        """Rows that the search needs for each sentence."""
        return self.beam

    def helper(self) -> Path | None:
        """Return the bundle or run of a model that helps the search, None for none; `stepper` is given it."""
        return None

    def stepper(
        self,
        models: tuple[Sequence[Model], Sequence[Tensor], Sequence[Tensor]],
        ensemble: Ensemble,
        forbidden: Sequence[int],
        helper: Stepper | None,
        longest: int,
    ) -> Stepper:
        """Return what gives the scores to this search.

        Args:
            models: the models, and for each the sources and the mask, as `Stepper` takes them.
            ensemble: as for `Stepper`.
            forbidden: as for `Stepper`.
            helper: the helper over the same sentences, if there is one.
            longest: most tokens of any output.
        """
        return Stepper(*models, self.rows, ensemble, forbidden)

    @abstractmethod
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first, at most `beam` of them and at least one."""
