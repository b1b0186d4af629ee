"""Matrices of 8 bits: their arithmetic, rows that do not see their neighbours, and what decoding makes of it."""

from __future__ import annotations

import pytest
import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.beam import Beam
from encdec_cli.generation.lines import Options, generate
from encdec_cli.models import quantised
from encdec_cli.models.linear import Linear
from encdec_cli.models.quantised import LEVELS, QuantisedLinear, quantise, supported
from encdec_cli.text.example import Example
from tests.conftest import encdec
from tests.scripted import pad, run, tiny_transformer

pytestmark = pytest.mark.skipif(not supported(), reason="this build of torch multiplies no 8-bit matrices")


def written_out(x, weight, bias):
    """The same map in plain integers: 127 levels for each row of the input and each output."""
    scale = weight.abs().amax(1) / LEVELS
    levels = (weight / scale[:, None]).round().long()
    own = x.abs().amax(1, keepdim=True) / LEVELS
    products = (x / own).round().long() @ levels.T
    return products.double() * own.double() * scale.double() + bias.double()


@torch.inference_mode()
def test_the_arithmetic_is_that_of_integers():
    torch.manual_seed(1)
    for rows, inputs, outputs in ((1, 16, 3), (7, 40, 33), (64, 128, 100)):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        found = QuantisedLinear(weight, bias)(x)
        torch.testing.assert_close(found.double(), written_out(x, weight, bias), rtol=1e-5, atol=1e-5)
        exact = torch.nn.functional.linear(x, weight, bias)
        assert float((found - exact).norm() / exact.norm()) < 0.02


@torch.inference_mode()
def test_a_row_does_not_see_its_batch_mates_in_a_single_bit():
    torch.manual_seed(2)
    layer = QuantisedLinear(torch.randn(50, 64), torch.randn(50))
    x = torch.randn(37, 64) * torch.logspace(-3, 3, 37)[:, None]
    whole = layer(x)
    assert all(torch.equal(layer(x[row : row + 1])[0], whole[row]) for row in range(37))
    assert torch.equal(layer(x.view(1, 37, 64))[0], whole)


@torch.inference_mode()
def test_rows_of_zeros_and_types_are_kept():
    bias = torch.randn(5)
    layer = QuantisedLinear(torch.randn(5, 8), bias)
    assert torch.equal(layer(torch.zeros(2, 8)), bias.expand(2, 5))
    assert layer(torch.zeros(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(QuantisedLinear(torch.zeros(5, 8), None)(torch.ones(1, 8)), torch.zeros(1, 5))


def test_only_large_matrices_are_quantised_and_the_tied_output_layer_is_one_of_them(monkeypatch):
    monkeypatch.setattr(quantised, "LEAST_WEIGHTS", 150 * 16)
    model = tiny_transformer()
    before = [parameter.clone() for parameter in model.target_embedding.parameters()]
    quantise(model)
    kinds = {
        name: type(module) for name, module in model.named_modules() if isinstance(module, Linear | QuantisedLinear)
    }
    assert {name for name, kind in kinds.items() if kind is QuantisedLinear} == {"output"}
    assert len(kinds) > 10
    assert torch.equal(model.target_embedding.weight, before[0])


@torch.no_grad()
def test_an_untied_output_layer_changes_nothing():
    model = tiny_transformer()
    hidden = torch.randn(3, 16)
    before = model.project(hidden)
    model.untie()
    assert torch.equal(model.project(hidden), before)
    assert model.output.weight.data_ptr() != model.target_embedding.weight.data_ptr()


def test_a_quantised_model_decodes_the_same_in_every_batch(copy_run, monkeypatch):
    monkeypatch.setattr(quantised, "LEAST_WEIGHTS", 1)
    bundle = Bundle.load(copy_run)
    quantise(bundle.model)
    lines = [Example(" ".join(str(number + i)[-1] for i in range(number % 7 + 1))) for number in range(60)]
    outputs = [
        [result.candidates[0].text for result in generate([bundle], [lines], Options(Beam(beam=3), batch=batch))]
        for batch in (1, 7, 64)
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    right = sum(text == line.source for text, line in zip(outputs[0], lines, strict=True))
    assert right >= 57


def test_beams_of_a_quantised_model_are_scored_by_it(monkeypatch):
    monkeypatch.setattr(quantised, "LEAST_WEIGHTS", 1)
    model = tiny_transformer()
    quantise(model)
    source, mask = pad([[5, 6, 3]])
    found = run(Beam(beam=3), model, maximum=8, lines=[[5, 6, 3]])[0][0]
    target = torch.tensor([[2, *found.tokens, *([3] if found.finished else [])]])
    with torch.inference_mode():
        states = model(source, mask, target[:, :-1])[0]
        scores = model.project(states).log_softmax(-1).gather(1, target[0, 1:, None])[:, 0]
    assert found.token_scores == pytest.approx(scores.tolist(), abs=1e-3)


def test_the_command(copy_run):
    done = encdec("generate", "--model", copy_run, "--precision", "int8", stdin="1 2 3\n4 5\n")
    assert (done.returncode, done.stdout) == (0, "1 2 3\n4 5\n"), done.stderr
    refused = encdec("generate", "--model", copy_run, "--precision", "int8", "--device", "meta", stdin="1\n")
    assert refused.returncode == 2
    assert "--precision int8" in refused.stderr
