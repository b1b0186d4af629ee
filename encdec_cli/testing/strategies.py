"""The laws of strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import nn

from encdec_cli.decoding.constraints import Constraint
from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.force import as_targets, score_targets
from encdec_cli.decoding.forced import Forced
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import NoRepeatNgram, Rule
from encdec_cli.decoding.stepper import NEVER_WRITTEN, Stepper
from encdec_cli.models.model import Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.testing.models import Case, LawError, make_case, small
from encdec_cli.text.vocabulary import EOS

EVERY = [0, 1, 2, 3]
"""The sentences of a trial."""


@dataclass
class Trial:
    """A strategy, the models that it decodes with, and sentences with limits of their own."""

    strategy: Strategy
    models: Sequence[Model]
    """One, or an ensemble."""
    case: Case
    """The sentences; its model is the first of the models."""
    draft: Model
    """What helps a strategy that asks for a helper."""
    limits: Limits
    ensemble: Ensemble = MEAN
    """How several models are averaged."""

    @torch.inference_mode()
    def search(
        self, sentences: Sequence[int], rules: Sequence[Rule] = (), constraints: Sequence[Sequence[Constraint]] = ()
    ) -> list[list[Hypothesis]]:
        """Decode some sentences together, with no more padding than they need."""
        longest = int(self.case.mask[sentences].sum(dim=1).max())
        source, mask = self.case.source[sentences, :longest], self.case.mask[sentences, :longest]
        given = (self.models, [source] * len(self.models), [mask] * len(self.models))
        minimum, maximum = self.limits.minimum[sentences], self.limits.maximum[sentences]
        helper = None if self.strategy.helper() is None else Stepper([self.draft], source, mask)
        stepper = self.strategy.stepper(given, self.ensemble, NEVER_WRITTEN, helper, int(maximum.max()))
        return self.strategy(stepper, Limits(minimum, maximum, constraints), rules)

    @cached_property
    def found(self) -> list[list[Hypothesis]]:
        """What the strategy finds for all sentences together."""
        return self.search(EVERY)

    def expect_forced_scores(self, found: Sequence[Sequence[Hypothesis]]) -> None:
        """Raise LawError unless the tokens of all hypotheses have the scores of teacher forcing."""
        beam = max(map(len, found))
        target = as_targets(found, beam, self.case.source.device)
        source, mask = (ids.repeat_interleave(beam, 0) for ids in (self.case.source, self.case.mask))
        expected = score_targets(self.models, source, mask, target, self.ensemble)
        scores = torch.zeros_like(expected)
        for sentence, hypotheses in enumerate(found):
            for place, one in enumerate(hypotheses, start=sentence * beam):
                scores[place, : len(one.token_scores)] = torch.tensor(one.token_scores)
        self.case.expect(scores, expected, "token scores must be those of teacher forcing")


def check_strategy(strategy: Strategy, models: Sequence[Model] = (), vocab: int = 19, seed: int = 0) -> None:
    """Try every law on a strategy, with random sentences; raise LawError with the law's sentence if one does not hold.

    The laws: one to `beam` hypotheses a sentence, best first (finished before cut), within the limits, without special
    tokens; their scores are the models', so teacher forcing finds the same; padding, order and batch mates change
    nothing; rules are obeyed, and constraints are met by a strategy that reads them.

    Args:
        strategy: one that asks for a helper gets a small random Transformer.
        models: what it decodes with, an ensemble if they are several; none stands for small random Transformers,
            one of them with the 7 tokens of which every search soon runs out.
        vocab: ids that sources and targets may use, as for `check`.
        seed: of the sentences and of what is random in models that are made here.
    """
    for size in (vocab,) if models else (7, vocab):
        trial = make_trial(strategy, models or [_decoder(size, seed)], size, seed)
        for law in STRATEGY_LAWS:
            law(trial)


def make_trial(
    strategy: Strategy, models: Sequence[Model], vocab: int, seed: int = 0, tolerance: float = 1e-4
) -> Trial:
    """Return a strategy with four random sentences to decode; see `check_strategy` and `make_case`."""
    case = make_case(models[0], (vocab, vocab), seed, tolerance)
    limits = Limits(torch.tensor([1, 2, 0, 3]), torch.tensor([1, 9, 5, 3]))
    return Trial(strategy, models, case, _decoder(vocab, seed + 1), limits)


def _decoder(vocab: int, seed: int) -> Model:
    """Return a small Transformer whose weights are so large that its outputs are neither endless nor all alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small(Transformer, vocab, vocab).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5)
    return model


def legal(trial: Trial) -> None:
    """There are one to `beam` hypotheses a sentence, best first, within the limits and without special tokens."""
    if len(trial.found) != len(EVERY):
        raise LawError(f"a strategy must return a list for each sentence: 4 expected, {len(trial.found)} found.")
    bounds = zip(trial.limits.minimum.tolist(), trial.limits.maximum.tolist(), strict=True)
    for hypotheses, (minimum, maximum) in zip(trial.found, bounds, strict=True):
        _legal(trial.strategy, hypotheses, minimum, maximum)


def _legal(strategy: Strategy, hypotheses: list[Hypothesis], minimum: int, maximum: int) -> None:
    if not 1 <= len(hypotheses) <= strategy.beam:
        raise LawError(f"one to {strategy.beam} hypotheses a sentence expected, {len(hypotheses)} found.")
    ranks = [(hypothesis.finished, hypothesis.score) for hypothesis in hypotheses]
    if any(before < after for before, after in pairwise(ranks)):
        raise LawError("the hypotheses of a sentence must stand best first, those that end before those that were cut.")
    for hypothesis in hypotheses:
        length = len(hypothesis.tokens)
        if not minimum <= length <= maximum:
            raise LawError(f"{minimum} to {maximum} tokens expected by the limits, {length} found.")
        if not hypothesis.finished and length < maximum:
            raise LawError(f"an output of {length} tokens that may have {maximum} must end with EOS.")
        if any(token <= EOS for token in hypothesis.tokens):
            raise LawError(f"an output must not hold padding, unknown, BOS or EOS: {hypothesis.tokens}.")


def scored_by_the_models(trial: Trial) -> None:
    """The scores of the tokens are those of teacher forcing."""
    trial.expect_forced_scores(trial.found)


def alone_or_together(trial: Trial) -> None:
    """Padding, the order and the other sentences of the batch change nothing."""
    for batch in (EVERY[::-1], [3, 1], [0], [2]):
        for sentence, again in zip(batch, trial.search(batch), strict=True):
            if [one.tokens for one in again] != [one.tokens for one in trial.found[sentence]]:
                raise LawError("padding and the other sentences of the batch must not change a sentence's outputs.")


def obedient(trial: Trial) -> None:
    """No token is written twice and prefixes are kept, where rules say so."""
    prefixes = [[], [5, 4], [], [6]]
    rule = Forced(prefixes, [NoRepeatNgram(1)], trial.case.source.device)
    found = trial.search(EVERY, [rule])
    for sentence, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            tokens, prefix = hypothesis.tokens, prefixes[sentence]
            if tokens[: len(prefix)] != prefix or len(set(tokens)) < len(tokens):
                raise LawError(f"a strategy must obey its rules: {tokens} must begin with {prefix}, no token twice.")
    trial.expect_forced_scores(found)


def constrained(trial: Trial) -> None:
    """Where a strategy reads constraints, every output for which there is room meets them."""
    if not trial.strategy.reads_constraints:
        return
    wanted: list[list[list[list[int]]]] = [[[[4]]], [[[5, 4], [6, 6, 6]], [[6]]], [], [[[6, 5]]]]
    found = trial.search(EVERY, constraints=wanted)
    for sentence, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            for phrases in wanted[sentence]:
                if not any(_holds(hypothesis.tokens, phrase) for phrase in phrases):
                    raise LawError(f"an output must meet its constraints: {hypothesis.tokens} holds none of {phrases}.")
    trial.expect_forced_scores(found)


def _holds(tokens: Sequence[int], phrase: Sequence[int]) -> bool:
    return any(tokens[start : start + len(phrase)] == phrase for start in range(len(tokens)))


STRATEGY_LAWS: tuple[Callable[[Trial], None], ...] = (
    legal,
    scored_by_the_models,
    alone_or_together,
    obedient,
    constrained,
)
"""Every law of strategies, in the order in which `check_strategy` tries them."""
