"""The laws of models x the Transformer's variants and the example plugin, and that all laws can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli import registry, testing
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.models.model import Memory
from encdec_cli.models.remembered import KeysValues
from encdec_cli.models.transformer import Transformer
from encdec_cli.testing import models as laws

GRU = Path(__file__).parent.parent / "docs" / "examples" / "gru.py"
SMALL = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "heads": 2, "feed_forward": 24}


def transformer(source_vocab: int = 17, target_vocab: int = 17, **keys: object) -> Transformer:
    return Transformer(Transformer.Config(**{**SMALL, **keys}), source_vocab, target_vocab)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_transformer_variants_obey_the_laws(positions, norm_order, norm):
    testing.check(lambda: transformer(positions=positions, norm_order=norm_order, norm=norm, max_positions=32))


variants = st.fixed_dictionaries(
    {
        "encoder_layers": st.integers(1, 3),
        "decoder_layers": st.integers(1, 3),
        "d_model": st.sampled_from([8, 24]),
        "heads": st.sampled_from([1, 2, 4]),
        "feed_forward": st.integers(3, 20),
        "norm_order": st.sampled_from(["pre", "post"]),
        "norm": st.sampled_from(["layer", "rms"]),
        "activation": st.sampled_from(["relu", "gelu", "swiglu"]),
        "positions": st.sampled_from(["sinusoidal", "learned", "rotary"]),
        "tie": st.sampled_from(["none", "decoder", "all"]),
        "scale_embeddings": st.booleans(),
        "bias": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(keys=variants, seed=st.integers(0, 2**31), vocab=st.tuples(st.integers(5, 40), st.integers(5, 40)))
def test_random_transformers_obey_the_laws(keys, seed, vocab):
    source, target = (vocab[0], vocab[0]) if keys["tie"] == "all" else vocab
    # A dead ReLU of a tiny feed-forward may starve a bias: width and seed are random, so the gradient law is not.
    torch.manual_seed(seed)
    case = laws.make_case(transformer(source, target, **keys), (source, target), seed)
    for law in laws.LAWS:
        if law is not laws.gradients:
            law(case)


def test_one_line_checks_a_class():
    testing.check(Transformer)


def test_the_example_plugin_obeys_the_laws():
    registry.load_plugin(GRU)
    gru = registry.models.get("gru")
    for seed in range(3):
        testing.check(gru, source_vocab=11, target_vocab=13, seed=seed)


class Unsorted(Beam):
    def __call__(self, *args):
        return [found[::-1] for found in super().__call__(*args)]


class Flattered(Beam):
    def __call__(self, *args):
        found = super().__call__(*args)
        for hypothesis in found[0]:
            hypothesis.token_scores[0] += 0.1
        return found


class TooLong(Beam):
    def __call__(self, stepper, limits, rules):
        return super().__call__(stepper, Limits(limits.minimum, limits.maximum + 1), rules)


class Drawn(Sampling):
    """Draws by the place in the batch."""

    def __call__(self, stepper, limits, rules):
        stepper.__dict__["keys"] = list(range(stepper.sentences))
        return super().__call__(stepper, limits, rules)


class Deaf(Beam):
    """Is given constraints and does not read them."""

    reads_constraints = True


class Lawless(Beam):
    def __call__(self, stepper, limits, rules):
        return super().__call__(stepper, limits, [])


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Lawless(beam=2), "must obey its rules"),
        (Deaf(beam=2), "must meet its constraints"),
        (Unsorted(beam=3), "best first"),
        (Flattered(beam=2), "teacher forcing"),
        (TooLong(beam=1), "expected by the limits"),
        (Drawn(beam=2), "other sentences of the batch"),
    ],
)
def test_every_law_of_strategies_catches_who_breaks_it(broken, sentence):
    with pytest.raises(testing.LawError, match=sentence):
        testing.check_strategy(broken)


def test_bf16_parameters_stay_bf16_and_obey_the_laws():
    for positions in ("sinusoidal", "learned", "rotary"):
        for norm in ("layer", "rms"):
            torch.manual_seed(1)
            model = transformer(positions=positions, norm=norm, activation="swiglu").to(torch.bfloat16)
            # bf16 keeps 8 bits: the laws hold up to a few roundings in every layer.
            case = laws.make_case(model, (17, 17), seed=1, tolerance=0.05)
            for law in laws.LAWS:
                law(case)
            memory = model.encode(case.source, case.mask)
            hidden = model.decode(case.target, model.start(memory))
            assert memory.states.dtype == hidden.dtype == model.project(hidden[0]).dtype == torch.bfloat16


class SeesPadding(Transformer):
    """Ignores the mask."""

    def encode(self, source, mask):
        return super().encode(source, torch.ones_like(mask))


class SeesFuture(Transformer):
    """Looks at the whole target when it gets it at once."""

    def decode(self, tokens, state):
        hidden = super().decode(tokens, state)
        return hidden + hidden.mean(dim=1, keepdim=True)


class ReadsBackwards(Transformer):
    """Reads every piece backwards."""

    def decode(self, tokens, state):
        return super().decode(tokens.flip(1), state).flip(1)


class ForgetsOrder(Transformer):
    """Its state does not reorder what it wrote."""

    def start(self, memory, beam=1):
        state = super().start(memory, beam)
        state.ancestry.reorder = lambda rows: setattr(
            state.ancestry, "_bias", None if state.ancestry._bias is None else state.ancestry._bias[: len(rows)]
        )
        return state


class ForgetsSentences(Transformer):
    """Its state keeps the wrong sources when sentences leave."""

    def start(self, memory, beam=1):
        state = super().start(memory, beam)
        reorder = state.reorder

        def wrong(rows):
            sentences = len(rows) // beam
            reorder(rows)
            state.sources = [tuple(part[:sentences] for part in pair) for pair in first]

        first = list(state.sources)
        state.reorder = wrong
        return state


class ForgetsToForget(Transformer):
    """Its state goes back only when it is told to forget everything."""

    def start(self, memory, beam=1):
        state = super().start(memory, beam)
        whole = state.crop
        state.crop = lambda length: whole(length) if length == 0 else None
        return state


class UnusedWeight(Transformer):
    """Has a parameter that nothing reads."""

    def __init__(self, *args):
        super().__init__(*args)
        self.unused = torch.nn.Parameter(torch.ones(3))


class MixesRows(Transformer):
    """Its output layer looks at its neighbours."""

    def project(self, hidden):
        return super().project(hidden - hidden.mean(dim=0))


class ShowsPadding(Transformer):
    """Shows attention to padding."""

    def attention(self, tokens, state):
        for weights in super().attention(tokens, state):
            yield torch.full_like(weights, 1 / weights.shape[-1])


class ShowsScores(Transformer):
    """Shows attention that is not normalised."""

    def attention(self, tokens, state):
        return (2 * weights for weights in super().attention(tokens, state))


class ShowsTheLast(Transformer):
    """Shows for every position the attention of the last."""

    def attention(self, tokens, state):
        return (weights[:, :, -1:].expand_as(weights) for weights in super().attention(tokens, state))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (SeesPadding, "more padding of the source must change nothing"),
        (SeesFuture, "must equal decoding at once"),
        (ReadsBackwards, "must equal decoding at once"),
        (ForgetsOrder, "reorder"),
        (ForgetsSentences, "reorder"),
        (ForgetsToForget, "crop"),
        (UnusedWeight, "unused gets no gradient"),
        (MixesRows, "project in chunks"),
        (ShowsPadding, "attention must be 0 where the mask is False"),
        (ShowsScores, "attention must sum to 1"),
        (ShowsTheLast, "attention step by step"),
    ],
)
def test_every_law_catches_who_breaks_it(broken, sentence):
    with pytest.raises(testing.LawError, match=sentence):
        testing.check(broken)


def test_the_law_about_the_future_catches_by_itself():
    torch.manual_seed(0)
    model = SeesFuture(Transformer.Config(**SMALL), 17, 17)
    with pytest.raises(testing.LawError, match="later target tokens"):
        laws.no_future(laws.make_case(model, (17, 17), seed=0))


def test_an_empty_source_stays_finite_and_disturbs_nobody():
    torch.manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        model = transformer().to(dtype).eval()
        source, target = torch.tensor([[5, 6, 3], [0, 0, 0]]), torch.tensor([[2, 7, 8], [2, 7, 8]])
        hidden = model(source, source != 0, target)
        assert hidden.isfinite().all()
        torch.testing.assert_close(hidden[:1], model(source[:1], source[:1] != 0, target[:1]), rtol=0.05, atol=0.05)
        hidden.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_are_the_same_in_any_split():
    torch.manual_seed(3)
    model = transformer().eval()
    case = laws.make_case(model, (17, 17), seed=3)
    gradients = []
    for size in (case.target.shape[1], 1):
        model.zero_grad()
        state = model.start(model.encode(case.source, case.mask))
        hidden = torch.cat([model.decode(part, state) for part in case.target.split(size, dim=1)], dim=1)
        hidden.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, stepped in zip(*gradients, strict=True):
        torch.testing.assert_close(stepped, whole, rtol=1e-3, atol=1e-3)


def test_source_keys_are_kept_once_a_sentence_and_move_only_when_sentences_do():
    model = transformer().eval()
    memory = Memory(torch.randn(3, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool())
    with torch.no_grad():
        state = model.start(memory, beam=4)
        assert [keys.shape for keys, _ in state.sources] == [(3, 2, 5, 8)] * 2
        model.decode(torch.full((12, 1), 2), state)
        before = state.sources[0][0]
        state.reorder(torch.tensor([3, 2, 1, 0, 4, 4, 4, 4, 8, 9, 10, 11]))
        assert state.sources[0][0] is before
        state.reorder(torch.tensor([0, 0, 1, 2, 8, 9, 10, 11]))
        assert torch.equal(state.sources[0][0], before[[0, 2]])


def test_the_cache_keeps_the_first_call_as_it_is():
    cache = KeysValues()
    keys, values = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    first, _ = cache.append(keys, values, 0, 3)
    assert first.data_ptr() == keys.data_ptr()
    more, _ = cache.append(keys[:, :, :1], values[:, :, :1], 3, 4)
    assert torch.equal(more, torch.cat((keys, keys[:, :, :1]), dim=2))
    with torch.no_grad():
        more, _ = cache.append(keys[:, :, :1], values[:, :, :1], 4, 8)
    assert torch.equal(more, torch.cat((keys, *[keys[:, :, :1]] * 2, torch.zeros(2, 2, 3, 4)), dim=2))


def test_training_after_inference_mode_works():
    for positions in ("sinusoidal", "rotary"):
        model = transformer(positions=positions)
        source = torch.tensor([[5, 6, 3]])
        with torch.inference_mode():
            model(source, source != 0, source)
        model(source, source != 0, source).sum().backward()
        assert model.target_embedding.weight.grad is not None


def test_a_shared_matrix_is_saved_once():
    names = {tie: transformer(tie=tie).state_dict() for tie in ("none", "decoder", "all")}
    for state in names.values():
        assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert "output.weight" in names["none"]
    assert "source_embedding.weight" in names["decoder"]
    assert "output.weight" not in names["decoder"]
    assert "source_embedding.weight" not in names["all"]


def test_no_greatest_length_but_for_learned_positions():
    long = torch.randint(1, 17, (1, 1500))
    short = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8}
    with torch.no_grad():
        for positions in ("sinusoidal", "rotary"):
            assert transformer(positions=positions, **short)(long, long != 0, long).isfinite().all()
        with pytest.raises(ValueError, match=r"1500 tokens is longer than max_positions \(1024\)"):
            transformer(positions="learned", **short)(long, long != 0, long)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"d_model": 512, "heads": 7}, r"d_model \(512\) must be a multiple of heads \(7\)"),
        ({"encoder_layers": 0}, r"encoder_layers: 0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout: 1.0 must be at least 0 and below 1"),
        ({"d_model": 15, "heads": 3}, r"d_model \(15\) must be even"),
        ({"d_model": 12, "heads": 4, "positions": "rotary"}, r"12 / 4 = 3\) must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        Transformer.Config(**keys)


def test_tying_all_needs_one_vocabulary():
    with pytest.raises(ValueError, match="the source has 17 tokens and the target 18"):
        transformer(17, 18, tie="all")
