"""The laws of every registered strategy x real models: all kinds of Transformers, the example plugin, ensembles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from scripted import TinyGru, bounds, pad
from torch import nn

from encdec_cli import registry
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.constrained import Constrained
from encdec_cli.decoding.contrastive import Contrastive
from encdec_cli.decoding.diverse import Diverse
from encdec_cli.decoding.ensemble import MEAN, Ensemble
from encdec_cli.decoding.force import score_targets
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.decoding.siblings import Siblings
from encdec_cli.decoding.speculative import Speculative
from encdec_cli.decoding.stepper import NEVER_WRITTEN, Stepper
from encdec_cli.errors import UsageError
from encdec_cli.generation.lines import Candidate, Generated
from encdec_cli.models.model import Model
from encdec_cli.models.packed import pack
from encdec_cli.models.transformer import Transformer
from encdec_cli.reranking.mbr import MinimumBayesRisk
from encdec_cli.reranking.reranker import rerank
from encdec_cli.testing.strategies import STRATEGY_LAWS, alone_or_together, make_trial
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import BOS, EOS

GRU = Path(__file__).parent.parent / "docs" / "examples" / "gru.py"
TINY, WIDE = 7, 90
"""Tokens of the vocabularies: three letters, so that every output can be written down, and more than one chunk."""

ROUNDED = 0.25
"""Tolerance of scores in bf16: its 8 bits keep logits of up to 16 to 1/16, and an output adds up a few of them."""

# Models --------------------------------------------------------------------------------------------------------------

TRANSFORMERS = [
    ("pre", "layer", "relu", "sinusoidal", "none"),
    ("post", "rms", "gelu", "sinusoidal", "decoder"),
    ("pre", "rms", "swiglu", "sinusoidal", "all"),
    ("post", "layer", "gelu", "learned", "none"),
    ("pre", "layer", "swiglu", "learned", "decoder"),
    ("post", "rms", "relu", "learned", "all"),
    ("post", "rms", "swiglu", "rotary", "none"),
    ("post", "layer", "relu", "rotary", "decoder"),
    ("pre", "layer", "gelu", "rotary", "all"),
]
"""Any two values of different keys stand together in at least one of them."""


def drawn(model: Model) -> Model:
    """Give a model weights so large that its outputs are neither endless nor all alike."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def transformer(vocab: int, seed: int, keys: Sequence[str] = TRANSFORMERS[0], width: int = 8) -> Model:
    torch.manual_seed(seed)
    names = dict(zip(("norm_order", "norm", "activation", "positions", "tie"), keys, strict=True))
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 2 * width, "heads": 2, "feed_forward": 3 * width}
    return drawn(Transformer(Transformer.Config(**sizes, **names), vocab, vocab))


def packed(vocab: int, seed: int, keys: Sequence[str]) -> Model:
    """Return a Transformer as decoding has it on a CPU: of sizes for which whole layers have kernels."""
    model = transformer(vocab, seed, keys, width=32)
    pack(model)
    return model


def example_gru(vocab: int, seed: int) -> Model:
    registry.load_plugin(GRU)
    torch.manual_seed(seed)
    gru = registry.models.get("gru")
    return drawn(gru(gru.Config(hidden=16), vocab, vocab))


@dataclass(frozen=True)
class World:
    """What decodes: a model, or an ensemble."""

    name: str
    average: Ensemble = MEAN

    @property
    def bf16(self) -> bool:
        return self.name.startswith("bf16")

    @property
    def tolerance(self) -> float:
        """Of a score."""
        return ROUNDED if self.bf16 else 1e-4

    @property
    def without_crop(self) -> bool:
        """Whether a state cannot go back, as speculative decoding asks of it."""
        return "example" in self.name

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @cache  # noqa: B019 - the worlds are constants
    def members(self, vocab: int) -> list[Model]:
        if self.name == "example gru":
            return [example_gru(vocab, seed=11)]
        if self.name == "example gru and transformer":
            return [transformer(vocab, seed=12), example_gru(vocab, seed=13)]
        if self.name == "transformer and recurrent, weighted":
            return [transformer(vocab, 14, TRANSFORMERS[6]), TinyGru(vocab, seed=15)]
        if self.name.startswith("packed "):
            return [packed(vocab, 16, self.name.split()[1:])]
        if self.name == "two packed":
            return [packed(vocab, 17, TRANSFORMERS[0]), packed(vocab, 18, TRANSFORMERS[6])]
        keys = self.name.removeprefix("bf16 ").split()
        model = transformer(vocab, 20 + len(self.name), keys)
        return [model.to(torch.bfloat16) if self.bf16 else model]


WORLDS = [
    *(World(" ".join(keys)) for keys in TRANSFORMERS),
    *(World(" ".join(["bf16", *TRANSFORMERS[row]])) for row in (0, 5, 6)),
    *(World(" ".join(["packed", *TRANSFORMERS[row]])) for row in (1, 8)),
    World("two packed"),
    World("example gru"),
    World("example gru and transformer"),
    World("transformer and recurrent, weighted", Ensemble("log-probabilities", (0.3, 0.7))),
]
in_every_world = pytest.mark.parametrize("world", WORLDS, ids=str)

# Strategies ----------------------------------------------------------------------------------------------------------

DRAFTED = Speculative(draft=Path("unused"), draft_tokens=3)
GREEDY = Beam(beam=1, length_penalty=0.0)

VARIANTS: dict[str, list[Strategy]] = {
    "beam": [
        Beam(beam=1),
        Beam(beam=4, length_penalty=0.0),
        Beam(beam=3, stop="bound", normalization="gnmt"),
        Beam(beam=2, stop="never"),
    ],
    "diverse": [
        Diverse(beam=4),
        Diverse(beam=4, groups=2, stop="bound", diversity_strength=2.0),
        Diverse(beam=3, groups=1, stop="never"),
    ],
    "siblings": [Siblings(beam=3), Siblings(beam=2, diversity_rate=9.0, stop="never", normalization="gnmt")],
    "constrained": [Constrained(beam=4, length_penalty=0.5), Constrained(beam=1)],
    "contrastive": [Contrastive(), Contrastive(penalty_alpha=1.0, top_k=7), Contrastive(top_k=1)],
    "speculative": [DRAFTED, Speculative(draft=Path("unused"), draft_tokens=1)],
    "sampling": [
        Sampling(beam=1),
        Sampling(beam=3, temperature=0.7, top_p=0.9),
        Sampling(beam=2, top_k=2),
        Sampling(beam=2, typical=0.8, epsilon=0.01),
        Sampling(beam=2, min_p=0.1),
    ],
}
"""Of each registered strategy, ways to call it."""
every_strategy = pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world in WORLDS for name in VARIANTS if not (name == "speculative" and world.without_crop)],
    ids=str,
)

EQUAL: list[tuple[Strategy, list[Strategy]]] = [
    (Beam(beam=4), [Diverse(beam=4, groups=1, diversity_strength=3.0), Siblings(beam=4, diversity_rate=0.0)]),
    (Beam(beam=2, stop="bound"), [Diverse(beam=2, groups=1, stop="bound"), Constrained(beam=2, stop="bound")]),
    (
        Beam(beam=3, stop="never", normalization="gnmt"),
        [
            Diverse(beam=3, groups=1, stop="never", normalization="gnmt"),
            Siblings(beam=3, diversity_rate=0.0, stop="never", normalization="gnmt"),
            Constrained(beam=3, stop="never", normalization="gnmt"),
        ],
    ),
    (
        GREEDY,
        [
            Diverse(beam=1, length_penalty=0.0),
            Siblings(beam=1, diversity_rate=0.0, length_penalty=0.0),
            Constrained(beam=1, length_penalty=0.0),
            Sampling(temperature=0.0),
            Sampling(temperature=1e-6),
            Sampling(top_k=1),
            Sampling(top_p=1e-6),
            Sampling(min_p=1.0),
            Sampling(epsilon=0.999),
            Sampling(top_k=1, typical=0.1, min_p=0.5, epsilon=0.5, seed=7),
            Contrastive(penalty_alpha=0.0),
            Contrastive(top_k=1),
        ],
    ),
]
"""A search, and others that must find the same."""

LINES = [[(7 * i * j) % 80 + 5 for j in range(1, 2 + i % 5)] + [EOS] for i in range(8)]
MAXIMUM = [2 + 2 * (i % 4) for i in range(8)]
MINIMUM = [i % 3 for i in range(8)]
LIMITS = bounds(8, MAXIMUM, MINIMUM)


def search(
    world: World,
    strategy: Strategy,
    lines=LINES,
    limits=LIMITS,
    vocab: int = WIDE,
    draft: Model | None = None,
    extra: int = 0,
) -> list[list[Hypothesis]]:
    """Decode some lines together. draft: what helps, if the strategy asks for it; extra: needless padding."""
    members, (source, mask) = world.members(vocab), pad(lines, extra)
    given = (members, [source] * len(members), [mask] * len(members))
    helper = Stepper([draft or TinyGru(vocab)], source, mask) if strategy.helper() else None
    stepper = strategy.stepper(given, world.average, NEVER_WRITTEN, helper, int(limits.maximum.max()))
    return strategy(stepper, limits, [])


def written(one: Hypothesis) -> list[int]:
    """The tokens that have scores: EOS is the last of an output that has ended."""
    return [*one.tokens, *[EOS] * one.finished]


def forced_totals(world: World, line: Sequence[int], targets: Sequence[Sequence[int]], vocab: int) -> list[float]:
    """Return the log-probability of each target by teacher forcing."""
    known, _ = pad([[BOS, *target] for target in targets])
    source, mask = pad([line] * len(targets))
    return score_targets(world.members(vocab), source, mask, known, world.average).sum(1).tolist()


def ranked_by(strategy: Strategy, total: float, length: int) -> float:
    """The score of an output of this log-probability and length, EOS included."""
    if not isinstance(strategy, Beam):
        return total
    return total / (length if strategy.normalization == "power" else (5 + length) / 6) ** strategy.length_penalty


def agree(world: World, found: list[list[Hypothesis]], wanted: list[list[Hypothesis]]) -> None:
    """Check that outputs and scores are the same; in bf16 a single output may go on by another of two best tokens."""
    for ours, theirs in zip(found, wanted, strict=True):
        if world.bf16 and len(ours) == len(theirs) == 1:
            assert near_tie(ours[0], theirs[0])
            continue
        assert [written(one) for one in ours] == [written(one) for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=world.tolerance)
            assert one.token_scores == pytest.approx(other.token_scores, abs=world.tolerance)


def near_tie(ours: Hypothesis, theirs: Hypothesis) -> bool:
    """Whether two outputs are the same up to a place where the model finds the two tokens as good but for rounding."""
    columns = (written(ours), written(theirs), ours.token_scores, theirs.token_scores)
    for token, other, score, other_score in zip(*columns, strict=False):
        if abs(score - other_score) > ROUNDED:
            return False
        if token != other:
            return True
    return len(written(ours)) == len(written(theirs))


def meets(tokens: Sequence[int], constraints: Sequence[Sequence[Sequence[int]]]) -> bool:
    return all(
        any(
            list(tokens[start : start + len(phrase)]) == list(phrase)
            for phrase in phrases
            for start in range(len(tokens))
        )
        for phrases in constraints
    )


# Laws ----------------------------------------------------------------------------------------------------------------


def test_every_strategy_is_under_the_laws():
    built_in = {origin.name for origin in registry.strategies.origins() if origin.source == "built in"}
    assert built_in == set(VARIANTS), "VARIANTS needs ways to call each strategy; and what must it equal, in EQUAL?"
    for name, variants in VARIANTS.items():
        assert {type(one) for one in variants} == {registry.strategies.get(name)}


@every_strategy
def test_the_laws_of_plugin_authors(world, name):
    """Limits, order, padding, batch mates, rules, constraints, scores of tokens: what `check_strategy` tries."""
    number = WORLDS.index(world)  # the worlds take turns of the variants and of the vocabularies
    strategy, vocab = VARIANTS[name][number % len(VARIANTS[name])], (TINY, WIDE)[number % 2]
    trial = make_trial(strategy, world.members(vocab), vocab, seed=number, tolerance=world.tolerance)
    trial.ensemble = world.average
    for law in STRATEGY_LAWS:
        # Sums that are added up in another order may come to another best token once they are rounded to bf16.
        if not (world.bf16 and law is alone_or_together):
            law(trial)


@every_strategy
def test_scores_are_those_of_force_decoding_and_order_and_padding_change_nothing(world, name):
    number = WORLDS.index(world) + 1
    strategy = VARIANTS[name][number % len(VARIANTS[name])]
    found = search(world, strategy)
    for line, hypotheses in zip(LINES, found, strict=True):
        totals = forced_totals(world, line, [written(one) for one in hypotheses], WIDE)
        for one, total in zip(hypotheses, totals, strict=True):
            assert one.score == pytest.approx(ranked_by(strategy, total, len(written(one))), abs=world.tolerance)
    if not world.bf16:
        backwards = search(world, strategy, LINES[::-1], bounds(8, MAXIMUM[::-1], MINIMUM[::-1]), extra=3)
        agree(world, backwards[::-1], found)


@pytest.mark.parametrize(("plain", "others"), EQUAL, ids=["beam", "bound", "never", "greedy"])
@in_every_world
def test_what_must_find_the_same(world, plain, others):
    wanted = search(world, plain)
    for strategy in others:
        agree(world, search(world, strategy), wanted)


@in_every_world
def test_speculative_decoding_is_greedy_search_whatever_the_draft(world):
    if world.without_crop:
        with pytest.raises(UsageError, match="a Gru cannot forget tokens, which this strategy asks of it"):
            search(world, DRAFTED)
        return
    wanted = search(world, GREEDY)
    for draft in (*world.members(WIDE), transformer(WIDE, seed=3), TinyGru(WIDE)):
        for strategy in VARIANTS["speculative"]:
            agree(world, search(world, strategy, draft=draft), wanted)


@in_every_world
def test_a_beam_wide_enough_is_exhaustive_search(world):
    every = [[*tokens, EOS] for length in range(4) for tokens in product(range(4, TINY), repeat=length)]
    lines, limits = [[5, 4, EOS], [6, EOS]], bounds(2, 3)
    known = [dict(zip(map(tuple, every), forced_totals(world, line, every, TINY), strict=True)) for line in lines]
    # 27 outputs of three tokens, each with four ways to go on: with 108 rows nothing is ever dropped.
    for keys in ({"length_penalty": 0.0}, {"normalization": "gnmt", "stop": "bound"}, {"stop": "never"}):
        for strategy in (Beam(beam=108, **keys), Constrained(beam=108, **keys)):
            found = search(world, strategy, lines, limits, TINY)
            for hypotheses, totals in zip(found, known, strict=True):
                expect_all(world, strategy, hypotheses, totals)
    asked = [[[[5]], [[4, 6], [6, 6]]], [[[4]]]]
    # What the best output holds anyway leaves it where it is.
    best = [found[0].tokens for found in search(world, Beam(beam=108), lines, limits, TINY)]
    for constraints in (asked, [[[tokens[-2:]]] if tokens else [] for tokens in best]):
        strategy = Constrained(beam=108)
        found = search(world, strategy, lines, Limits(limits.minimum, limits.maximum, constraints), TINY)
        for hypotheses, totals, one in zip(found, known, constraints, strict=True):
            expect_all(world, strategy, hypotheses, {key: totals[key] for key in totals if meets(key, one)})
    assert [one[0].tokens for one in found] == best


def expect_all(world: World, strategy: Beam, found: list[Hypothesis], totals: dict[tuple[int, ...], float]) -> None:
    """Check that the finished outputs are all those of `totals`, with their scores, best first."""
    finished = {tuple(written(one)): one.score for one in found if one.finished}
    wanted = {key: ranked_by(strategy, total, len(key)) for key, total in totals.items()}
    assert finished == pytest.approx(wanted, abs=world.tolerance)
    if not world.bf16:
        assert list(finished) == sorted(wanted, key=wanted.__getitem__, reverse=True)


@in_every_world
def test_every_output_holds_its_constraints(world):
    chance = random.Random(world.name)
    constraints = [
        [[[chance.randrange(4, WIDE) for _ in range(1 + i % 3)] for _ in range(1 + i % 2)] for _ in range(i % 4)]
        for i in range(8)
    ]
    room = [2 + sum(len(phrases[0]) for phrases in one) for one in constraints]
    for beam in (1, 4):
        limits = bounds(8, room)
        found = search(world, Constrained(beam=beam), LINES, Limits(limits.minimum, limits.maximum, constraints))
        for hypotheses, asked in zip(found, constraints, strict=True):
            assert all(meets(one.tokens, asked) for one in hypotheses)


@in_every_world
def test_of_one_candidate_the_one_with_least_risk_is_that_one(world):
    for hypotheses in search(world, Beam(beam=2), LINES[:4], bounds(4, 6)):
        one = hypotheses[0]
        text = " ".join(f"w{token}" for token in one.tokens)
        only = Candidate(text, one.score, one.token_scores, one.finished, one.tokens)
        for reranker in (MinimumBayesRisk(), MinimumBayesRisk(metric="bleu", aggregate=True, weights="probability")):
            (found,) = rerank([Generated(Example("x"), [only])], reranker, 5)[0].candidates
            assert (found.text, found.score, found.tokens) == (text, one.score, one.tokens)
