"""Our layers equal torch.nn's on copied weights, and our formulas their papers'."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from encdec_cli.models import attention
from encdec_cli.models.attention import CrossAttention, SelfAttention, attend
from encdec_cli.models.dropout import Dropout, dropout, keep_probability
from encdec_cli.models.layers import FeedForward, RMSNorm
from encdec_cli.models.linear import Linear
from encdec_cli.models.masks import mask_bias
from encdec_cli.models.model import Memory
from encdec_cli.models.positions import Rotary, Sinusoidal
from encdec_cli.models.softmax import softmax
from encdec_cli.models.transformer import Transformer

DIM, HEADS, WIDTH = 24, 4, 40
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
ORDERS = pytest.mark.parametrize("order", ["pre", "post"])
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def randomise(module: nn.Module) -> nn.Module:
    """Fill every parameter with numbers, so that zero biases and unit norms cannot hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict({"weight": theirs.weight, "bias": theirs.bias}, strict=True)


def copy_self_attention(ours: SelfAttention, theirs: nn.MultiheadAttention) -> None:
    ours.joined.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    copy(ours.output, theirs.out_proj)


def copy_cross_attention(ours: CrossAttention, theirs: nn.MultiheadAttention) -> None:
    ours.query.load_state_dict({"weight": theirs.in_proj_weight[:DIM], "bias": theirs.in_proj_bias[:DIM]})
    ours.joined.load_state_dict({"weight": theirs.in_proj_weight[DIM:], "bias": theirs.in_proj_bias[DIM:]})
    copy(ours.output, theirs.out_proj)


def copy_feed_forward(ours, theirs) -> None:
    copy(ours.feed_forward.inner, theirs.linear1)
    copy(ours.feed_forward.outer, theirs.linear2)


def copy_encoder_layer(ours, theirs: nn.TransformerEncoderLayer) -> None:
    copy_self_attention(ours.attention, theirs.self_attn)
    copy_feed_forward(ours, theirs)
    copy(ours.attention_residual.norm, theirs.norm1)
    copy(ours.feed_forward_residual.norm, theirs.norm2)


def copy_decoder_layer(ours, theirs: nn.TransformerDecoderLayer) -> None:
    copy_self_attention(ours.attention, theirs.self_attn)
    copy_cross_attention(ours.cross, theirs.multihead_attn)
    copy_feed_forward(ours, theirs)
    copy(ours.attention_residual.norm, theirs.norm1)
    copy(ours.cross_residual.norm, theirs.norm2)
    copy(ours.feed_forward_residual.norm, theirs.norm3)


def transformer(order: str, activation: str) -> Transformer:
    config = Transformer.Config(
        encoder_layers=2, decoder_layers=3, d_model=DIM, heads=HEADS, feed_forward=WIDTH, dropout=0.0,
        norm_order=order, activation=activation, tie="none",
    )  # fmt: skip
    return Transformer(config, 13, 11).eval()


def ahead(length: int) -> torch.Tensor:
    return torch.ones(length, length).triu(1).bool()


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torch(causal):
    theirs = randomise(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = SelfAttention(DIM, HEADS, bias=True, dropout=0.0)
    copy_self_attention(ours, theirs)
    x = torch.randn(3, 6, DIM)
    # Their boolean masks are True where a query may not look.
    expected, _ = theirs(x, x, x, key_padding_mask=~MASK, attn_mask=ahead(6) if causal else None)
    close(ours(x, mask_bias(MASK, x.dtype), causal=causal), expected)


def test_cross_attention_equals_torch_for_each_row_of_a_beam():
    theirs = randomise(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = CrossAttention(DIM, HEADS, bias=True, dropout=0.0)
    copy_cross_attention(ours, theirs)
    source, x = torch.randn(3, 6, DIM), torch.randn(6, 2, DIM)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    expected, _ = theirs(x, source[rows], source[rows], key_padding_mask=~MASK[rows])
    close(ours(x, *ours.read(source), mask_bias(MASK, x.dtype)), expected)


@ORDERS
@ACTIVATIONS
def test_encoder_layer_equals_torch(order, activation):
    theirs = randomise(
        nn.TransformerEncoderLayer(DIM, HEADS, WIDTH, 0.0, activation, batch_first=True, norm_first=order == "pre")
    )
    ours = transformer(order, activation).encoder[0]
    copy_encoder_layer(ours, theirs)
    x = torch.randn(3, 6, DIM)
    expected = theirs(x, src_key_padding_mask=~MASK)
    close(ours(x, mask_bias(MASK, x.dtype), None)[MASK], expected[MASK])


@ORDERS
@ACTIVATIONS
def test_decoder_layer_equals_torch(order, activation):
    theirs = randomise(
        nn.TransformerDecoderLayer(DIM, HEADS, WIDTH, 0.0, activation, batch_first=True, norm_first=order == "pre")
    )
    model = transformer(order, activation)
    copy_decoder_layer(model.decoder[0], theirs)
    source, x = torch.randn(3, 6, DIM), torch.randn(3, 5, DIM)
    state = model.start(Memory(source, MASK))
    expected = theirs(x, source, tgt_mask=ahead(5), memory_key_padding_mask=~MASK)
    close(model.decoder[0](x, state, 0, None, state.ancestry.extend(5, x)), expected)


@ORDERS
@ACTIVATIONS
@pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning", "ignore:.*nested tensors.*:UserWarning")
def test_whole_transformer_equals_torch_with_its_gradients(order, activation):
    theirs = randomise(
        nn.Transformer(DIM, HEADS, 2, 3, WIDTH, 0.0, activation, batch_first=True, norm_first=order == "pre")
    ).train()  # without its inference shortcut; dropout is 0
    if order == "post":
        # nn.Transformer adds a final norm to post-norm layers, which the paper does not have.
        theirs.encoder.norm = theirs.decoder.norm = None
    model = transformer(order, activation)
    if order == "pre":
        copy(model.encoder_norm, theirs.encoder.norm)
        copy(model.decoder_norm, theirs.decoder.norm)
    for ours, other in zip(model.encoder, theirs.encoder.layers, strict=True):
        copy_encoder_layer(ours, other)
    for ours, other in zip(model.decoder, theirs.decoder.layers, strict=True):
        copy_decoder_layer(ours, other)
    source, target = torch.randint(1, 13, MASK.shape), torch.randint(1, 11, (3, 5))
    embedded = [
        embedding.weight.detach()[tokens] * math.sqrt(DIM) + paper_positions(tokens.shape[1], DIM)
        for embedding, tokens in ((model.source_embedding, source), (model.target_embedding, target))
    ]
    expected = theirs(*embedded, tgt_mask=ahead(5), src_key_padding_mask=~MASK, memory_key_padding_mask=~MASK)
    hidden = model(source, MASK, target)
    close(hidden, expected)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    (expected * weights).sum().backward()
    first = theirs.encoder.layers[0].self_attn.in_proj_weight.grad
    torch.testing.assert_close(model.encoder[0].attention.joined.weight.grad, first, rtol=1e-4, atol=1e-4)


def paper_positions(length: int, dim: int) -> torch.Tensor:
    """Vaswani et al. 2017, section 3.5, number by number."""
    rows = torch.empty(length, dim)
    for position in range(length):
        for i in range(dim // 2):
            angle = position / 10000 ** (2 * i / dim)
            rows[position, 2 * i] = math.sin(angle)
            rows[position, 2 * i + 1] = math.cos(angle)
    return rows


def test_sinusoidal_positions_are_the_papers():
    positions = Sinusoidal(10)
    expected = paper_positions(300, 10)
    close(positions(torch.zeros(2, 7, 10))[1], expected[:7])
    close(positions(torch.zeros(1, 100, 10), start=200)[0], expected[200:])
    # In bf16 every number is the rounded one, however long the sequence.
    late = positions(torch.zeros(1, 1, 10, dtype=torch.bfloat16), start=299)[0, 0]
    assert torch.equal(late, expected[299].bfloat16())


def test_rotary_positions_are_a_complex_rotation_and_see_only_distances():
    rotary = Rotary(8)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    places = torch.arange(4, 9, dtype=torch.float64)
    angles = torch.outer(places, 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    close(rotary(x, start=4), torch.cat((turned.real, turned.imag), dim=-1))
    query, key = x[:, :, :1], x[:, :, 1:2]
    products = [(rotary(query, start + 3) * rotary(key, start)).sum() for start in (0, 50, 700)]
    close(products[1], products[0])
    close(products[2], products[0])


def test_feed_forwards_are_the_papers():
    x = torch.randn(4, DIM)
    layer = FeedForward(DIM, WIDTH, "swiglu", 0.0, bias=False)
    gate, value = layer.inner.weight[:WIDTH], layer.inner.weight[WIDTH:]
    close(layer(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ value.T)) @ layer.outer.weight.T)


def test_rms_norm_is_the_papers():
    norm = randomise(RMSNorm(DIM))
    x = torch.randn(4, DIM)
    close(norm(x), x / x.square().mean(dim=-1, keepdim=True).sqrt() * norm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 7), (40, 4, 9, 30), (2, 3, 1, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_attend_gives_the_same(monkeypatch, dtype, shape, masked):
    rows, heads, queries, keys = shape
    query = torch.randn(rows, heads, queries, 8, dtype=dtype)
    key, value = torch.randn(2, rows, heads, keys, 8, dtype=dtype)
    mask = torch.rand(rows, 1, 1, keys) < 0.7
    mask[..., 0] = True
    for causal in (False, True):
        scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(8)
        for i in range(queries):
            for j in range(keys):
                hidden = ~mask[:, 0, 0, j] if masked else torch.zeros(rows, dtype=torch.bool)
                if causal and j > keys - queries + i:
                    hidden = torch.ones(rows, dtype=torch.bool)
                scores[hidden, :, i, j] = -math.inf
        expected = (scores.softmax(dim=-1) @ value.double()).to(dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
        for by_matmul in (False, True):
            monkeypatch.setattr(attention, "_by_matmul", lambda *_, choice=by_matmul: choice)
            found = attend(query, key, value, mask if masked else None, causal)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, **tolerance)


def test_attention_dropout_drops_weights_and_keeps_the_mean():
    query, key, value = torch.zeros(1, 1, 4000, 4), torch.zeros(1, 1, 10, 4), torch.ones(1, 1, 10, 4)
    seen = attend(query, key, value, dropout=0.5)[0, 0, :, 0]
    assert set((seen * 5).round().int().tolist()) == set(range(11))  # 0 to 10 of ten weights kept, each doubled
    assert seen.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_rate_and_the_mean(dtype, p):
    x = torch.ones(1000, 1003, dtype=dtype)
    dropped = dropout(x, p)
    kept = (dropped != 0).double().mean().item()
    lanes, factor = keep_probability(p, dtype)
    assert kept == pytest.approx(1 - p, abs=0.004)  # bf16 rounds 1 / (1 - p), and the rate follows
    assert dropped.unique().tolist() == [0, factor]
    assert lanes / 2**15 * factor == pytest.approx(1, abs=1e-4)
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.005)
    # Columns 0 to 3 come from one draw of 64 bits: they must not go together.
    columns = (dropped[:, :1000].reshape(-1, 4) != 0).double()
    assert torch.corrcoef(columns.T).fill_diagonal_(0).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_dropout_is_mask_times_scale(dtype):
    x = torch.randn(30, 7, dtype=dtype, requires_grad=True)
    torch.manual_seed(5)
    dropped = dropout(x, 0.4)
    _, factor = keep_probability(0.4, dtype)
    weights = torch.randn(30, 7, dtype=dtype)
    dropped.backward(weights)
    assert torch.equal(x.grad, torch.where(dropped != 0, weights * factor, 0))


def test_dropout_follows_the_seed_and_leaves_the_input_alone():
    x = torch.randn(50, 50)
    before = x.clone()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(x, before)
    assert Dropout(0.2).eval()(x) is x
    assert dropout(x, 0.0) is x


def test_linear_equals_torch_and_starts_xavier_uniform():
    ours, x = Linear(300, 200), torch.randn(4, 300)
    close(ours(x), F.linear(x, ours.weight, ours.bias))
    bound = math.sqrt(6 / 500)
    assert ours.weight.abs().max() <= bound
    assert ours.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert ours.bias.abs().max() == 0
    assert Linear(3, 2, bias=False).bias is None


def test_all_projections_of_attention_start_with_one_bound():
    self_attention, cross = SelfAttention(64, 4, True, 0.0), CrossAttention(64, 4, True, 0.0)
    for weight in (self_attention.joined.weight, cross.query.weight, cross.joined.weight):
        assert weight.abs().max().item() == pytest.approx(math.sqrt(1.5 / 64), rel=0.01)


def test_embeddings_start_with_the_padding_at_zero():
    model = Transformer(Transformer.Config(d_model=64, heads=4, encoder_layers=1, decoder_layers=1), 500, 500)
    weight = model.target_embedding.weight
    assert weight[0].abs().max() == 0
    assert weight[1:].std().item() == pytest.approx(64**-0.5, rel=0.03)


@pytest.mark.parametrize("width", [1, 7, 14, 31, 32])
def test_softmax_of_short_rows_and_its_gradient(width):
    random = torch.Generator().manual_seed(width)
    scores = (torch.randn(3, 5, width, generator=random) * 4).bfloat16()
    gradient = torch.randn(3, 5, width, generator=random).bfloat16()
    results = []
    for function, dtype in ((softmax, torch.bfloat16), (lambda x: x.softmax(-1), torch.float64)):
        given = scores.to(dtype, copy=True).requires_grad_()
        shares = function(given)
        shares.backward(gradient.to(dtype))
        results.append((shares.double(), given.grad.double()))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=0.02, rtol=0.02)
