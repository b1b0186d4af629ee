"""The steps under every search: scores, candidates, ensembles, teacher forcing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import VOCAB, A, B, C, Scripted, TinyGru, bounds, pad, run, tiny_transformer

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.force import score_targets
from encdec_cli.decoding.scorer import Scores, pack, unpack
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import BOS, EOS, PAD, UNK


def full_top(logits: torch.Tensor, k: int, banned: tuple[int, ...] = ()) -> list[list[tuple[float, int]]]:
    """The k best by a plain sort of everything, lowest token first among equals."""
    log_probs = logits.double().log_softmax(-1)
    rows = []
    for scores, log_prob in zip(logits.tolist(), log_probs.tolist(), strict=True):
        order = sorted((t for t in range(len(scores)) if t not in banned), key=lambda t: (-scores[t], t))
        rows.append([(log_prob[token], token) for token in order[:k]])
    return rows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([4, 7, 63, 64, 65, 128, 200, 1000]),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_top_is_log_softmax_then_topk(rows, vocab, k, seed, ties):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    if ties:  # few distinct values: equal scores everywhere
        logits = logits.div(4).round()
    log_probs, tokens = Scores(logits.clone(), banned=(PAD, UNK)).top(k)
    for row, wanted in enumerate(full_top(logits, min(k, vocab - 2), banned=(PAD, UNK))):
        assert tokens[row, : len(wanted)].tolist() == [token for _, token in wanted]
        torch.testing.assert_close(log_probs[row, : len(wanted)].tolist(), [x for x, _ in wanted], rtol=0, atol=1e-4)


def test_top_of_bfloat16_logits():
    logits = (torch.randn(7, 300, generator=torch.Generator().manual_seed(3)) * 3).bfloat16()
    log_probs, tokens = Scores(logits.clone()).top(9)
    wanted = full_top(logits, 9)
    assert tokens.tolist() == [[token for _, token in row] for row in wanted]
    torch.testing.assert_close(log_probs, torch.tensor([[x for x, _ in row] for row in wanted]))


def test_a_row_does_not_depend_on_its_batch_mates():
    logits = torch.randn(600, 1000, generator=torch.Generator().manual_seed(3)) * 5
    scores, tokens = Scores(logits.clone()).top(5)
    for row in (0, 261, 262, 599):  # either side of a block
        alone, its_tokens = Scores(logits[row : row + 1].clone()).top(5)
        assert its_tokens.tolist() == tokens[row : row + 1].tolist()
        torch.testing.assert_close(alone, scores[row : row + 1])


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 1e4, 0.0, -1e4], [-2e4, -3e4, -2e4, -9e4]])
    assert Scores(logits.clone()).log_probs()[:, 0].tolist() == pytest.approx([math.log(0.5)] * 2, abs=1e-3)


def test_banned_tokens_stay_in_the_normaliser():
    logits = torch.tensor([[0.7, 0.1, 0.2]]).log()
    scores = Scores(logits, banned=(0,))
    assert scores.log_probs().exp().tolist()[0] == pytest.approx([0, 0.1, 0.2])
    log_probs, tokens = scores.top(2)
    assert tokens.tolist() == [[2, 1]]
    assert log_probs.exp().tolist()[0] == pytest.approx([0.2, 0.1])


def test_forbid_touches_only_the_rows_named():
    logits = torch.tensor([[0.7, 0.1, 0.2], [0.7, 0.1, 0.2]]).log()
    scores = Scores(logits)
    scores.forbid(0, torch.tensor([True, False]))
    assert scores.top(1)[1].tolist() == [[2], [0]]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_pack_sorts_by_value_then_lowest_id(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    keys = pack(tensor, torch.arange(len(values)))
    back, ids = unpack(keys)
    assert ids.tolist() == list(range(len(values)))
    assert torch.equal(back, tensor)
    assert keys.argsort(descending=True).tolist() == sorted(range(len(values)), key=lambda i: (-tensor[i].item(), i))


def test_best_ranks_the_rows_of_a_sentence_together():
    # Two rows of one sentence: totals log .6 and log .4.
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]).log()
    best = Scores(logits).best(4, torch.tensor([[0.6, 0.4]]).log())
    assert best.totals.exp().tolist()[0] == pytest.approx([0.36, 0.30, 0.18, 0.12])
    assert best.parents.tolist() == [[1, 0, 0, 0]]
    assert best.tokens.tolist() == [[0, 0, 1, 2]]


def test_stepper_bans_pad_bos_and_unk_by_default():
    chances = {PAD: 0.3, UNK: 0.3, BOS: 0.2, A: 0.15, EOS: 0.05}
    stepper = Stepper([Scripted({(): chances})], *pad([[4, EOS]]))
    log_probs, tokens = stepper.step(torch.tensor([BOS])).top(2)
    assert tokens.tolist() == [[A, EOS]]
    assert log_probs.exp().tolist()[0] == pytest.approx([0.15, 0.05])
    assert (stepper.sentences, stepper.rows) == (1, 1)


def test_scores_leave_the_hidden_states_of_an_identity_projection_alone():
    class Shared(Scripted):
        memory = torch.zeros(1, 1, VOCAB)

        def decode(self, tokens, state):
            return self.memory

    model = Shared({})
    Stepper([model], *pad([[4, EOS]])).step(torch.tensor([BOS]))
    assert torch.isfinite(model.memory).all()


def test_keys_know_the_source_not_its_place():
    lines = [[7, 8, EOS], [9, EOS], [7, 8, 10, EOS]]
    model = Scripted(*({} for _ in range(8)))
    keys = Stepper([model], *pad(lines)).keys
    assert len(set(keys)) == 3
    assert all(0 <= key < 2**63 for key in keys)
    assert Stepper([model], *pad(lines[::-1], extra=5)).keys == keys[::-1]


def test_ensemble_is_the_mean_of_probabilities():
    one, two = Scripted({(): {A: 0.8, B: 0.2}}), Scripted({(): {A: 0.1, C: 0.9}})
    scores = Stepper([one, two], *pad([[4, EOS]])).step(torch.tensor([BOS]))
    assert scores.log_probs().exp().tolist()[0] == pytest.approx([0, 0, 0, 0, 0.45, 0.1, 0.45])
    assert scores.top(3)[1].tolist() == [[A, C, B]]


def test_ensemble_of_one_model_with_itself_is_that_model():
    model, lines = TinyGru(), [[5, 6, 7, EOS], [20, EOS], [9, 9, EOS]]
    alone = run(Beam(beam=4), model, lines=lines)
    for members in (2, 3):
        together = run(Beam(beam=4), [model] * members, lines=lines)
        for ours, theirs in zip(alone, together, strict=True):
            assert [one.tokens for one in ours] == [one.tokens for one in theirs]
            assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-5)


def test_ensemble_members_of_unequal_vocabulary_are_refused():
    stepper = Stepper([TinyGru(20), TinyGru(21)], *pad([[5, EOS]]))
    with pytest.raises(ValueError, match="found sizes 20 and 21"):
        stepper.step(torch.tensor([BOS]))


def test_score_targets_by_hand():
    model = Scripted({(): {A: 0.5, B: 0.5}, (A,): {B: 0.25, EOS: 0.75}, (A, B): {EOS: 0.125, C: 0.875}})
    source, mask = pad([[4, EOS], [4, EOS]])
    target, _ = pad([[BOS, A, B, EOS], [BOS, A, EOS]])
    scores = score_targets([model], source, mask, target)
    assert scores.exp().tolist()[0] == pytest.approx([0.5, 0.25, 0.125])
    assert scores.tolist()[1] == pytest.approx([math.log(0.5), math.log(0.75), 0.0])  # padding counts nothing


def test_score_targets_of_an_ensemble_averages_probabilities():
    one, two = Scripted({(): {A: 0.8, B: 0.2}}), Scripted({(): {A: 0.1, B: 0.9}})
    target = torch.tensor([[BOS, A, EOS]])
    scores = score_targets([one, two], *pad([[4, EOS]]), target)
    assert scores.exp().tolist()[0] == pytest.approx([0.45, 1.0])


def test_score_targets_is_the_plain_log_softmax_whatever_the_chunk(monkeypatch):
    model, (source, mask) = TinyGru(), pad([[5, 6, EOS], [7, EOS]])
    target, _ = pad([[BOS, 8, 9, 10, EOS], [BOS, 11, EOS]])
    with torch.no_grad():
        logits = model.project(model(source, mask, target[:, :-1]))
    wanted = logits.log_softmax(-1).gather(2, target[:, 1:, None])[..., 0] * (target[:, 1:] != PAD)
    torch.testing.assert_close(score_targets([model], source, mask, target), wanted)
    monkeypatch.setattr("encdec_cli.decoding.force.POSITIONS", 2)
    torch.testing.assert_close(score_targets([model], source, mask, target), wanted)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_the_score_of_a_search_is_the_score_of_teacher_forcing(build, members):
    models = [build(seed=seed) for seed in range(members)]
    lines = [[5, 6, 7, EOS], [20, EOS], [9, 9, 30, 31, EOS]]
    found = run(Beam(beam=3, length_penalty=0.7), models, maximum=[4, 12, 9], lines=lines)
    source, mask = pad(lines)
    for sentence, hypotheses in enumerate(found):
        for one in hypotheses:
            target = torch.tensor([[BOS, *one.tokens, *([EOS] if one.finished else [])]])
            forced = score_targets(models, source[[sentence]], mask[[sentence]], target)[0]
            assert one.token_scores == pytest.approx(forced.tolist(), abs=1e-5)
            assert one.score == pytest.approx(forced.sum().item() / len(forced) ** 0.7, abs=1e-5)


def test_coin_plugin_decides_between_the_two_best():
    from encdec_cli.registry import load_plugin, strategies

    load_plugin(Path(__file__).parent.parent / "docs" / "examples" / "coin.py")
    coin = strategies.get("coin")
    model, lines = TinyGru(), [[i, i + 1, EOS] for i in range(5, 30)]
    best = run(Beam(beam=1), model, lines=lines, maximum=6)
    assert [one[0].tokens for one in run(coin(bias=1.0), model, lines=lines, maximum=6)] == [x[0].tokens for x in best]
    assert [one[0].tokens for one in run(coin(bias=0.5), model, lines=lines, maximum=6)] != [x[0].tokens for x in best]
    source, mask = pad(lines[:1])
    second = Stepper([model], source, mask).step(torch.tensor([BOS])).top(2)[1][0, 1]
    found = coin(bias=0.0)(Stepper([model], source, mask), bounds(1, 6), [])[0][0]
    assert (found.tokens or [EOS])[0] == second
