"""What a search returns, what bounds it, and what every strategy is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from encdec_cli.decoding.rules import Rule
    from encdec_cli.decoding.stepper import Stepper


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
    """Bounds on the number of tokens before EOS, one for each sentence."""

    minimum: Tensor
    """[sentences], int64; 1 forbids an empty output."""
    maximum: Tensor
    """[sentences], int64."""


@dataclass(kw_only=True)
class Strategy:
    """A way to search: a dataclass that is called. Its fields are keys of the recipe's `decoding` section."""

    beam: int = 1
    """Hypotheses kept for each sentence."""
    max_length: int | str = "2x+20"
    """Most tokens in an output: a number, or a function of the source's x tokens such as `2x+20` or `1.5x`."""

    @abstractmethod
    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first, at most `beam` of them and at least one."""
