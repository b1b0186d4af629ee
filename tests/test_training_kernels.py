"""What training on a CPU does in C between the products: each against its definition, in more digits, and torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encdec_cli import kernels
from encdec_cli.kernels.dropout import draw
from encdec_cli.models.dropout import Dropout, drawing, dropout, keep_mask
from encdec_cli.models.layers import make_norm
from encdec_cli.training.loss import CrossEntropy
from encdec_cli.training.objective import Agreement

wide = pytest.mark.skipif(not kernels.wide(), reason="no C compiler, or neither AVX-512 nor AVX2")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SOME = settings(max_examples=40, deadline=None)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 10**6)


@pytest.fixture
def without(monkeypatch):
    """Call this for torch's operators from then on."""
    return lambda: monkeypatch.setattr("encdec_cli.kernels.matrix.library", lambda: None)


@pytest.fixture
def threads(monkeypatch):
    """Call this to let all work be shared out over so many threads from then on."""

    def share(count: int) -> None:
        monkeypatch.setattr("encdec_cli.kernels.matrix.SHARED_OUT", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)

    return share


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, wanted: Tensor, share: float) -> None:
    """To a share of the largest number that is wanted, or of 1, and to half a step of the type that was found."""
    step, most = torch.finfo(found.dtype).eps / 2, max([1.0, *wanted.abs().flatten().tolist()])
    torch.testing.assert_close(found.double(), wanted.double(), rtol=step, atol=share * most)


def criterion(rows: int, vocab: int, seed: int, prior: bool = False, scale: bool = False) -> CrossEntropy:
    target = torch.randint(vocab, (rows,), generator=generator(seed))
    shares = torch.rand(vocab, generator=generator(seed)) if prior else None
    scales = torch.randn(rows + 3, generator=generator(seed))[3:] if scale else None
    return CrossEntropy(target, 0.1 * (seed % 3), None if shares is None else shares / shares.sum(), scales)


@wide
@SOME
@given(st.integers(1, 9), st.sampled_from([1, 2, 31, 32, 33, 64, 1000]), dtypes, st.booleans(), st.booleans(), seeds)
@torch.no_grad()
def test_cross_entropy_is_its_formula(rows, vocab, dtype, prior, scale, seed):
    loss = criterion(rows, vocab, seed, prior, scale)
    logits = (torch.randn(rows, vocab, generator=generator(seed)) * 5).to(dtype)
    logits[0] -= 1e4
    before = logits.clone()
    found, gradient = loss(logits, slice(0, rows), 0.25)
    assert torch.equal(logits, before)
    assert gradient.dtype == dtype
    with torch.enable_grad():
        exact = logits.double().requires_grad_()
        spread = torch.full((vocab,), 1 / vocab) if loss.prior is None else loss.prior
        wanted = torch.lerp(torch.eye(vocab)[loss.target].double(), spread.double(), loss.smoothing)
        each = -(wanted * exact.log_softmax(1)).sum(1)
        total = (each if loss.scale is None else each * loss.scale).sum()
        (by_logits,) = torch.autograd.grad(total, exact)
    # Rounded are the numbers that its terms are made of, which are as large as the logits.
    assert float(found) == pytest.approx(float(total), rel=1e-5, abs=1e-6 * float(logits.abs().sum(0).max() + 10))
    close(gradient, by_logits * 0.25, 1e-6)


@wide
@SOME
@given(st.integers(1, 5), st.sampled_from([2, 31, 32, 33, 1000]), dtypes, st.booleans(), seeds)
@torch.no_grad()
def test_the_loss_of_two_passes_is_its_formula(pairs, vocab, dtype, prior, seed):
    base = criterion(2 * pairs, vocab, seed, prior)
    loss = Agreement(base, 3.0)
    near = torch.randn(pairs, 1, vocab, generator=generator(seed)) * 4
    logits = (near + torch.randn(pairs, 2, vocab, generator=generator(seed + 1))).flatten(0, 1).to(dtype)
    found, gradient = loss(logits, slice(0, 2 * pairs), 0.25)
    assert gradient.dtype == dtype
    with torch.enable_grad():
        exact = logits.double().requires_grad_()
        spread = torch.full((vocab,), 1 / vocab) if base.prior is None else base.prior
        wanted = torch.lerp(torch.eye(vocab)[base.target].double(), spread.double(), base.smoothing)
        chances = exact.log_softmax(1)
        p, q = chances.view(pairs, 2, vocab).unbind(1)
        total = -(wanted * chances).sum() / 2 + 3 / 4 * ((p.exp() - q.exp()) * (p - q)).sum()
        (by_logits,) = torch.autograd.grad(total, exact)
    assert float(found) == pytest.approx(float(total), rel=1e-5, abs=1e-4)
    close(gradient, by_logits * 0.25, 3e-6)


@wide
@TYPES
@torch.no_grad()
def test_cross_entropy_is_that_of_torch_whatever_the_threads(without, threads, dtype):
    logits, rows = (torch.randn(24, 100) * 3).to(dtype), slice(2, 26)
    losses = [criterion(26, 100, seed, seed > 1, seed > 0) for seed in range(3)]
    losses.append(Agreement(CrossEntropy(torch.arange(26), 0.1), 5.0))
    ours = [one(logits, rows, 0.5) for one in losses]
    threads(3)
    shared = [one(logits, rows, 0.5) for one in losses]
    for (loss, gradient), (its_loss, its_gradient) in zip(ours, shared, strict=True):
        assert torch.equal(loss, its_loss)
        assert torch.equal(gradient, its_gradient)
    transposed = losses[0](logits.T.contiguous().T, rows, 0.5)
    without()
    for (loss, gradient), one in zip((*ours, transposed), (*losses, losses[0]), strict=True):
        wanted, by_logits = one(logits, rows, 0.5)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        close(gradient, by_logits, 1e-5)


@wide
@TYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_the_loss_of_what_is_no_number_is_none(without, bad, dtype):
    logits = torch.randn(4, 70).to(dtype)
    logits[1, 66] = bad
    losses = [CrossEntropy(torch.tensor([1, 66, 3, 3]), 0.1), CrossEntropy(torch.tensor([1, 2, 3, 3]))]
    losses += [Agreement(CrossEntropy(torch.tensor([1, 2, 3, 3])), 1.0)]
    ours = [one(logits, slice(0, 4), 1.0) for one in losses]
    without()
    for (found, gradient), one in zip(ours, losses, strict=True):
        wanted, by_logits = one(logits, slice(0, 4), 1.0)
        assert float(found) == pytest.approx(float(wanted), rel=1e-6, nan_ok=True)
        if isinstance(one, CrossEntropy):
            torch.testing.assert_close(gradient, by_logits.to(dtype), equal_nan=True, rtol=1e-2, atol=1e-6)
        assert torch.equal(gradient.isfinite().all(1), by_logits.isfinite().all(1))


@torch.no_grad()
def test_a_target_that_is_no_token_is_refused():
    for wrong in (-1, 5):
        with pytest.raises((IndexError, RuntimeError)):
            CrossEntropy(torch.tensor([0, wrong]))(torch.zeros(2, 5), slice(0, 2), 1.0)


def test_draws_are_those_of_torch_and_leave_its_generator_where_it_would_be():
    for seed, counts in enumerate([(1, 1, 1), (311, 312, 313), (1000, 7, 624), (0, 5, 2000)]):
        ours, its = generator(seed), generator(seed)
        for count in counts:
            wanted = torch.empty(count, dtype=torch.int64).random_(generator=its)
            assert torch.equal(draw(count, ours), wanted)
            # One number of 32 bits: words no longer begin at even places.
            assert torch.equal(torch.rand(1, generator=ours), torch.rand(1, generator=its))
        assert torch.equal(ours.get_state()[:5008], its.get_state()[:5008])


def drop(x: Tensor, onto: Tensor | None, outer: Tensor, p: float) -> list[Tensor]:
    given = [one.detach().requires_grad_() for one in (x, onto) if one is not None]
    with drawing(7):
        y = dropout(given[0], p, *given[1:])
        after = dropout(torch.ones(50), 0.5)
    return [y, after, *torch.autograd.grad(y, given, outer)]


@SOME
@given(st.sampled_from([(0,), (1,), (31,), (3, 33), (2, 5, 32), (0, 4), (3, 1000)]), dtypes, st.booleans(), seeds)
def test_dropout_is_a_product_with_its_mask_to_the_bit(shape, dtype, onto, seed):
    x, base, outer = (torch.randn(3, *shape, generator=generator(seed)) * 3).to(dtype).unbind(0)
    x.flatten()[seed % max(1, x.numel()) :][:1] = torch.inf if seed % 2 else torch.nan
    p = 0.1 * (1 + seed % 9)
    found = drop(x, base if onto else None, outer, p)
    with drawing(7):
        mask = keep_mask(x.shape, p, dtype)
        after = torch.ones(50) * keep_mask(torch.Size([50]), 0.5, torch.float32)
    wanted = [base + x * mask if onto else x * mask, after, outer * mask, *([outer] if onto else [])]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@wide
@TYPES
def test_dropout_is_the_same_by_torch_on_any_threads_and_for_views(without, threads, dtype):
    x, base, outer = torch.randn(3, 7, 100).to(dtype).unbind(0)
    work = [
        (x, base, outer),
        (x, None, outer.T.contiguous().T),
        (x.T, base.T, outer.T),
        (x, base[:1].expand(7, 100), outer),
    ]
    ours = [drop(*one, 0.3) for one in work]
    threads(3)
    shared = [drop(*one, 0.3) for one in work]
    without()
    for one, other, wanted in zip(ours, shared, (drop(*each, 0.3) for each in work), strict=True):
        for a, b, c in zip(one, other, wanted, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_dropout_that_is_off_only_adds():
    x, onto = torch.randn(2, 3)
    for module in (Dropout(0.5).eval(), Dropout(0.0)):
        assert torch.equal(module(x), x)
        assert torch.equal(module(x, onto), onto + x)


def norm_of(kind: str, width: int, bias: bool, seed: int) -> torch.nn.Module:
    norm = make_norm(kind, width, bias)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(width, generator=generator(seed)))
    return norm


def differentiated(norm: torch.nn.Module, x: Tensor, outer: Tensor) -> list[Tensor]:
    given = [x.detach().requires_grad_(), *norm.parameters()]
    y = norm(given[0])
    return [y.detach(), *torch.autograd.grad(y, given, outer)]


kinds = st.sampled_from([("layer", True), ("layer", False), ("rms", False)])


@wide
@SOME
@given(
    st.sampled_from([(1,), (0,), (2, 3), (67,), (130,)]),
    st.sampled_from([31, 32, 96, 544]),
    dtypes,
    kinds,
    seeds,
)
def test_norms_and_their_gradients_are_those_of_more_digits(rows, width, dtype, kind, seed):
    norm = norm_of(kind[0], width, kind[1], seed).to(dtype)
    x = (torch.randn(*rows, width, generator=generator(seed)) * 3 + seed % 3).to(dtype)
    outer = torch.randn(x.shape, generator=generator(seed + 1)).to(dtype)
    found = differentiated(norm, x, outer)
    assert [one.dtype for one in found] == [dtype] * len(found)
    # Rounded once where there is a kernel; torch's sums of bf16 are off by a tenth.
    by_torch = dtype == torch.bfloat16 and (width % 32 or kernels.library() is None)
    for one, wanted in zip(found, differentiated(norm.double(), x.double(), outer.double()), strict=True):
        close(one, wanted, 0.3 if by_torch else 1e-5)


@wide
@TYPES
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients_of_norms_are_the_same_on_any_threads_and_for_views(threads, dtype, kind):
    norm = norm_of(kind, 96, kind == "layer", 3).to(dtype)
    x, outer = torch.randn(2, 200, 96).to(dtype)
    ours = differentiated(norm, x, outer)
    views = differentiated(norm, x.T.contiguous().T, outer.T.contiguous().T)
    row = differentiated(norm, x, outer[:1].expand(200, 96))
    threads(3)
    for one, other in zip(ours, differentiated(norm, x, outer), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(row, differentiated(norm, x, outer[:1].expand(200, 96).contiguous()), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(views[:2], ours[:2], rtol=2e-2, atol=2e-2)


@wide
@pytest.mark.parametrize("learns", ["x", "weight", "bias"])
def test_what_of_a_norm_does_not_learn_gets_no_gradient(learns):
    norm, x = norm_of("layer", 64, True, 1).requires_grad_(False), torch.randn(5, 64)
    its = {"x": x, "weight": norm.weight, "bias": norm.bias}[learns].requires_grad_()
    norm(x).square().sum().backward()
    found = [one.grad is not None for one in (x, norm.weight, norm.bias)]
    assert found == [learns == name for name in ("x", "weight", "bias")]
    exact = norm_of("layer", 64, True, 1).double().requires_grad_(False)
    same = {"x": (x64 := x.detach().double()), "weight": exact.weight, "bias": exact.bias}[learns].requires_grad_()
    exact(x64).square().sum().backward()
    close(its.grad, same.grad, 1e-5)
