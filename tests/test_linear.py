"""A large linear map is computed another way than a small one, and is the same; memory that is freed is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encdec_cli.kernels.linear import can_map, operators
from encdec_cli.kernels.matrix import can_pack
from encdec_cli.models.linear import ENOUGH, MUCH, ROWS, linear
from encdec_cli.training.meter import Meter
from tests.conftest import environment


@pytest.fixture(autouse=True, params=[True, False], ids=["ours", "torch"])
def ours(request, monkeypatch):
    torch.manual_seed(0)
    if not request.param:
        monkeypatch.setattr("encdec_cli.models.linear.can_map", lambda *_: False)
    elif not can_map(torch.zeros(2, 2), torch.zeros(2, 2), None):
        pytest.skip("this machine has no products of our own")
    return request.param


def large(rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple:
    x, weight, bias = torch.randn(*rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    assert x.numel() * outputs >= MUCH
    return tuple(tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [((7, 50), 128, 384), ((3, 200), 256, 64), ((300,), 64, 1000)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_large_map_and_its_gradients_are_those_in_double_precision(rows, inputs, outputs, with_bias, dtype):
    tensors = large(rows, inputs, outputs, dtype)[: 3 if with_bias else 2]
    exact = tuple(tensor.double() for tensor in tensors)
    found, expected = linear(*tensors), F.linear(*exact)
    outer = torch.randn(found.shape).to(dtype)
    gradients = torch.autograd.grad(found, tensors, outer)
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}
    wanted = (expected, *torch.autograd.grad(expected, exact, outer.double()))
    for one, other in zip((found, *gradients), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **close)
        assert one.is_contiguous()  # the optimizer's kernels go through memory as it lies


def test_what_is_frozen_gets_no_gradient_and_a_turned_input_is_read_rightly():
    x, weight, bias = large((300,), 64, 500)
    turned = x.detach().t().contiguous().t()
    found = linear(turned, weight, bias.detach())
    torch.testing.assert_close(found, F.linear(x, weight, bias.detach()))
    (gradient,) = torch.autograd.grad(found.sum(), (weight,))
    torch.testing.assert_close(gradient, x.sum(0).expand(500, 64), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(linear(x, weight.detach()).sum(), (x,))
    torch.testing.assert_close(gradient, weight.sum(0).expand(300, 64), rtol=1e-4, atol=1e-4)


def test_the_same_map_twice_has_the_same_bits():
    tensors = large((5, 100), 96, 288)
    first, second = (torch.autograd.grad(linear(*tensors).square().sum(), tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([32, 64, 128, 1120]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 1500),
    inputs=WIDTHS,
    outputs=WIDTHS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_products_of_any_shape_are_those_in_double_precision(ours, rows, inputs, outputs, dtype):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias, outer = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    if not ours or not can_map(x, weight, bias):
        assert not ours or not can_pack(dtype, 2) or inputs % 2 or outputs % 2
        return
    maps = operators()
    found = (maps.linear(x, weight, bias), maps.linear_by_input(outer, weight), *maps.linear_by_weight(outer, x))
    exact_x, exact_weight, exact = x.double(), weight.double(), outer.double()
    wanted = (exact_x @ exact_weight.t() + bias.double(), exact @ exact_weight, exact.t() @ exact_x, exact.sum(0))
    for one, other in zip(found, wanted, strict=True):
        rounding = 1e-6 if dtype == torch.float32 else 1 / 256
        error = (one.double() - other).abs()
        assert (error <= rounding * other.abs() + 1e-5 * (rows + inputs + outputs) ** 0.5).all()


def test_what_does_not_fit_is_an_error_or_as_torch_has_it():
    x, weight, bias = large((300,), 64, 500)
    for wrong in (weight[:, :32], weight.bfloat16()):
        with pytest.raises(RuntimeError):
            linear(x, wrong, bias)
    with pytest.raises(RuntimeError):
        linear(x, weight, bias.bfloat16())
    strided = torch.randn(1000)[::2]
    torch.testing.assert_close(linear(x, weight, strided), F.linear(x, weight, strided), atol=1e-4, rtol=1e-4)
    one = torch.randn(2048, requires_grad=True)
    wide = torch.randn(2048, 2048, requires_grad=True)
    found = torch.autograd.grad(linear(one, wide).sum(), (one, wide))
    torch.testing.assert_close(found[0], wide.sum(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], one.expand(2048, 2048))


def test_neither_threads_nor_neighbours_change_a_bit_of_a_row(ours):
    if not ours:
        return
    x, weight, bias = large((1300,), 256, 300, torch.bfloat16)
    threads, outer = torch.get_num_threads(), torch.randn(1300, 300, dtype=torch.bfloat16)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            mapped = linear(x, weight, bias)
            found.append((mapped, *torch.autograd.grad(mapped, (x, weight, bias), outer)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    few = x.detach()[500:541].requires_grad_()
    assert few.numel() * len(weight) >= ENOUGH
    assert len(few) >= ROWS
    assert torch.equal(linear(few, weight, bias), found[0][0][500:541])


def test_its_operations_are_counted():
    x, weight, bias = large((300,), 64, 500)
    with Meter() as meter:
        torch.autograd.grad(linear(x, weight, bias).sum(), (x, weight))
    assert meter.flops == 3 * 2 * 300 * 64 * 500


FAULTS = """
import resource, torch
from encdec_cli.allocator import keep_freed
keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
counts = [faults() for _ in range(10)]
print(counts[0], min(counts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_memory_that_was_freed_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment(), check=True)
    first, least = map(int, done.stdout.split())
    assert first > 1000  # 48 MB are 11,719 pages
    assert least < 10
