"""Packed matrices and what is computed with them: against torch, row by row, and what decoding makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.beam import Beam
from encdec_cli.generation.lines import Options, generate
from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import Matrix, can_pack
from encdec_cli.models import packed
from encdec_cli.models.linear import Linear
from encdec_cli.models.packed import LEVELS, PackedLinear, pack, quantised
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.example import Example
from tests.conftest import encdec
from tests.scripted import pad, run, tiny_transformer

packs = pytest.mark.skipif(not can_pack(torch.float32, 32), reason="no compiler, or neither AVX-512 nor AVX2")
TYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.int8) if can_pack(dtype, 32)]
kinds = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(params=["packed here", "by torch"])
def way(request, monkeypatch):
    """Both ways to multiply in 8 bits, one after the other."""
    if request.param == "by torch":
        monkeypatch.setattr(packed, "can_pack", lambda *_: False)


def layer(dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    return quantised(weight, bias) if dtype == torch.int8 else PackedLinear(Matrix(weight.to(dtype), bias))


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float32 if dtype == torch.int8 else dtype)


def written_out(x, weight, bias):
    """The same map in plain integers: 127 levels for each row of the input and each output."""
    scale = weight.abs().amax(1) / LEVELS
    levels = (weight / scale[:, None]).round().long()
    own = x.abs().amax(1, keepdim=True) / LEVELS
    products = (x / own).round().long() @ levels.T
    return products.double() * own.double() * scale.double() + bias.double()


@pytest.mark.usefixtures("way")
@torch.inference_mode()
def test_the_arithmetic_of_8_bits_is_that_of_integers():
    torch.manual_seed(1)
    for count, inputs, outputs in ((1, 32, 3), (7, 40, 33), (64, 128, 100)):
        x, weight, bias = torch.randn(count, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        found = quantised(weight, bias)(x)
        torch.testing.assert_close(found.double(), written_out(x, weight, bias), rtol=1e-5, atol=1e-5)
        exact = F.linear(x, weight, bias)
        assert float((found - exact).norm() / exact.norm()) < 0.02


@pytest.mark.usefixtures("way")
@torch.inference_mode()
def test_rows_of_zeros_and_types_are_kept_and_no_nan_is_hidden():
    bias = torch.randn(5)
    found = quantised(torch.randn(5, 32), bias)
    assert torch.equal(found(torch.zeros(2, 32)), bias.expand(2, 5))
    assert found(torch.zeros(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(quantised(torch.zeros(5, 32), None)(torch.ones(1, 32)), torch.zeros(1, 5))
    x = torch.randn(3, 32)
    x[1, 7] = torch.nan
    assert found(x).isnan().all(1).tolist() == [False, True, False]


@kinds
@settings(max_examples=40, deadline=None)
@given(
    count=st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 300])),
    inputs=st.sampled_from([32, 96, 256, 1120]),
    outputs=st.sampled_from([1, 15, 16, 63, 64, 65, 200, 1100]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@torch.inference_mode()
def test_products_are_those_of_torch(dtype, count, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    weight, added = torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
    x = rows(dtype, count, inputs)
    found = layer(dtype, weight, added)(x)
    wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert found.dtype == x.dtype
    most = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + wanted.abs()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.int8: 0.02}[dtype]
    assert bool(((found.double() - wanted).abs() <= tolerance * most).all())


@kinds
@torch.inference_mode()
def test_a_row_has_its_bits_in_every_batch_and_with_every_number_of_threads(dtype, monkeypatch):
    torch.manual_seed(2)
    one = layer(dtype, torch.randn(300, 64), torch.randn(300))
    x = rows(dtype, 37, 64) * torch.logspace(-3, 3, 37)[:, None].to(rows(dtype, 1).dtype)
    whole = one(x)
    assert all(torch.equal(one(x[row : row + 1])[0], whole[row]) for row in range(37))
    assert torch.equal(one(x.view(1, 37, 64))[0], whole)
    assert torch.equal(one(x.t().contiguous().t()), whole)
    monkeypatch.setattr("encdec_cli.kernels.matrix.SHARED_OUT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(one(x), whole)


@kinds
@pytest.mark.parametrize("inputs", [32, 64])
@torch.inference_mode()
def test_products_may_add_and_cut_off_and_write_nowhere_else(dtype, inputs):
    torch.manual_seed(3)
    weight, x = torch.randn(70, inputs), rows(dtype, 7, inputs)
    one = layer(dtype, weight, None)
    plain = one(x).float()
    for relu in (False, True):
        more = rows(dtype, 7, 70)
        out = torch.full((9, 70), 7.0).to(x.dtype)
        places = (x.data_ptr(), 7, one.matrix._place, more.data_ptr(), out[1:].data_ptr())
        function("product")(*places, 0, one.matrix.panels, relu, x.dtype == torch.bfloat16)
        wanted = (plain.relu() if relu else plain) + more.float()
        torch.testing.assert_close(out[1:8].float(), wanted, rtol=0.02, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
        assert bool((out[[0, 8]] == 7).all())


@packs
def test_a_row_of_another_type_or_width_is_refused():
    with pytest.raises(TypeError, match=r"bfloat16 with a matrix of torch\.float32"):
        Matrix(torch.ones(3, 32), None).product(torch.ones(1, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="16 columns with a matrix of 32"):
        Matrix(torch.ones(3, 32), None).product(torch.ones(4, 16))


@pytest.mark.parametrize("int8", [False, True])
def test_all_matrices_are_packed_and_a_tied_output_layer_is_one_of_them(int8):
    if not int8 and not can_pack(torch.float32, 32):
        pytest.skip("no compiler, or neither AVX-512 nor AVX2")
    model = tiny_transformer(dim=32)
    before = [parameter.clone() for parameter in model.target_embedding.parameters()]
    hidden = torch.randn(3, 32)
    with torch.inference_mode():
        wanted = model.project(hidden)
        pack(model, int8)
        torch.testing.assert_close(model.project(hidden), wanted, rtol=0.02, atol=0.2 if int8 else 1e-5)
    assert not [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert torch.equal(model.target_embedding.weight, before[0])


@packs
@torch.inference_mode()
def test_a_linear_map_of_another_class_or_type_stays_as_it_is():
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, hidden = tiny_transformer(dim=32), torch.randn(3, 32)
    model.output = Doubled(32, 5)
    wanted = model.project(hidden)
    pack(model)
    torch.testing.assert_close(model.project(hidden), wanted)
    pack(double := tiny_transformer(dim=32).double())
    assert [name for name, module in double.named_modules() if isinstance(module, Linear)]


@torch.no_grad()
def test_an_untied_output_layer_changes_nothing():
    model = tiny_transformer()
    hidden = torch.randn(3, 16)
    before = model.project(hidden)
    model.untie()
    assert torch.equal(model.project(hidden), before)
    assert model.output.weight.data_ptr() != model.target_embedding.weight.data_ptr()


def fused(dtype: torch.dtype, **keys: object) -> tuple[Transformer, Transformer]:
    """A packed model, and the same without kernels for whole layers."""
    made = []
    for _ in range(2):
        torch.manual_seed(4)
        config = Transformer.Config(2, 2, 64, 2, 96, **keys)
        model = Transformer(config, 30, 30).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
        model = model.to(torch.float32 if dtype == torch.int8 else dtype)
        pack(model, dtype == torch.int8)
        made.append(model)
    for one in (*made[0].encoder, *made[0].decoder):
        assert one._kernel is not None
    for one in (*made[1].encoder, *made[1].decoder):
        one._kernel = None
    return made[0], made[1]


@kinds
@pytest.mark.parametrize("beam", [1, 4, 9])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"norm_order": "post", "activation": "gelu", "bias": False},
        {"norm": "rms", "activation": "swiglu", "positions": "rotary"},
        {"norm_order": "post", "norm": "rms", "positions": "rotary"},
    ],
    ids=["pre", "post", "modern", "post rms"],
)
@torch.inference_mode()
def test_layers_as_a_whole_are_their_parts(dtype, beam, keys):
    whole, parts = fused(dtype, **keys)
    source, mask = pad([[5, 6, 7, 8, 9, 3], [5, 3], [20, 21, 22, 3]])
    states, memories = [], []
    for model in (whole, parts):
        memories.append(model.encode(source, mask))
        states.append(model.start(memories[-1], beam))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.08, torch.int8: 0.08}[dtype]

    def check(one, other):
        difference = (one.double() - other.double()).norm() / other.double().norm()
        assert float(difference) < tolerance

    check(memories[0].states[mask], memories[1].states[mask])
    generator = torch.Generator().manual_seed(5)
    count = 3
    for step in range(12):
        # A piece of two tokens in the middle: what it leaves must serve the kernel, and the other way round.
        tokens = torch.randint(4, 30, (count * beam, 2 if step == 5 else 1), generator=generator)
        check(*(model.decode(tokens, state) for model, state in zip((whole, parts), states, strict=True)))
        if step == 8:
            count = 2
        order = torch.randint(0, beam, (count, beam), generator=generator)
        chosen = (order + torch.arange(count)[:, None] * beam).flatten()
        for state in states:
            state.reorder(chosen)
            if step == 9:
                state.crop(4)


@kinds
@pytest.mark.parametrize("beam", [1, 5, 9])
@torch.inference_mode()
def test_layers_as_a_whole_give_a_sentence_its_bits_in_every_batch(dtype, beam):
    whole, _ = fused(dtype, positions="rotary")
    lines = [[5, 6, 7, 8, 9, 3], [5, 3], [20, 21, 22, 3], [*range(4, 30), *range(4, 29), 3]]
    generator = torch.Generator().manual_seed(7)
    tokens, order = torch.randint(0, beam, (2, 9, len(lines), beam), generator=generator)

    def hidden(chosen: list[int], extra: int = 0) -> torch.Tensor:
        source, mask = pad([lines[number] for number in chosen], extra)
        state, found = whole.start(whole.encode(source, mask), beam), []
        for token, parents in zip(tokens[:, chosen] + 4, order[:, chosen], strict=True):
            found.append(whole.decode(token.view(-1, 1), state).view(len(chosen), beam, -1))
            state.reorder((parents + torch.arange(len(chosen))[:, None] * beam).flatten())
        return torch.stack(found, 1)

    together = hidden([0, 1, 2, 3])
    for number in range(len(lines)):
        assert torch.equal(hidden([number], extra=3)[0], together[number])
    assert torch.equal(hidden([2, 0]), together[[2, 0]])


@packs
@pytest.mark.parametrize("beam", [1, 5])
def test_a_packed_model_finds_the_same(beam):
    torch.manual_seed(6)
    model = Transformer(Transformer.Config(1, 2, 64, 2, 128), 50, 50).eval()
    lines = [[5, 6, 7, 3], [20, 3], [9, 9, 30, 31, 3], [*range(4, 49), *range(4, 49), 3]]
    wanted = run(Beam(beam=beam), model, maximum=12, lines=lines)
    pack(model)
    for ours, theirs in zip(run(Beam(beam=beam), model, maximum=12, lines=lines), wanted, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-5)


@packs
def test_gradients_and_long_sources_are_left_to_torch(monkeypatch):
    whole, _ = fused(torch.float32)
    calls = []
    monkeypatch.setattr("encdec_cli.kernels.layer.function", lambda name: lambda *_: calls.append(name))

    def encode(length: int) -> list[str]:
        calls.clear()
        source = torch.full((1, length), 5)
        whole.encode(source, source != 0)
        return list(calls)

    assert encode(4) == []  # gradients are on
    with torch.inference_mode():
        assert encode(4) == ["encoder_layer"] * 2
        assert encode(65) == []


@kinds
@pytest.mark.parametrize("beam", [1, 4, 9])
@torch.inference_mode()
def test_layers_have_the_same_bits_on_several_threads(dtype, beam, monkeypatch):
    model, _ = fused(dtype, positions="rotary")
    source, mask = pad([[5, 6, 7, 8, 9, 3], [5, 3], [20, 21, 22, 3], [8, 8, 3], [9, 3]])
    tokens = torch.randint(4, 30, (5 * beam, 6), generator=torch.Generator().manual_seed(7))

    def states() -> list[torch.Tensor]:
        state = model.start(model.encode(source, mask), beam)
        return [model.decode(tokens[:, [step]], state) for step in range(6)]

    alone = states()
    monkeypatch.setattr("encdec_cli.kernels.matrix.SHARED_OUT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(alone, states(), strict=True):
        assert torch.equal(one, other)


def test_a_quantised_model_decodes_the_same_in_every_batch(copy_run):
    bundle = Bundle.load(copy_run)
    lines = [Example(" ".join(str(number + i)[-1] for i in range(number % 7 + 1))) for number in range(60)]

    def written(batch: int) -> list[str]:
        results = generate([bundle], [lines], Options(Beam(beam=3), batch=batch))
        return [result.candidates[0].text for result in results]

    exact = written(64)
    pack(bundle.model, int8=True)
    outputs = [written(batch) for batch in (1, 7, 64)]
    assert outputs[0] == outputs[1] == outputs[2]
    assert sum(one == other for one, other in zip(exact, outputs[0], strict=True)) >= 57


def test_beams_of_a_quantised_model_are_scored_by_it():
    model = tiny_transformer()
    pack(model, int8=True)
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
    assert "--device meta: torch cannot use it" in refused.stderr


def test_nothing_is_packed_without_a_compiler(monkeypatch):
    monkeypatch.setattr("encdec_cli.kernels.matrix.library", lambda: None)
    model = tiny_transformer(dim=32)
    pack(model)
    assert [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert model.output is None
