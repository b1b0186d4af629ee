"""Sequences one after the other: attention, the Transformer and training do what they do of padded rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.data.batch import Batch, collate
from encdec_cli.kernels import attention as kernel
from encdec_cli.kernels.packing import Packing, Rows
from encdec_cli.models.attention import attend
from encdec_cli.models.dropout import drawing
from encdec_cli.models.transformer import Transformer
from tests.conftest import copy_task
from tests.test_training_attention import close, textbook
from tests.trainers import trainer

VOCAB = 30


def rows_of(lengths: list[int], width: int = 0) -> Rows:
    return Rows(torch.arange(max([width, *lengths])) < torch.tensor(lengths)[:, None])


def batch(seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def some(longest: int) -> list[list[int]]:
        lengths = torch.randint(1, longest, (6,), generator=random).tolist()
        return [torch.randint(4, VOCAB, (length,), generator=random).tolist() for length in lengths]

    return collate(some(14), some(9), range(6))


def transformer(**changes) -> Transformer:
    torch.manual_seed(1)
    known = {"heads": 2, "feed_forward": 48, "dropout": 0.0}
    model = Transformer(Transformer.Config(2, 2, 32, **(known | changes)), VOCAB, VOCAB)
    model.packs = True
    return model


def hidden_and_gradients(model: Transformer, one: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of all tokens, [tokens, vocab], and the gradients of a sum over them."""
    with drawing(3):
        hidden = model.train()(one.source, one.source_mask, one.decoder_input)
    found = model.project(hidden[one.decoder_input != 0])
    outer = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.dtype)
    return found, list(torch.autograd.grad((found * outer).sum(), list(model.parameters())))


def assert_alike(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    atol = bound * max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=atol)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 12))
def test_rows_are_packed_in_order_and_unpacked_with_zeros(lengths, width):
    rows = rows_of(lengths, width)
    x = torch.randn(*rows.mask.shape, 3, dtype=torch.float64, requires_grad=True)
    packed = rows.pack(x)
    assert torch.equal(packed, torch.cat([x[row, :length] for row, length in enumerate(lengths)])[None])
    assert rows.starts.tolist() == [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    assert rows.positions.tolist() == [place for length in lengths for place in range(length)]
    back = rows.unpack(packed)
    assert torch.equal(back, x * rows.mask[..., None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, rows.mask[..., None].expand_as(x).double())


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=5),
    width=st.sampled_from([16, 24, 48]),  # the second is none of our kernel's
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_packed_attention_is_that_of_each_sentence(lengths, width, causal, dtype):
    torch.manual_seed(len(lengths))
    queries, keys = (
        rows_of([one for one, _ in lengths]),
        rows_of([one if causal else one + more for one, more in lengths]),
    )
    given_ = [
        torch.randn(1, int(rows.starts[-1]), 2, width).to(dtype).transpose(1, 2).requires_grad_()
        for rows in (queries, keys, keys)
    ]
    found = attend(*given_, Packing(queries, keys), causal)
    outer = torch.randn_like(found)
    exact = [each.detach().double().requires_grad_() for each in given_]
    parts = [one.split(rows.lengths.tolist(), 2) for one, rows in zip(exact, (queries, keys, keys), strict=True)]
    wanted = torch.cat([textbook(*sentence, None, causal) for sentence in zip(*parts, strict=True)], 2)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    gradients = torch.autograd.grad(found, given_, outer), torch.autograd.grad(wanted, exact, outer.double())
    for a, b in zip((found, *gradients[0]), (wanted, *gradients[1]), strict=True):
        assert_alike(a, b, bound)


KINDS = {
    "as it comes": {},
    "post-norm, learned": {"norm_order": "post", "positions": "learned"},
    "rotary, rms, swiglu": {"positions": "rotary", "norm": "rms", "activation": "swiglu"},
    "untied, no bias, gelu": {"tie": "none", "bias": False, "activation": "gelu"},
    "heads that no kernel takes": {"heads": 4},
    "attention that drops": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_computes_packed_what_it_computes_padded(kind, dtype, checkpointing):
    model, one = transformer(**KINDS[kind]).to(dtype), batch()
    model.checkpointing = checkpointing
    packed = hidden_and_gradients(model, one)
    model.packs = False
    padded = hidden_and_gradients(model, one)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip((packed[0], *packed[1]), (padded[0], *padded[1]), strict=True):
        assert_alike(a, b, bound)


@pytest.mark.parametrize("length", [12, kernel.MOST + 40])
def test_so_it_does_without_gradients_and_beyond_the_kernel(length):
    model = transformer().eval()
    one = collate([[5 + i % 20 for i in range(length)], [6, 7]], [[8] * 4, [9] * (length // 2)], range(2))
    found = []
    for model.packs in (True, False):
        with torch.no_grad():
            hidden = model(one.source, one.source_mask, one.decoder_input)
        found.append(hidden[one.decoder_input != 0])
    assert_alike(*found, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_even_change_what_is_dropped(dtype):
    model, one = transformer(dropout=0.3, activation_dropout=0.1).to(dtype), batch()
    pad = torch.nn.functional.pad
    wide = Batch(pad(one.source, (0, 5)), pad(one.known_target, (0, 3)), one.rows)
    narrow, wider = hidden_and_gradients(model, one), hidden_and_gradients(model, wide)
    assert torch.equal(narrow[0], wider[0])
    assert all(torch.equal(a, b) for a, b in zip(narrow[1], wider[1], strict=True))


def test_where_nothing_is_predicted_nothing_is_computed(monkeypatch):
    model, one, seen = transformer(), batch(), []
    monkeypatch.setattr(type(model.decoder[0]), "forward", lambda _self, x, *_, **__: seen.append(x.shape) or x)
    hidden = model(one.source, one.source_mask, one.decoder_input)
    assert seen == [(1, int(one.target_lengths.sum()), 32)] * 2
    assert not hidden[one.decoder_input == 0].any()


class Own(Transformer):
    """Nobody knows whether its layers look beyond a sentence."""


def test_it_pays_on_a_cpu_whose_products_take_any_number_of_rows(monkeypatch):
    monkeypatch.setattr("encdec_cli.models.linear.can_pack", lambda dtype, _width: dtype == torch.float32)
    model, other = transformer(), Own(Transformer.Config(1, 1, 32, 2, 32), VOCAB, VOCAB)
    assert model.can_pack(torch.float32, "cpu")
    assert not model.can_pack(torch.bfloat16, "cpu")
    assert not model.can_pack(torch.float32, "cuda:0")
    assert not other.can_pack(torch.float32, "cpu")


@pytest.mark.parametrize(("key", "packs"), [((), True), (("train.compile=true",), False)])
def test_training_packs_where_it_pays_and_does_not_compile(monkeypatch, tmp_path, key, packs):
    monkeypatch.setattr(Transformer, "can_pack", lambda *_: True)
    one = trainer(copy_task(tmp_path / "corpus"), tmp_path / "run", *key)
    assert one.model.packs == packs
    assert one.facts["packed"] == packs


def test_the_kernel_is_not_given_what_it_cannot_read():
    rows = rows_of([3, 2])
    dense, turned = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 16, 5).transpose(2, 3)
    packing = Packing(rows, rows)
    assert not kernel.can_attend_packed(dense, turned, dense, packing)
    long = Packing(rows_of([kernel.MOST + 1]), rows_of([4]))
    many = torch.randn(1, 2, kernel.MOST + 1, 16)
    assert not kernel.can_attend_packed(many, many, many, long)
    assert close(
        [attend(dense, turned, dense, packing)],
        [attend(dense, turned.contiguous(), dense, packing).double()],
        torch.float32,
    )
