"""Contrastive search: worked cases, the search in plain words from whole prefixes, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from scripted import VOCAB, A, B, C, ScriptedState, TinyGru, bounds, pad, run, tiny_transformer
from torch import Tensor

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.contrastive import Contrastive
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.models.model import Memory, Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import BOS, EOS, UNK


class Directions(Model):
    """A scripted model whose hidden state points into the direction that is written in the test for each prefix."""

    def __init__(self, table: Mapping[tuple[int, ...], Mapping[int, float]], angles: Mapping[tuple[int, ...], float]):
        super().__init__()
        self.table, self.angles = table, angles
        self.prefixes: list[tuple[int, ...]] = [()]

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return Memory(source[..., None].float(), mask)

    def start(self, memory: Memory, beam: int = 1) -> ScriptedState:
        return ScriptedState([0] * len(memory.mask) * beam, beam)

    def decode(self, tokens: Tensor, state: ScriptedState) -> Tensor:
        hidden = []
        for row, token in enumerate(tokens[:, 0].tolist()):
            state.prefixes[row] = (*state.prefixes[row], token)
            prefix = state.prefixes[row][1:]
            self.prefixes.append(prefix)
            angle = math.radians(self.angles.get(prefix, 90.0))
            # The length says which prefix it is, and changes no angle.
            length = float(len(self.prefixes))
            hidden.append([length * math.cos(angle), length * math.sin(angle)])
        return torch.tensor(hidden, dtype=torch.float64)[:, None]

    def project(self, hidden: Tensor) -> Tensor:
        rows = []
        for length in hidden.norm(dim=1).round().long().tolist():
            chances = self.table.get(self.prefixes[length - 1], {EOS: 1.0})
            rows.append([math.log(chances.get(token, 1e-30)) for token in range(VOCAB)])
        return torch.tensor(rows)


ONE = {(): {A: 0.6, B: 0.4}}
"""One token; BOS points to 0 degrees."""


@pytest.mark.parametrize(
    ("alpha", "token"),
    [
        # A points to 60 degrees, likeness .5 to BOS, and B to 90, likeness 0:
        # (1 - a) .6 - a .5 is below (1 - a) .4 where .2 < a .7.
        (0.28, A),
        (0.29, B),
    ],
)
def test_the_more_probable_token_loses_to_the_less_alike(alpha, token):
    model = Directions(ONE, {(): 0.0, (A,): 60.0, (B,): 90.0})
    found = run(Contrastive(penalty_alpha=alpha, top_k=2), model, lines=[[4, EOS]])[0]
    assert [one.tokens for one in found] == [[token]]
    assert found[0].finished
    # Its score is the model's.
    assert found[0].score == pytest.approx(math.log(ONE[()][token]))
    assert found[0].token_scores == pytest.approx([math.log(ONE[()][token]), 0.0], abs=1e-6)


def test_it_is_the_likeness_to_the_nearest_of_all_states_before():
    # After A at 90 degrees: AA at 0 repeats BOS, AB at 100 nearly repeats A, AC at 45 is .707 from both.
    table = {(): {A: 1.0}, (A,): {A: 0.5, B: 0.3, C: 0.2}}
    angles = {(): 0.0, (A,): 90.0, (A, A): 0.0, (A, B): 100.0, (A, C): 45.0}
    # a = .4: .6 x (.5 .3 .2) - .4 x (1 .985 .707) = -.100, -.214, -.163.
    # a = .6: .4 x (.5 .3 .2) - .6 x (1 .985 .707) = -.400, -.471, -.344.
    for alpha, tokens in ((0.4, [A, A]), (0.6, [A, C])):
        found = run(Contrastive(penalty_alpha=alpha, top_k=3), Directions(table, angles), lines=[[4, EOS]])[0]
        assert found[0].tokens == tokens
    # Opposite directions are the least alike.
    angles[(A, B)] = 225.0
    found = run(Contrastive(penalty_alpha=0.6, top_k=3), Directions(table, angles), lines=[[4, EOS]])[0]
    assert found[0].tokens == [A, B]


def test_only_the_best_top_k_are_tried():
    model = Directions({(): {A: 0.5, B: 0.3, C: 0.2}}, {(): 0.0, (A,): 10.0, (B,): 30.0, (C,): 180.0})
    for top_k, tokens in ((1, [A]), (2, [B]), (3, [C])):
        assert run(Contrastive(penalty_alpha=0.9, top_k=top_k), model, lines=[[4, EOS]])[0][0].tokens == tokens


def test_eos_is_tried_like_any_token():
    model = Directions({(): {EOS: 0.7, A: 0.3}}, {(): 0.0, (EOS,): 0.0, (A,): 90.0})
    for alpha, tokens in ((0.2, []), (0.5, [A])):
        found = run(Contrastive(penalty_alpha=alpha, top_k=2), model, lines=[[4, EOS]])[0][0]
        assert (found.tokens, found.finished) == (tokens, True)
        assert len(found.token_scores) == len(tokens) + 1
    assert run(Contrastive(penalty_alpha=0.2, top_k=2), model, minimum=1, lines=[[4, EOS]])[0][0].tokens == [A]


def test_unk_is_never_written_and_the_limit_cuts():
    table = {tuple([A] * n): {UNK: 0.5, A: 0.4, B: 0.1} for n in range(5)}
    found = run(Contrastive(top_k=2, penalty_alpha=0.1), Directions(table, {}), maximum=3, lines=[[4, EOS]])[0][0]
    assert (found.tokens, found.finished) == ([A, A, A], False)
    assert found.token_scores == pytest.approx([math.log(0.4)] * 3)


def test_a_rule_that_forbids_everything_leaves_what_was_written():
    def stop(scores, prefix, sentences):
        return scores if prefix.shape[1] < 2 else torch.full_like(scores, -torch.inf)

    found = run(Contrastive(), TinyGru(), minimum=4, lines=[[5, EOS], [9, 8, EOS]], rules=[stop])
    assert [(len(one[0].tokens), one[0].finished) for one in found] == [(2, False), (2, False)]


LINES = [[(7 * i * j) % 6 + 5 for j in range(1, 2 + i % 5)] + [EOS] for i in range(23)]
SMALL = 12
"""Tokens of a vocabulary that is small enough for EOS to be likely."""
MAXIMUM = [3 + 2 * (i % 7) for i in range(23)]
MINIMUM = [i % 3 for i in range(23)]


def slow(models, line, maximum, minimum, alpha, top_k):
    """Equation 5, the states of every candidate from its whole prefix."""

    def states(written):
        return [model(*pad([line]), torch.tensor([[BOS, *written]]))[0] for model in models]

    def likeness(written):
        cosines = [torch.nn.functional.cosine_similarity(hidden[-1:], hidden[:-1]) for hidden in states(written)]
        return float(torch.stack(cosines).mean(0).max())

    written = []
    with torch.no_grad():
        while True:
            pairs = zip(models, states(written), strict=True)
            chances = torch.stack([model.project(hidden[-1:])[0].softmax(-1) for model, hidden in pairs]).mean(0)
            chances[[0, 1, 2]] = 0
            if len(written) < minimum:
                chances[EOS] = 0
            if len(written) == maximum:
                return written, int(chances.argmax()) == EOS
            tried = chances.topk(top_k).indices.tolist()
            values = [(1 - alpha) * float(chances[v]) - alpha * likeness([*written, v]) for v in tried]
            token = tried[values.index(max(values))]
            if token == EOS:
                return written, True
            written.append(token)


@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
@pytest.mark.parametrize("members", [1, 2])
def test_a_batch_is_searched_as_its_sentences_one_by_one_from_whole_prefixes(build, members):
    models = [build(SMALL, seed=seed) for seed in range(3, 3 + members)]
    for alpha, top_k in ((0.6, 4), (0.3, 7)):
        found = run(Contrastive(penalty_alpha=alpha, top_k=top_k), models, MAXIMUM, MINIMUM, LINES)
        assert any(one[0].finished for one in found)
        for line, maximum, minimum, ours in zip(LINES, MAXIMUM, MINIMUM, found, strict=True):
            assert (ours[0].tokens, ours[0].finished) == slow(models, line, maximum, minimum, alpha, top_k)


def test_it_repeats_less_than_greedy_search():
    model, lines = tiny_transformer(), [[i, i + 1, EOS] for i in range(5, 25)]
    greedy, found = (
        run(strategy, model, maximum=12, minimum=8, lines=lines) for strategy in (Beam(beam=1), Contrastive())
    )
    different = [sum(len(set(one[0].tokens)) / len(one[0].tokens) for one in outputs) for outputs in (greedy, found)]
    assert different[1] > different[0]


def test_no_token_is_read_beyond_the_model_s_positions():
    torch.manual_seed(1)
    config = Transformer.Config(
        encoder_layers=1, decoder_layers=1, d_model=16, heads=2, feed_forward=16, positions="learned", max_positions=8
    )
    found = run(Contrastive(), Transformer(config, 30, 30).eval(), maximum=7, minimum=7, lines=[[5, EOS], [6, EOS]])
    assert [len(one[0].tokens) for one in found] == [7, 7]


@pytest.mark.parametrize("wrong", [{"beam": 2}, {"penalty_alpha": -0.1}, {"penalty_alpha": 1.1}, {"top_k": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Contrastive(**wrong)


def test_a_stepper_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="has 1 rows a sentence, the search needs 4"):
        Contrastive()(Stepper([TinyGru()], *pad([[4, EOS]])), bounds(1, 5), [])
