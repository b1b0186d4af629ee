"""The inner loops in C: each against its definition and against torch's operators, and what happens without them."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import run

from encdec_cli import kernels
from encdec_cli.decoding.beam import Beam, parted
from encdec_cli.decoding.scorer import Candidates, Scores, normalise
from encdec_cli.models.attention import attend
from encdec_cli.models.layers import make_norm
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import EOS
from tests.conftest import encdec

compiled = pytest.mark.skipif(kernels.library() is None, reason="this machine has no C compiler")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FAR = torch.finfo(torch.float32).min / 2


@pytest.fixture
def without(monkeypatch):
    """Call this for torch's operators from then on."""
    return lambda: monkeypatch.setattr("encdec_cli.kernels.matrix.library", lambda: None)


def close(found, wanted, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1.2e-2
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@compiled
@TYPES
@pytest.mark.parametrize("width", [32, 64, 96])
@torch.inference_mode()
def test_attention_is_its_formula_for_every_kind_of_mask(width, dtype):
    generator = torch.Generator().manual_seed(width)
    for queries, keys in ((1, 1), (5, 3), (5, 40), (16, 17)):
        # The query is a view into what one matrix made, as in a layer.
        joined = torch.randn(3, queries, 3, 2, width, generator=generator).to(dtype)
        query = joined.permute(2, 0, 3, 1, 4)[0]
        key, value = torch.randn(2, 3, 2, keys, width, generator=generator).to(dtype).unbind(0)
        seen = torch.rand(3, 1, queries, keys, generator=generator) < 0.4
        seen[..., 0] = True
        by_place = torch.randn(3, 1, 1, keys, generator=generator).to(dtype)
        masks = [None, by_place, *(torch.zeros(one.shape).masked_fill(~one, FAR).to(dtype) for one in (seen, seen[:1]))]
        for mask in masks:
            scores = query.double() @ key.double().transpose(2, 3) / math.sqrt(width)
            wanted = (scores if mask is None else scores + mask.double()).softmax(-1) @ value.double()
            found = kernels.attend(query, key, value, mask)
            close(found, wanted, dtype)
            assert torch.equal(attend(query, key, value, mask), found)
            its_mask = mask[1:2] if mask is not None and len(mask) > 1 else mask
            alone = kernels.attend(query[1:2], key[1:2], value[1:2], its_mask)
            assert torch.equal(alone[0], found[1])


@compiled
@torch.inference_mode()
def test_masks_that_are_wider_than_they_look_and_dropout_are_left_to_torch():
    query, key, value = torch.randn(3, 2, 2, 4, 32).unbind(0)
    plain = attend(query, key, value)
    torch.testing.assert_close(attend(query, key, value, torch.zeros(2, 1, 1, 1)), plain)
    torch.testing.assert_close(attend(query, key, value, torch.zeros(1, 2, 4, 4)), plain)
    torch.testing.assert_close(attend(query, key, value, torch.zeros(4, 2).T[:, None, None].expand(2, 1, 4, 4)), plain)
    assert not torch.equal(attend(query, key, value, dropout=0.5), plain)


@compiled
@torch.inference_mode()
def test_a_query_that_may_look_nowhere_looks_everywhere():
    query, key, value = torch.randn(3, 1, 1, 4, 32).unbind(0)
    found = kernels.attend(query, key, value, torch.full((1, 1, 4, 4), FAR))
    close(found, kernels.attend(query, key, value, None), torch.float32)


@compiled
@TYPES
@pytest.mark.parametrize("vocab", [1, 31, 64, 100, 1000])
@torch.inference_mode()
def test_the_normaliser_and_the_maxima(vocab, dtype):
    logits = (torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab)) * 20).to(dtype)
    logits[0] = -1e4
    logits[1, : vocab // 2] = -torch.inf
    normaliser, maxima = kernels.scan(logits)
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=2e-6)
    wanted = [logits[:, start : start + 64].amax(1).float() for start in range(0, vocab, 64)]
    assert torch.equal(maxima, torch.stack(wanted, 1))
    banned = (0, vocab - 1, vocab // 2)
    its_logits = logits.clone()
    same, its_maxima = kernels.scan(its_logits, banned)
    logits[:, banned] = -torch.inf
    wanted = [logits[:, start : start + 64].amax(1).float() for start in range(0, vocab, 64)]
    assert torch.equal(same, normaliser)
    assert torch.equal(its_logits, logits)
    assert torch.equal(its_maxima, torch.stack(wanted, 1))


@compiled
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 5, 64, 65, 300]), st.integers(1, 64), st.data())
def test_candidates_are_those_of_torch_in_the_same_order(sentences, beam, vocab, k, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(sentences * beam, vocab, generator=generator) * 3
    totals = torch.randn(sentences, beam, generator=generator).round()
    if data.draw(st.booleans()):  # equal scores everywhere
        logits = logits.round()
    totals[torch.rand(totals.shape, generator=generator) < 0.3] = -torch.inf
    with torch.inference_mode():
        scores = Scores(logits, banned=(vocab // 2,))
        found = scores.best(k, totals)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("encdec_cli.kernels.matrix.library", lambda: None)
            wanted = scores.best(k, totals)
    for one, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert torch.equal(one, other)


@compiled
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 8), st.integers(0, 10**6))
@torch.inference_mode()
def test_what_goes_on_and_what_ends_is_that_of_torch(slots, width, more, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (slots, width + more)
    totals = torch.randn(shape, generator=generator).sort(1, descending=True).values
    totals = totals.where(torch.rand(shape, generator=generator) < 0.8, -torch.inf)
    parents = torch.randint(0, width, shape, generator=generator)
    tokens = torch.randint(EOS, EOS + 3, shape, generator=generator)
    before = torch.randn((slots, width), generator=generator)
    before[torch.rand(slots, generator=generator) < 0.3] = -torch.inf
    best = Candidates(totals, parents, tokens)
    found, ending, happened = parted(best, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encdec_cli.kernels.matrix.library", lambda: None)
        wanted, its_ending, its_happened = parted(best, before)
    assert [bool(one) for one in happened] == its_happened
    for one, other in zip((*vars(found).values(), ending), (*vars(wanted).values(), its_ending), strict=True):
        assert torch.equal(one, other)


@compiled
@TYPES
@pytest.mark.parametrize(("kind", "bias"), [("layer", True), ("layer", False), ("rms", False)])
@torch.inference_mode()
def test_norms_are_those_of_torch(without, kind, bias, dtype):
    norm = make_norm(kind, 96, bias).to(dtype)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(96))
    x = (torch.randn(3, 5, 96) * 4 + 9).to(dtype)
    found = norm(x)
    without()
    close(found, norm(x), dtype)


@compiled
@pytest.mark.parametrize("beam", [1, 4, 9])
def test_a_search_finds_the_same(without, beam):
    torch.manual_seed(6)
    model = Transformer(Transformer.Config(1, 2, 64, 2, 128, positions="rotary"), 50, 50).eval()
    lines = [[5, 6, 7, 3], [20, 3], [9, 9, 30, 31, 3]]
    found = run(Beam(beam=beam), model, maximum=12, lines=lines)
    without()
    for ours, theirs in zip(found, run(Beam(beam=beam), model, maximum=12, lines=lines), strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-5)


@compiled
def test_what_they_cannot_take_is_left_to_torch():
    x = torch.ones(2, 64)
    assert not kernels.usable(x)  # gradients are on
    with torch.inference_mode():
        assert kernels.usable(x)
        assert not kernels.usable(x, x.bfloat16())
        assert not kernels.usable(x.double())
        assert not kernels.usable(x.to("meta"))


@compiled
@TYPES
@torch.inference_mode()
def test_rows_are_shared_out_over_threads_bit_by_bit(monkeypatch, dtype):
    x, weight = torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    alone = [kernels.norm(x, weight, weight, 1e-5, centred=True), *kernels.scan(x.clone(), (3, 70))]
    monkeypatch.setattr("encdec_cli.kernels.matrix.SHARED_OUT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = [kernels.norm(x, weight, weight, 1e-5, centred=True), *kernels.scan(x.clone(), (3, 70))]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


@compiled
def test_what_is_compiled_is_kept_and_made_again_where_it_is_spoilt(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh = kernels.library.__wrapped__
    assert fresh() is not None
    (kept,) = (tmp_path / "cache" / "encdec").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert fresh() is not None
    for folder, content in (("spoilt", b"no library"), ("in the way", None)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        if content is None:
            (tmp_path / folder).write_text("a file, so that nothing can be kept")
        else:
            spoilt = tmp_path / folder / "encdec" / kept.name
            spoilt.parent.mkdir(parents=True)
            spoilt.write_bytes(content)
        assert fresh() is not None
    assert spoilt.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("compiler", ["", "false", "no-such-compiler -v", "gcc 'unbalanced"])
def test_a_compiler_that_does_not_work_is_none(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.library.__wrapped__() is None
    assert not list(tmp_path.iterdir())


@compiled
def test_without_a_home_torch_does_the_work(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert kernels.library.__wrapped__() is None


@compiled
@TYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 70])
@torch.inference_mode()
def test_what_is_no_number_shows(bad, place, dtype):
    logits = torch.randn(4, 71).to(dtype)
    logits[1, place] = bad
    normaliser, maxima = kernels.scan(logits)
    assert normaliser.isnan().tolist() == [False, True, False, False]
    values, _, _ = kernels.candidates(logits, normaliser, maxima, torch.zeros(2, 2), 3)
    assert values.isnan().all(1).tolist() == [True, False]
    query, key, value = torch.randn(3, 2, 2, 4, 32).to(dtype).unbind(0)
    key[0, 1, 2, 5] = torch.nan
    found = attend(query, key, value).isnan()
    assert found[0, 1].all()
    assert not found[0, 0].any()
    assert not found[1].any()


@compiled
@torch.inference_mode()
def test_views_and_keys_that_broadcast_give_what_torch_gives(without):
    logits, query, key = torch.randn(128, 5).T, torch.randn(2, 2, 4, 32), torch.randn(2, 1, 1, 3, 32)
    work = [lambda: normalise(logits), lambda: attend(query, *key)]
    ours = [each() for each in work]
    without()
    for one, each in zip(ours, work, strict=True):
        torch.testing.assert_close(one, each(), rtol=1e-4, atol=1e-4)


def test_the_command_needs_no_compiler(copy_run):
    done = encdec("generate", "--model", copy_run, stdin="1 2 3\n4 5\n", CC="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 2 3\n4 5\n", "")
    done = encdec("generate", "--model", copy_run, stdin="1 2 3\n", CC="no-such-compiler")
    assert (done.returncode, done.stdout) == (0, "1 2 3\n")
    assert done.stderr.startswith("note: no C compiler works here")
