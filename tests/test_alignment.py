"""Attention is what plain torch computes; alignments are read from the right place and told in words."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TinyGru, pad
from torch import nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.attention import Head, align, heads, layers
from encdec_cli.errors import DataError, UsageError
from encdec_cli.generation import alignment
from encdec_cli.generation.alignment import best_head, word_links, word_numbers
from encdec_cli.generation.lines import Options, generate
from encdec_cli.generation.model1 import ROUNDS, posteriors
from encdec_cli.models.model import Memory, Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.tasks.translation import Translation
from encdec_cli.text.example import Example
from encdec_cli.text.tokenizer import TokenizerOptions, train_tokenizer
from encdec_cli.text.vocabulary import BOS, EOS
from tests.conftest import encdec

SOURCE, MASK = pad([[5, 6, 7, 8, EOS], [9, EOS], [10, 11, 12, EOS]])
TARGET, _ = pad([[BOS, 5, 9, 8, 13, 6, EOS], [BOS, 20, 21, EOS], [BOS, EOS]])


def build(**changes) -> Transformer:
    torch.manual_seed(3)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "heads": 2, "feed_forward": 24}
    model = Transformer(Transformer.Config(**{**sizes, **changes}), 40, 40)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


# The seam ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_weights_are_those_that_plain_torch_computes_with_copied_matrices(order):
    model, shown = build(norm_order=order), []
    for layer in model.decoder:
        theirs = nn.MultiheadAttention(16, 2, batch_first=True)
        theirs.load_state_dict({
            "in_proj_weight": torch.cat((layer.cross.query.weight, layer.cross.joined.weight)),
            "in_proj_bias": torch.cat((layer.cross.query.bias, layer.cross.joined.bias)),
            "out_proj.weight": layer.cross.output.weight, "out_proj.bias": layer.cross.output.bias,
        })  # fmt: skip
        shown.append(theirs)
    memory = model.encode(SOURCE, MASK)
    asked: list[torch.Tensor] = []
    hooks = [layer.cross.query.register_forward_pre_hook(lambda _, x: asked.append(x[0])) for layer in model.decoder]
    model.decode(TARGET, model.start(memory))
    for hook in hooks:
        hook.remove()
    found = list(model.attention(TARGET, model.start(memory)))
    assert len(found) == 2
    for weights, theirs, x in zip(found, shown, asked, strict=True):
        expected = theirs(x, memory.states, memory.states, key_padding_mask=~MASK, average_attn_weights=False)[1]
        torch.testing.assert_close(weights, expected)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_attention_sums_to_one_over_real_tokens_and_reads_as_decode_does(positions):
    model = build(positions=positions)
    memory = model.encode(SOURCE, MASK)
    whole = [weights.clone() for weights in model.attention(TARGET, model.start(memory))]
    for weights in whole:
        assert weights.shape == (3, 2, 7, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7))
        assert not weights.masked_select(~MASK[:, None, None]).any()
    state = model.start(memory)
    pieces = [list(model.attention(part, state)) for part in TARGET.split([1, 4, 2], dim=1)]
    for layer, weights in enumerate(whole):
        torch.testing.assert_close(torch.cat([piece[layer] for piece in pieces], dim=2), weights)
    after, plain = model.start(memory), model.start(memory)
    list(model.attention(TARGET, after))
    model.decode(TARGET, plain)
    torch.testing.assert_close(model.decode(TARGET[:, :1], after), model.decode(TARGET[:, :1], plain))


@torch.no_grad()
def test_the_rows_of_a_beam_look_at_their_own_sentence():
    model, target = build(), torch.randint(4, 40, (6, 5), generator=torch.Generator().manual_seed(1))
    found = list(layers(model, SOURCE, MASK, target, beam=2))
    expected = list(layers(model, SOURCE.repeat_interleave(2, 0), MASK.repeat_interleave(2, 0), target))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_who_stops_early_spares_the_layers_that_follow():
    model = build()
    model.decoder[1] = None  # a call of it would fail
    first = next(layers(model, SOURCE, MASK, TARGET))
    assert first.shape == (3, 2, 6, 5)


def test_a_model_without_attention_says_so():
    with pytest.raises(UsageError, match=r"this model \(TinyGru\) has no attention to show"):
        heads(TinyGru())
    assert heads(build(decoder_layers=3)) == [2, 2, 2]


# Where tokens come from ----------------------------------------------------------------------------


class Looking(Model):
    """A model of three heads: at position t one looks at source token t, one at t + 1, one at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def encode(self, source, mask):
        return Memory(source[..., None].float(), mask)

    def start(self, memory, beam=1):
        return memory

    def attention(self, tokens, state):
        length, width = tokens.shape[1], state.mask.shape[1]
        ends = state.mask.sum(1) - 1
        for shifts in ((0, None), (1, 0)):
            weights = torch.zeros(len(tokens), len(shifts), length, width)
            for head, shift in enumerate(shifts):
                place = torch.arange(length) + shift if shift is not None else torch.zeros(length, dtype=torch.int64)
                place = torch.minimum(place[None], ends[:, None])
                weights[:, head].scatter_(2, place[..., None], 1.0)
            yield weights


def test_a_token_comes_from_where_the_position_before_it_looks():
    target, _ = pad([[BOS, 5, 6, 7, EOS], [BOS, 8, EOS]])
    model = Looking()
    assert align(model, Head(0, 0), SOURCE[:2], MASK[:2], target)[0].tolist() == [0, 1, 2, 3]
    assert align(model, Head(1, 0), SOURCE[:2], MASK[:2], target).tolist()[0] == [1, 2, 3, 4]
    assert align(model, Head(0, 1), SOURCE[:2], MASK[:2], target).tolist() == [[0] * 4] * 2


@torch.no_grad()
def test_a_layer_alone_means_the_mean_of_its_heads():
    model = build(heads=4)
    weights = next(islice(layers(model, SOURCE, MASK, TARGET), 1, None))
    assert torch.equal(align(model, Head(1), SOURCE, MASK, TARGET), weights.mean(1).argmax(-1))
    assert torch.equal(align(model, Head(1, 3), SOURCE, MASK, TARGET), weights[:, 3].argmax(-1))


# Model 1 -------------------------------------------------------------------------------------------


def slow_posteriors(sources, targets):
    """Model 1 in plain Python, with tables by words."""
    table = {(s, t): 1.0 for source, target in zip(sources, targets, strict=True) for s in [0, *source] for t in target}
    found: list = []
    for _ in range(ROUNDS + 1):
        counts, totals, found = dict.fromkeys(table, 0.0), {}, []
        for source, target in zip(sources, targets, strict=True):
            rows = []
            for t in target:
                whole = sum(table[s, t] for s in [0, *source])
                rows.append([table[s, t] / whole for s in source])
                for s in [0, *source]:
                    counts[s, t] += table[s, t] / whole
            found.append(rows)
        for (s, _), count in counts.items():
            totals[s] = totals.get(s, 0.0) + count
        table = {(s, t): count / totals[s] for (s, t), count in counts.items()}
    return found


SENTENCE = st.lists(st.integers(4, 9), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=5))
def test_model_1_equals_plain_python(pairs):
    sources, targets = map(list, zip(*pairs, strict=True))
    for ours, theirs in zip(posteriors(sources, targets), slow_posteriors(sources, targets), strict=True):
        assert ours.tolist() == [pytest.approx(row) for row in theirs]


def test_model_1_learns_a_dictionary_from_pairs():
    # 4 is always with 24, 5 with 25, 6 with 26; each pair has two of them, in either order.
    sources, targets = [[4, 5], [5, 6], [6, 4]] * 4, [[25, 24], [26, 25], [24, 26]] * 4
    for matrix in posteriors(sources, targets):
        assert matrix[0, 1] > 2 * matrix[0, 0]
        assert matrix[1, 0] > 2 * matrix[1, 1]


# From tokens to words ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def subword(request):
    lines = ["the house is small", "small houses are here", "1 2 3 houses", "das Häuschen"] * 20
    options = TokenizerOptions(size=330, symbols=("<turn>", "<2de>"), algorithm=request.param)
    return train_tokenizer("sentencepiece", lines, options)


def test_a_token_belongs_to_the_word_it_stands_in(subword):
    ids = subword.encode("the houses  äüß here")
    pieces = [subword.vocabulary.token(token) for token in ids]
    assert len(pieces) > 4  # words of several tokens, and letters in bytes
    numbers = word_numbers(subword, ids)
    assert numbers[-1] == 3
    assert set(numbers) - {None} == {0, 1, 2, 3}
    for number, word in enumerate(["the", "houses", "äüß", "here"]):
        own = [token for token, place in zip(ids, numbers, strict=True) if place == number]
        assert subword.decode(own).strip() == word


def test_symbols_are_no_words(subword):
    numbers = word_numbers(subword, subword.encode("<2de> the house"), ("<2de>", "<turn>"))
    assert set(numbers) == {None, 0, 1}
    numbers = word_numbers(subword, subword.encode("the <turn> house"), ("<2de>", "<turn>"))
    assert [number for number in numbers if number is not None][-1] == 1


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_in_any_text_the_words_are_numbered_one_after_another(subword, text):
    numbers = [number for number in word_numbers(subword, subword.encode(text)) if number is not None]
    assert numbers == sorted(numbers)
    assert set(numbers) >= set(range(len(text.split())))


@pytest.fixture(scope="module")
def copying(copy_run):
    return Bundle.load(copy_run)


def test_words_are_linked_where_their_tokens_are(copying, subword):
    bundle = replace(copying, source=subword, target=subword)
    source, target = subword.encode("the äüß"), subword.encode("äüß the")
    rows, columns = word_numbers(subword, source), word_numbers(subword, target)
    middle, end = columns.index(1), len(source)
    # All tokens of the first output word look at tokens of the second source word but one, which looks at the first.
    places = [rows.index(1)] * middle + [end] * (len(target) - middle)
    assert word_links(bundle, source, target, places) == "1-0"
    places[middle - 1] = rows.index(0)
    assert word_links(bundle, source, target, places) == "0-0 1-0"
    assert word_links(bundle, source, target, [end] * len(target)) == ""
    assert word_links(bundle, source, [], []) == ""


def test_a_tag_that_the_model_reads_does_not_count(copying, subword):
    recipe = replace(
        copying.recipe, task=replace(copying.recipe.task, config=Translation(target_language="de", tag=True))
    )
    bundle = replace(copying, recipe=recipe, source=subword, target=subword)
    source = subword.encode(bundle.task.source(Example("the house")))
    target = subword.encode("das")
    assert word_links(bundle, source, target, [len(source) - 1] * len(target)) == "1-0"
    tag = subword.vocabulary.id("<2de>")
    assert word_links(bundle, source, target, [source.index(tag)] * len(target)) == ""


# Which head ----------------------------------------------------------------------------------------

DIGITS = [Example(" ".join("0123456789"[i : i + n])) for i in range(6) for n in (3, 5)]


def with_target(turn):
    examples = []
    for example in DIGITS:
        words = example.source.split()
        examples.append(Example(example.source, " ".join(words[turn:] + words[:turn])))
    return examples


@pytest.mark.parametrize(("turn", "head"), [(0, Head(0, 0)), (1, Head(1, 0))])
def test_the_head_that_looks_at_the_words_that_belong_together_is_found(copying, turn, head):
    found = best_head(replace(copying, model=Looking()), with_target(turn))
    assert found == (head, len(DIGITS))


def test_no_more_pairs_are_read_than_needed_and_none_that_do_not_fit(copying, monkeypatch):
    monkeypatch.setattr(alignment, "CELLS", 20)
    unfit = [Example("1 2"), Example("", "1"), Example("1", ""), Example("1 " * 40, "1"), Example("1", "1 " * 40)]
    left = iter([*unfit, *[Example("1 2 3", "1 2 3")] * 9])
    assert best_head(copying, left)[1] == 3
    assert len(list(left)) == 6
    with pytest.raises(DataError, match="no example whose source and target are known and fit"):
        best_head(copying, unfit)


# Through the commands ------------------------------------------------------------------------------


def diagonal(text: str) -> str:
    return " ".join(f"{i}-{i}" for i in range(len(text.split())))


def test_a_model_that_copies_is_aligned_along_the_diagonal(copying):
    head, pairs = best_head(copying, copying.recipe.data.config.read("valid"))
    assert pairs == 40
    lines = [Example(example.source) for example in copying.recipe.data.config.read("test")]
    results = list(generate([copying], [lines], Options(copying.recipe.decoding.config, n_best=2, head=head)))
    right = [one for one in results if one.candidates[0].text == one.example.source]
    straight = sum(one.candidates[0].alignment == diagonal(one.example.source) for one in right)
    assert len(right) > 30
    assert straight >= 0.9 * len(right)
    again = generate([copying], [lines[:7]], Options(copying.recipe.decoding.config, batch=2, workers=2, head=head))
    assert [one.candidates[0].alignment for one in again] == [one.candidates[0].alignment for one in results[:7]]


def test_the_command_adds_pairs_after_each_output(copy_run):
    lines = "1 2 3\n\n4 5\n"
    done = encdec("generate", "--model", copy_run, "--alignments", "best", "--workers", "1", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["1 2 3\t0-0 1-1 2-2", "", "4 5\t0-0 1-1", ""]
    assert "agrees best with IBM Model 1 on 40 validation pairs; --alignments 0" in done.stderr
    head = done.stderr.partition("--alignments ")[2].split()[0]
    asked = ("--alignments", head, "--workers", "1")
    done = encdec("generate", "--model", copy_run, "--n-best", "2", "--json", *asked, stdin=lines)
    first = json.loads(done.stdout.partition("\n")[0])
    assert first["alignment"] == first["candidates"][0]["alignment"] == "0-0 1-1 2-2"
    assert "alignments:" not in done.stderr
    done = encdec("generate", "--model", copy_run, "--score", *asked[:2], stdin="1 2 3\t1 2 3\n7\t\n")
    assert [line.split("\t")[3] for line in done.stdout.split("\n")[:2]] == ["0-0 1-1 2-2", ""]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("1", "the model's 1 decoder layers are 0 to 0"),
        ("0.2", "the 2 heads of layer 0 are 0 to 1"),
    ],
)
def test_a_head_that_is_not_there_is_refused_before_anything_is_read(copying, named, told):
    from encdec_cli.cli.scoring import choose_head

    with pytest.raises(UsageError, match=told):
        choose_head(copying, named)


def test_what_names_no_head_is_refused_without_a_model():
    from encdec_cli.cli.scoring import check_head

    with pytest.raises(UsageError, match=r"expected best, a decoder layer such as 3, or a head of one, 3\.1"):
        check_head("first")


def test_without_validation_data_a_head_must_be_named(copying):
    from encdec_cli.cli.scoring import choose_head

    files = replace(copying.recipe.data.config, root="/nowhere")
    bundle = replace(copying, recipe=replace(copying.recipe, data=replace(copying.recipe.data, config=files)))
    with pytest.raises(DataError, match=r"validation split: .*; name a head, such as --alignments 3\.1"):
        choose_head(bundle, "best")
    assert choose_head(bundle, "0") == Head(0)
