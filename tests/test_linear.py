"""A large linear map is computed another way than a small one, and is the same; memory that is freed is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from encdec_cli.models.linear import MUCH, linear
from encdec_cli.training.meter import Meter
from tests.conftest import environment


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
