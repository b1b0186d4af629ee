"""From a strategy's keys to the rules of a batch: words become ids, files are read, limits are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.forced import Forced, OneOf
from encdec_cli.decoding.hypothesis import Strategy
from encdec_cli.decoding.rules import (
    Banned,
    Boosted,
    NoRepeatNgram,
    NoRepeatSourceNgram,
    RepetitionPenalty,
    Rule,
)
from encdec_cli.decoding.stepper import NEVER_WRITTEN
from encdec_cli.errors import DataError, UsageError
from encdec_cli.generation.phrases import spellings
from encdec_cli.tasks.task import optional_text
from encdec_cli.text.example import Example
from encdec_cli.text.lines import read_lines
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.vocabulary import UNK


class RuleBook:
    """What a strategy asks of outputs, in the ids of a model.

    Args:
        strategy: whose common keys are read.
        bundle: whose target tokenizer and task turn words into ids.
        most: most tokens that the models can write; None if there is no limit.

    Raises UsageError or DataError where a key asks for what this model cannot give.
    """

    def __init__(self, strategy: Strategy, bundle: Bundle, most: int | None = None) -> None:
        self._strategy = strategy
        self._bundle = bundle
        self._most = most
        self.outputs = _outputs(strategy.outputs, bundle, most) if strategy.outputs else None
        self._rules: list[Rule] = []
        if strategy.repetition_penalty != 1:
            self._rules.append(RepetitionPenalty(strategy.repetition_penalty))
        if strategy.boosted:
            self._rules.append(Boosted(_boosted(strategy.boosted, bundle.target), bundle.device))
        if strategy.no_repeat_ngram:
            self._rules.append(NoRepeatNgram(strategy.no_repeat_ngram))
        banned = [tokens for phrase in strategy.banned for tokens in spellings(bundle.target, phrase)]
        if banned:
            self._rules.append(Banned(banned, bundle.device))
        if self.outputs:
            self._rules.append(self.outputs)
        if strategy.no_repeat_source_ngram and bundle.source.vocabulary.sha256 != bundle.target.vocabulary.sha256:
            raise UsageError(
                "no_repeat_source_ngram: compares the tokens of source and output, and this model has a vocabulary "
                "for each; leave it out, or train with text.shared=true."
            )

    def prefix(self, example: Example) -> list[int]:
        """Return the ids that the output for an example must begin with.

        Raises DataError if the example's `prefix` is no text, or none of the allowed outputs begins so.
        """
        given = optional_text(example.record, "prefix")
        text = (self._strategy.prefix if given is None else given).rstrip()
        if not text:
            return []
        ids = self._bundle.target.encode(self._bundle.task.target(replace(example, target=text)))
        if self._most is not None and len(ids) > self._most:
            raise DataError(f"the prefix has {len(ids)} tokens, and the model writes at most {self._most}; shorten it.")
        if self.outputs and not self.outputs.begins(ids):
            raise DataError(f"no output in {self._strategy.outputs} begins with the tokens of the prefix '{text}'.")
        return ids

    def forbidden(self, prefixes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Return the tokens that are never candidates in a batch."""
        known = not self._strategy.allow_unknown and not any(UNK in prefix for prefix in prefixes)
        return NEVER_WRITTEN if known else tuple(token for token in NEVER_WRITTEN if token != UNK)

    def rules(self, prefixes: Sequence[Sequence[int]], source: Tensor) -> list[Rule]:
        """Return the rules of a batch.

        prefixes: the ids that each sentence's output must begin with; source: [sentences, src_len], padded with PAD.
        """
        rules = list(self._rules)
        if 0 < self._strategy.no_repeat_source_ngram <= source.shape[1]:
            rules.append(NoRepeatSourceNgram(self._strategy.no_repeat_source_ngram, source))
        if not self._strategy.allow_unknown and UNK not in self.forbidden(prefixes):
            rules.append(Banned([[UNK]], source.device))
        bonus = next((rule for rule in rules if isinstance(rule, Boosted)), None)
        return [Forced(prefixes, rules, source.device, bonus)] if any(prefixes) else rules


def _boosted(boosted: dict[str, float], tokenizer: Tokenizer) -> list[tuple[list[int], float]]:
    found = []
    for phrase, bonus in boosted.items():
        ways = spellings(tokenizer, phrase)
        if not ways:
            raise UsageError(f"boosted: '{phrase}' holds a word that is not in the vocabulary; take it out.")
        found += [(tokens, bonus) for tokens in ways]
    return found


def _outputs(name: str, bundle: Bundle, most: int | None) -> OneOf:
    """Read the file of allowed outputs. Raises DataError that names the line which the model cannot write."""
    found = []
    for number, line in enumerate(read_lines(Path(name)), start=1):
        ids = bundle.target.encode(bundle.task.target(Example("", line))) if line.strip() else []
        if UNK in ids:
            raise DataError(f"{name}:{number}: holds what is not in the model's vocabulary; take the line out.")
        if most is not None and len(ids) > most:
            raise DataError(f"{name}:{number}: {len(ids)} tokens, and the model writes at most {most}; shorten it.")
        found += [ids] if ids else []
    if not found:
        raise DataError(f"{name}: no allowed output; expected one on each line.")
    return OneOf(found, bundle.device)
