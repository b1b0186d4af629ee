"""What a search returns, what bounds it, and what every strategy is."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from encdec_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from encdec_cli.decoding.constraints import Constraint
    from encdec_cli.decoding.rules import Rule
    from encdec_cli.decoding.stepper import Stepper

_FORMULA = re.compile(r"(?:(?P<factor>\d+(?:\.\d+)?)x)?(?:(?P<plus>(?:^|\+)\d+))?")


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


@dataclass
class Limits:
    """What bounds the outputs of each sentence: the number of tokens before EOS, and what must be among them."""

    minimum: Tensor
    """[sentences], int64; 1 forbids an empty output."""
    maximum: Tensor
    """[sentences], int64."""
    constraints: Sequence[Sequence[Constraint]] = ()
    """For each sentence what must appear, if the strategy reads constraints; empty where no sentence has any."""


def length_limit(formula: int | str, source_length: int) -> int:
    """Return the most tokens that `formula` (`2x+20`, `1.5x`, 200) allows for a source of x tokens.

    Raises UsageError if the formula is none.
    """
    match = _FORMULA.fullmatch(str(formula).replace(" ", ""))
    if match is None or not any(match.groupdict().values()):
        raise UsageError(f"max_length: expected a formula such as '2x+20', '1.5x' or '200', found '{formula}'.")
    return max(1, int(float(match["factor"] or 0) * source_length) + int((match["plus"] or "0").lstrip("+")))


@dataclass(kw_only=True)
class Strategy:
    """A way to search: a dataclass that is called. Its fields are keys of the recipe's `decoding` section."""

    reads_constraints: ClassVar[bool] = False
    """Whether outputs hold `Limits.constraints`; only then are constraints read from the input."""

    beam: int = 1
    """Hypotheses kept for each sentence."""
    max_length: int | str = "2x+20"
    """Most tokens in an output: a number, or a function of the source's x tokens such as `2x+20` or `1.5x`."""

    def __post_init__(self) -> None:
        length_limit(self.max_length, 1)

    @abstractmethod
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first, at most `beam` of them and at least one."""
