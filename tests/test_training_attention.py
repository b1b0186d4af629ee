"""Attention in training: our kernel against float64, its gradients, and what must not change them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli import kernels
from encdec_cli.kernels import attention as kernel
from encdec_cli.models.attention import attend
from encdec_cli.models.heads import split_heads
from encdec_cli.models.masks import mask_bias

pytestmark = pytest.mark.skipif(not kernels.wide(), reason="no C compiler, or neither AVX-512 nor AVX2")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Largest error of outputs and gradients, as a share of the largest number."""


def textbook(query, key, value, bias, causal):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(queries, keys).tril(keys - queries) == 0, -torch.inf)
    return scores.softmax(-1) @ value


def inputs(rows, heads, queries, keys, width, dtype, seed=0):
    """Queries, keys and values as joined maps leave them: no head is one block of memory."""
    torch.manual_seed(seed)
    one = torch.randn(rows, queries, heads, width).to(dtype).transpose(1, 2)
    two = torch.randn(rows, keys, 2, heads, width).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return [each.requires_grad_() for each in (one, two[0].detach(), two[1].detach())]


def mask_of(rows, keys, dtype):
    keep = torch.rand(rows, keys) > 0.4
    keep[:, 0] = True
    return mask_bias(keep, dtype, always=True)


@torch.no_grad()
def close(found, wanted, dtype):
    bounds = [BOUND[dtype] * max(1.0, float(each.abs().max())) for each in wanted]
    return all((a.double() - b).abs().max() <= bound for a, b, bound in zip(found, wanted, bounds, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    more=st.integers(0, 30),
    width=st.sampled_from([16, 32, 48, 64, 80]),
    causal=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_output_and_gradients_are_those_of_the_textbook(rows, heads, queries, more, width, causal, masked, dtype):
    given_ = inputs(rows, heads, queries, queries + more, width, dtype, seed=queries * 100 + more)
    bias = mask_of(rows, queries + more, dtype) if masked else None
    assert kernel.can_attend(*given_, bias, causal)
    found = attend(*given_, bias, causal)
    assert "_Attention" in found.grad_fn.name()
    outer = torch.randn_like(found)
    exact = [each.detach().double().requires_grad_() for each in given_]
    wanted = textbook(*exact, None if bias is None else bias.double(), causal)
    assert close([found], [wanted], dtype)
    assert close(torch.autograd.grad(found, given_, outer), torch.autograd.grad(wanted, exact, outer.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(dtype):
    query, key, value = inputs(2, 2, 9, 13, 32, dtype)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 13:] = False
    wide = [torch.cat((each.detach(), torch.randn(2, 2, 7, 32).to(dtype)), 2).requires_grad_() for each in (key, value)]
    short, long = attend(query, key, value), attend(query, *wide, mask_bias(keep, dtype))
    assert close([long], [short.detach().double()], dtype)
    outer = torch.randn_like(short)
    changes = torch.autograd.grad(long, wide, outer)
    assert all(each[:, :, 13:].abs().max() < 1e-30 for each in changes)
    known = torch.autograd.grad(short, (key, value), outer)
    assert close([each[:, :, :13] for each in changes], [each.double() for each in known], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_and_threads_change_no_bit(dtype):
    def computed(given_, outer):
        found = attend(*given_, causal=True)
        return [found, *torch.autograd.grad(found, given_, outer)]

    given_ = inputs(40, 4, 33, 33, 64, dtype)
    outer = torch.randn(40, 4, 33, 64).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [
            computed([each[row : row + 1].detach().requires_grad_() for each in given_], outer[row : row + 1])
            for row in (0, 17, 39)
        ]
        once = computed(given_, outer)
        torch.set_num_threads(2)
        twice = computed(given_, outer)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    for row, own in zip((0, 17, 39), alone, strict=True):
        assert all(torch.equal(a[0], b[row]) for a, b in zip(own, once, strict=True))


def test_what_is_no_number_stays_none():
    for spoiled in range(3):
        given_ = inputs(1, 1, 4, 4, 16, torch.float32)
        given_[spoiled].data[0, 0, 2, 3] = torch.nan
        found = attend(*given_)
        wanted = textbook(*given_, None, False)
        assert torch.equal(found.isnan(), wanted.isnan())
        changes = torch.autograd.grad(found.sum(), given_)
        assert any(bool(each.isnan().any()) for each in changes)


def test_a_row_that_may_look_nowhere_looks_everywhere():
    given_ = inputs(2, 1, 3, 5, 16, torch.float32)
    keep = torch.tensor([[True] * 5, [False] * 5])
    found = attend(*given_, mask_bias(keep, torch.float32))
    assert torch.allclose(found[1], given_[2][1].mean(1, keepdim=True).expand(1, 3, 16), atol=1e-6)
    assert all(bool(each.isfinite().all()) for each in torch.autograd.grad(found.sum(), given_))


@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_of_a_joined_map_is_that_of_its_parts(parts):
    joined = torch.randn(3, 7, parts * 2 * 16, dtype=torch.float64, requires_grad=True)
    split = split_heads(joined, parts, 2)
    plain = joined.view(3, 7, parts, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    assert all(torch.equal(a, b) for a, b in zip(split, plain, strict=True))
    factors = [torch.randn_like(each) for each in plain]
    found = torch.autograd.grad(sum((a * b).sum() for a, b in zip(split, factors, strict=True)), joined)
    wanted = torch.autograd.grad(sum((a * b).sum() for a, b in zip(plain, factors, strict=True)), joined)
    assert torch.equal(found[0], wanted[0])


def test_gradients_of_a_joined_map_are_not_copied():
    joined = torch.randn(3, 7, 3 * 2 * 16, requires_grad=True)
    found = attend(*split_heads(joined, 3, 2), causal=True)
    outer = torch.randn_like(found)
    wanted = torch.autograd.grad(
        textbook(*joined.view(3, 7, 3, 2, 16).permute(2, 0, 3, 1, 4), None, True), joined, outer
    )
    assert close(torch.autograd.grad(found, joined, outer), [wanted[0].double()], torch.float32)


def test_lengths_beyond_the_cache_are_left_to_torch():
    long = kernel.MOST + 1
    assert not kernel.can_attend(*inputs(1, 1, long, long, 16, torch.float32), None, False)
    assert kernel.can_attend(*inputs(1, 1, 4, kernel.MOST, 16, torch.float32), None, False)
    assert not kernel.can_attend(*inputs(1, 1, 5, 4, 16, torch.float32), None, True)
    assert not kernel.can_attend(*inputs(1, 1, 5, 5, 24, torch.float32), None, False)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = inputs(4, 2, 5, 5, 32, torch.float32)
    narrow = [each[..., :16] for each in (key, value)]
    for wrong in ((query, *narrow), (query, key, value.transpose(2, 3)), (query[:2], key, value)):
        assert not kernel.can_attend(*wrong, None, False)
    for shape in ((2, 1, 1, 5), (4, 1, 3, 5), (4, 2, 1, 5), (4, 1, 1, 4)):
        assert not kernel.can_attend(query, key, value, torch.zeros(shape), False)
    assert kernel.can_attend(query, key, value, torch.zeros(1, 1, 5, 5), False)
