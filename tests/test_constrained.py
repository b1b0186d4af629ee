"""Constrained search: the automaton, worked cases, exhaustive search, a slow search in plain Python, and texts."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import A, B, C, Scripted, TinyGru, bounds, pad, tiny_transformer
from test_beam import exhaustive, log_softmax, outputs, random_table

from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.constrained import BANKS, Constrained, take_turns
from encdec_cli.decoding.constraints import Automata
from encdec_cli.decoding.force import score_targets
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.generation.lines import Options, generate
from encdec_cli.recipe import from_resolved
from encdec_cli.text.example import Example
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.vocabulary import BOS, EOS
from tests.conftest import save


def search(strategy, model, constraints, maximum=10, minimum=0, lines=None, rules=()):
    """Search with the constraints of each sentence; a scripted model reads one line for each of its tables."""
    lines = lines or [[4 + i, EOS] for i in range(len(model.tables))]
    limits = bounds(len(lines), maximum, minimum)
    stepper = Stepper([model], *pad(lines), beam=strategy.beam)
    return strategy(stepper, Limits(limits.minimum, limits.maximum, constraints), rules)


def holds(tokens: Sequence[int], phrase: Sequence[int]) -> bool:
    return any(list(tokens[i : i + len(phrase)]) == list(phrase) for i in range(len(tokens) - len(phrase) + 1))


def meets(tokens, constraints) -> bool:
    return all(any(holds(tokens, phrase) for phrase in constraint) for constraint in constraints)


def lacking(tokens: Sequence[int], constraints) -> int:
    """How many tokens are missing, from the definition."""
    unmet = [constraint for constraint in constraints if not meets(tokens, [constraint])]
    begun = [0]
    for constraint in unmet:
        shortest = min(map(len, constraint))
        for phrase in constraint:
            known = max(n for n in range(len(phrase)) if list(tokens[len(tokens) - n :]) == list(phrase[:n]))
            begun.append(shortest - (len(phrase) - known))
    return sum(min(map(len, constraint)) for constraint in unmet) - max(begun)


# What is missing -----------------------------------------------------------------------------------------------------

letters = st.lists(st.integers(A, C + 2), min_size=1, max_size=4)
constraint_lists = st.lists(st.lists(letters, min_size=1, max_size=3), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(constraint_lists, st.lists(st.integers(A, C + 3), max_size=12)), min_size=1, max_size=4))
def test_what_is_missing_is_what_the_definition_says(sentences):
    constraints = [one for one, _ in sentences]
    if not any(constraints):
        constraints[0] = [[[A]]]
    texts = [tokens + [EOS] * 13 for _, tokens in sentences]
    automata = Automata(constraints, torch.device("cpu"))
    progress, places = automata.start(1).at(torch.arange(len(sentences))[:, None]), torch.arange(len(sentences))
    for written in range(13):
        wanted = [lacking(tokens[:written], one) for one, tokens in zip(constraints, texts, strict=True)]
        assert automata.missing(progress).flatten().tolist() == wanted
        progress = automata.read(places, progress, torch.tensor([[tokens[written]] for tokens in texts]))


def test_a_phrase_that_breaks_off_falls_back_to_what_has_begun_within_it():
    automata = Automata([[[[A, A, B]]]], torch.device("cpu"))
    progress, missing = automata.start(1).at(torch.tensor([[0]])), []
    for token in (A, A, A, B, C):
        progress = automata.read(torch.tensor([0]), progress, torch.tensor([[token]]))
        missing.append(automata.missing(progress).item())
    assert missing == [2, 1, 1, 0, 0]


def test_banks_take_turns():
    banks = torch.tensor([[2, 0, 2, 2, 0, 1, BANKS * BANKS], [5, 5, 5, 5, 5, 5, 5]])
    # The best of banks 0, 1, 2; then the second of 0 and 2; then the third of 2.
    assert take_turns(banks).tolist() == [[1, 5, 0, 4, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]]


# Worked cases --------------------------------------------------------------------------------------------------------

PLAIN = {(): {A: 0.7, B: 0.2, C: 0.1}, (A,): {EOS: 0.8, C: 0.2}, (B,): {EOS: 0.9, C: 0.1}, (A, C): {EOS: 1.0}}


def test_the_best_output_with_the_word_is_found():
    found = search(Constrained(beam=2, length_penalty=0), Scripted(PLAIN), [[[[C]]]])[0]
    # C alone has 0.1 (EOS follows surely), A C 0.14, B C 0.02.
    assert outputs(found) == [([A, C], True), ([C], True)]
    assert found[0].score == pytest.approx(math.log(0.7 * 0.2))
    assert found[0].token_scores == pytest.approx([math.log(0.7), math.log(0.2), 0])


def test_one_row_writes_the_phrase_at_once():
    """With a beam of 1 there is room for the bank that lacks least alone."""
    assert outputs(search(Constrained(beam=1), Scripted(PLAIN), [[[[C]]]])[0]) == [([C], True)]


def test_of_alternatives_the_better_one_is_written():
    found = search(Constrained(beam=3, length_penalty=0), Scripted(PLAIN), [[[[B], [C, C, C]]]])[0]
    assert found[0].tokens == [B]
    both = search(Constrained(beam=3, length_penalty=0), Scripted(PLAIN), [[[[B], [A]], [[C]]]])[0]
    assert both[0].tokens == [A, C]


def test_an_output_without_room_for_its_phrase_is_cut_and_lacks_as_little_as_can_be():
    endless = {tuple([A] * n): {A: 0.9, B: 0.1} for n in range(9)} | {tuple([B] * n): {B: 1.0} for n in range(1, 9)}
    found = search(Constrained(beam=3), Scripted(endless), [[[[B, B, B]]]], maximum=2)[0]
    assert outputs(found) == [([B, B], False)]
    assert outputs(search(Constrained(beam=3), Scripted(endless), [[[[B, B, B]]]], maximum=3)[0]) == [([B] * 3, False)]


def test_what_cannot_be_written_is_not_written_and_the_search_ends():
    def no_b(scores, prefix, sentences):
        return scores.index_fill(1, torch.tensor([B]), -torch.inf)

    found = search(Constrained(beam=2), TinyGru(), [[[[B]]]], lines=[[5, EOS]], maximum=6, rules=[no_b])[0]
    assert [(len(one.tokens), one.finished) for one in found] == [(6, False)] * 2


def test_the_minimum_length_holds():
    found = search(Constrained(beam=3), TinyGru(), [[[[B]]], []], lines=[[5, EOS]] * 2, minimum=[6, 2])
    assert all(len(one.tokens) >= 6 and holds(one.tokens, [B]) for one in found[0])


# Laws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_without_constraints_it_is_beam_search(build, beam):
    model = build()
    lines = [[(7 * i * j) % 140 + 5 for j in range(1, 2 + i % 5)] + [EOS] for i in range(12)]
    plain = search(Beam(beam=beam), model, (), lines=lines)
    assert search(Constrained(beam=beam), model, (), lines=lines) == plain
    # Beside a sentence that has constraints the others go the same way, through all of the machinery.
    mixed = [[[[9, 10]], [[11], [12]]] if i == 3 else [] for i in range(12)]
    found = search(Constrained(beam=beam), model, mixed, lines=lines)
    assert meets(found[3][0].tokens, mixed[3])
    assert [one for i, one in enumerate(found) if i != 3] == [one for i, one in enumerate(plain) if i != 3]


few_letters = st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=3)
small = st.lists(st.lists(few_letters, min_size=1, max_size=2), max_size=2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), small, st.integers(2, 4), st.integers(0, 2), st.sampled_from([0.0, 1.0]))
def test_a_beam_wide_enough_finds_the_best_outputs_that_meet_the_constraints(
    seed, constraints, maximum, minimum, penalty
):
    table = random_table(seed)
    every = exhaustive(table, maximum, minimum, lambda length: length**penalty)
    wanted = [(score, tokens) for score, tokens in every if meets(tokens, constraints)]
    strategy = {"beam": 324, "length_penalty": penalty}
    found = search(Constrained(**strategy), Scripted(table), [constraints], maximum, minimum)[0]
    finished = [one for one in found if one.finished]
    assert [one.tokens for one in finished] == [tokens for _, tokens in wanted]
    assert [one.score for one in finished] == pytest.approx([score for score, _ in wanted], abs=1e-5)
    # A constraint that the best output meets anyway changes nothing.
    if every and meets(every[0][1], constraints):
        plain = search(Beam(**strategy), Scripted(table), (), maximum, minimum)[0]
        assert finished[0] == plain[0]


def slow(table, size: int, limits: tuple[int, int], penalty: float, constraints) -> list[tuple[list[int], float, bool]]:
    """One sentence, plain Python, from the words in which `Constrained` describes itself."""
    minimum, maximum = limits
    words = {token for constraint in constraints for phrase in constraint for token in phrase}
    live, found = [((), 0.0)], []
    for length in range(maximum + 1):
        scored = {}
        for prefix, score in live:
            row = log_softmax(table(prefix))
            ends = length >= minimum and not lacking(prefix, constraints)
            scored |= {(prefix, token): score + row[token] for token in ([EOS] if ends else []) + [A, B, C]}
        best = sorted(scored, key=scored.get, reverse=True)[: 2 * size]
        best += [max((one for one in scored if one[0] == prefix), key=scored.get) for prefix, _ in live]
        nearer = [one for one in scored if lacking((*one[0], one[1]), constraints) < lacking(one[0], constraints)]
        best += [one for one in nearer if one[1] in words]
        banks: dict[int, list] = {}
        for one in sorted(set(best), key=scored.get, reverse=True):
            banks.setdefault(lacking((*one[0], one[1]) if one[1] != EOS else one[0], constraints), []).append(one)
        order = sorted((rank, bank, one) for bank, inside in banks.items() for rank, one in enumerate(inside))
        candidates = [one for _, _, one in order]
        ended = [prefix for prefix, token in candidates[:size] if token == EOS]
        found += [(list(prefix), scored[prefix, EOS] / (length + 1) ** penalty, True) for prefix in ended]
        if len(found) >= size:
            break
        if length == maximum:
            left = [one for one in live if one[0] not in ended][: size - len(found)]
            fewest = 0 if found else min(lacking(prefix, constraints) for prefix, _ in left)
            left = [one for one in left if lacking(one[0], constraints) == fewest]
            found += [(list(prefix), score / max(1, length) ** penalty, False) for prefix, score in left]
        going = [one for one in candidates if one[1] != EOS][:size]
        live = [((*prefix, token), scored[prefix, token]) for prefix, token in going]
    return sorted(found, key=lambda one: (not one[2], -one[1]))[:size]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 8), small), min_size=1, max_size=7),
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0]),
)
def test_a_batch_is_searched_as_its_sentences_one_by_one_in_plain_python(sentences, size, penalty):
    tables = [random_table(seed) for seed, _, _, _ in sentences]
    _, low, high, constraints = map(list, zip(*sentences, strict=True))
    found = search(Constrained(beam=size, length_penalty=penalty), Scripted(*tables), constraints, high, low)
    for place, ours in enumerate(found):
        wanted = slow(tables[place], size, (low[place], high[place]), penalty, constraints[place])
        assert outputs(ours) == [(tokens, finished) for tokens, _, finished in wanted]
        assert [one.score for one in ours] == pytest.approx([score for _, score, _ in wanted], abs=1e-5)


wide = st.lists(st.lists(st.lists(st.integers(4, 40), min_size=1, max_size=4), min_size=1, max_size=3), max_size=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(wide, min_size=1, max_size=6), st.integers(1, 7), st.sampled_from([TinyGru, tiny_transformer]))
def test_every_output_holds_what_was_asked_for(constraints, beam, build):
    """Finished or cut, if only its maximum has room for the phrases."""
    model, lines = build(vocab=60), [[5 + i, 20, EOS] for i in range(len(constraints))]
    room = [sum(min(map(len, one)) for one in constraint) for constraint in constraints]
    found = search(Constrained(beam=beam), model, constraints, [2 + n for n in room], 0, lines)
    for place, hypotheses in enumerate(found):
        for one in hypotheses:
            assert meets(one.tokens, constraints[place])
            target = torch.tensor([[BOS, *one.tokens, *[EOS] * one.finished]])
            scores = score_targets([model], *pad([lines[place]]), target)[0]
            torch.testing.assert_close(torch.tensor(one.token_scores), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_padding_order_and_batch_mates_change_nothing(build):
    model, chance = build(), random.Random(3)
    lines = [[chance.randint(5, 140) for _ in range(1 + i % 5)] + [EOS] for i in range(23)]
    constraints = [
        [[[chance.randint(5, 140) for _ in range(1 + i % 3)] for _ in range(1 + i % 2)] for _ in range(i % 4)]
        for i in range(23)
    ]
    maximum = [3 + 3 * (i % 7) for i in range(23)]
    strategy = Constrained(beam=4)
    together = search(strategy, model, constraints, maximum, lines=lines)
    backwards = search(strategy, model, constraints[::-1], maximum[::-1], lines=lines[::-1])[::-1]
    for place in range(23):
        alone = search(strategy, model, [constraints[place]], maximum[place], lines=[lines[place]])[0]
        assert outputs(alone) == outputs(backwards[place]) == outputs(together[place])


def test_a_stepper_of_another_beam_is_refused():
    stepper = Stepper([Scripted(PLAIN)], *pad([[4, EOS]]), beam=2)
    limits = bounds(1, 5)
    with pytest.raises(ValueError, match="has 2 rows a sentence, the search needs 3"):
        Constrained(beam=3)(stepper, Limits(limits.minimum, limits.maximum, [[[[A]]]]), [])


# Text ----------------------------------------------------------------------------------------------------------------

SENTENCE = "the house is big and red , however they saw houses in the old town . и дом"
CHINESE = "我喜欢猫。"


def corpus() -> list[str]:
    chance = random.Random(1)
    return [" ".join(chance.choices(SENTENCE.split(), k=8)) if i % 5 else CHINESE for i in range(400)]


@pytest.fixture(scope="module")
def pieces():
    return SentencePiece.train(corpus(), TokenizerOptions(size=360))


def bundle(tokenizer, task: str = "translation") -> Bundle:
    """A model with random weights."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "feed_forward": 16}
    recipe = from_resolved(
        {
            "task": {"name": task},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "model": {"name": "transformer", **sizes},
        }
    )
    torch.manual_seed(4)
    network = build_model(recipe, len(tokenizer.vocabulary), len(tokenizer.vocabulary)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return Bundle(recipe, network, tokenizer, tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_text_holds_the_phrases(pieces, workers):
    wanted = [[["house"]], [[", however"], ["猫", "zebra"]], [], [["red and big", "town"], ["houses"]], [["日"]]] * 3
    sources = [f"the {word} town" for word in SENTENCE.split()]
    lines = [Example(source, constraints=one) for source, one in zip(sources, wanted, strict=False)]
    model, options = bundle(pieces), {"n_best": 2, "batch": 4, "workers": workers}
    for place, result in enumerate(generate([model], [lines], Options(Constrained(beam=3), **options))):
        for candidate in result.candidates:
            for alternatives in wanted[place]:
                assert any(phrase in candidate.text for phrase in alternatives)
    plain = [Example(line.source) for line in lines]
    beam = list(generate([model], [plain], Options(Beam(beam=3), **options)))
    found = list(generate([model], [plain], Options(Constrained(beam=3), **options)))
    assert [one.candidates for one in found] == [one.candidates for one in beam]


def test_in_a_shell(forks, pieces, tmp_path):
    save(bundle(pieces), tmp_path / "model")
    save(bundle(pieces, "dialogue"), tmp_path / "chat")
    words = ("generate", "--workers", "1", "--strategy", "constrained,beam=3", "--model")
    content = "the town\thouse\told town|big\nthe town\n\thouse\nthe house\t\n"
    done = forks(*words, tmp_path / "model", stdin=content)
    assert done.code() == 0, done.stderr
    out = done.stdout.split("\n")[:-1]
    assert "house" in out[0]
    assert "old town" in out[0] or "big" in out[0]
    plain = forks("generate", "--model", tmp_path / "model", "--beam", "3", stdin="the town\n\nthe house\n")
    assert out[1:] == plain.stdout.split("\n")[:-1]
    # In a dialogue a TAB stands between turns, so its constraints come in records alone.
    record = {"turns": ["the", "town"], "constraints": ["house", ["猫", "zebra"]]}
    done = forks(*words, tmp_path / "chat", "--json", stdin=f"the\ttown\n{json.dumps(record)}\n")
    turns, asked = map(json.loads, done.stdout.split("\n")[:-1])
    assert "house" not in turns["text"]
    assert asked["constraints"] == record["constraints"]
    assert "house" in asked["text"]
    assert "猫" in asked["text"] or "zebra" in asked["text"]


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("the\thouse|", 4, "stdin:1: constraints: found an empty phrase"),
        ('{"source": "the", "constraints": "house"}', 4, "stdin:1: not a record .*expected a list, found str"),
        ('{"source": "the", "constraints": [3]}', 4, "found int"),
    ],
)
def test_what_is_no_constraint_is_told_with_its_line(forks, pieces, tmp_path, line, code, sentence):
    save(bundle(pieces), tmp_path / "model")
    done = forks("generate", "--model", tmp_path / "model", "--strategy", "constrained", "--json", stdin=line + "\n")
    assert (done.code(), bool(re.search(sentence, done.stderr))) == (code, True), done.stderr


def test_constraints_that_nobody_reads_are_told_of(forks, pieces, tmp_path):
    save(bundle(pieces), tmp_path / "model")
    record = '{"source": "the", "constraints": ["house"]}\n'
    done = forks("generate", "--model", tmp_path / "model", "--json", stdin=record * 2)
    assert done.code() == 0
    assert "the constraints of 2 records were not read; --strategy constrained reads them" in done.stderr
