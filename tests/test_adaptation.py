"""Beginning from another run's weights: other vocabularies, frozen weights, low-rank adaptation."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from encdec_cli.bundle.bundle import build_model
from encdec_cli.bundle.checkpoint import step_name
from encdec_cli.errors import UsageError
from encdec_cli.models.linear import Linear
from encdec_cli.models.model import Memory, Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Lora, from_resolved
from encdec_cli.text.tokenizer import Character, SentencePiece, TokenizerOptions, Word
from encdec_cli.text.vocabulary import Vocabulary, with_special
from encdec_cli.training.initial import mapped, origins, vocabulary_axes
from encdec_cli.training.learning import freeze, matching
from encdec_cli.training.lora import adapt, merged
from tests.test_resume import fingerprint, lines_of

SHORT = ("train.steps=12", "train.validate_every=6", "train.save_every=3", "train.log_every=1", "train.precision=fp32")


@pytest.fixture(scope="module")
def base(forks, corpus, tmp_path_factory):
    """A run to begin from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = forks("train", corpus, *SHORT, "--output", folder)
    assert done.wait() == 0, done.stderr
    return folder


def weights(bundle):
    return load_file(bundle / "model.safetensors")


def small(**keys) -> Transformer:
    return Transformer(Transformer.Config(1, 1, 8, 2, 16, dropout=0.0, **keys), 16, 16)


def outputs(model: Model) -> Tensor:
    source, target = torch.tensor([[4, 5, 6, 3]]), torch.tensor([[2, 7, 8]])
    return model.project(model(source, source > 0, target)[0])


# --- vocabularies


def test_an_entry_for_each_token_wherever_it_stands() -> None:
    origin = [[0], [1], [], [2, 0]]
    fresh = torch.full((4, 2), 9.0)
    old = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0], [3.0, 4.0]])
    assert torch.equal(mapped(old, fresh, 0, origin), expected)
    assert torch.equal(mapped(old.T, fresh.T, 1, origin), expected.T)
    assert torch.equal(mapped(old[:, 0], fresh[:, 0], 0, origin), expected[:, 0])


def test_tokens_come_from_the_same_ones_or_from_their_pieces() -> None:
    theirs = SentencePiece.train(["the cat sat on the mat"] * 20, TokenizerOptions(300, "unigram"))
    ours = Word(Vocabulary(with_special(["cat", "thecat", "кот"])))
    found = origins(ours, theirs)
    assert found[:4] == [[0], [1], [2], [3]]
    assert list(found[5]) == theirs.encode("thecat")
    assert len(found[5]) > 1
    assert found[6] == []  # bytes tell nothing
    characters = Character(Vocabulary(with_special(["a", "b"])))
    assert origins(characters, Character(Vocabulary(with_special(["b"])))) == [[0], [1], [2], [3], [], [4]]


class Odd(Model):
    """A model with a bias for each target token, a column for each source token, and a matrix of the same size."""

    class Config:
        pass

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, source))
        self.bias = nn.Parameter(torch.zeros(target))
        self.other = nn.Parameter(torch.zeros(20, 20))

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return Memory(source, mask)


def test_what_belongs_to_a_vocabulary_is_found_in_any_model(monkeypatch) -> None:
    plain = {"task": {"name": "translation"}, "data": {"name": "cldr"}}
    monkeypatch.setattr("encdec_cli.training.initial.build_model", lambda recipe, source, target: Odd(source, target))
    axes = vocabulary_axes(Odd(20, 20).state_dict(), from_resolved(plain), 20, 20)
    assert axes == {"source": [("table", 1)], "target": [("bias", 0)]}


@pytest.mark.parametrize(
    ("tie", "source", "target"),
    [
        ("all", [], ["target_embedding.weight"]),
        ("decoder", ["source_embedding.weight"], ["target_embedding.weight"]),
        ("none", ["source_embedding.weight"], ["target_embedding.weight", "output.weight"]),
    ],
)
def test_what_belongs_to_the_vocabularies_of_a_transformer(tie, source, target) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "heads": 2, "feed_forward": 16, "tie": tie}
    plain = {"task": {"name": "translation"}, "data": {"name": "cldr"}, "model": {"name": "transformer", **sizes}}
    recipe = from_resolved(plain)
    # The feed-forward is as wide as the vocabulary is large: sizes tell nothing.
    own = build_model(recipe, 16, 16).state_dict()
    state = torch.get_rng_state()
    axes = vocabulary_axes(own, recipe, 16, 16)
    assert axes == {"source": [(name, 0) for name in source], "target": [(name, 0) for name in target]}
    assert torch.equal(torch.get_rng_state(), state)


def test_another_vocabulary_keeps_the_tokens_that_are_the_same(forks, base, corpus, tmp_path):
    text = corpus.read_text().replace("vocabulary: 40", "vocabulary: 11")
    other = tmp_path / "fewer.yaml"
    other.write_text(text)
    still = ("train.steps=1", "train.validate_every=1", "train.rate=1e-12")
    done = forks("train", other, *SHORT, *still, "--init-from", base, "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert "another shared vocabulary: 11 of 11 tokens taken over" in done.stderr
    old, new = (json.loads((run / "bundle/source.tokenizer").read_text())["tokens"] for run in (base, tmp_path / "run"))
    before, after = weights(base / "bundle"), weights(tmp_path / "run" / "bundle")
    assert len(new) < len(old)
    for name, weight in after.items():
        rows = [old.index(token) for token in new] if name == "target_embedding.weight" else slice(None)
        torch.testing.assert_close(weight, before[name][rows], atol=1e-6, rtol=0)


# --- frozen weights


def test_frozen_weights_stay_and_the_checkpoint_remembers_nothing_of_them(forks, base, corpus, tmp_path):
    run = tmp_path / "run"
    # In bf16, so that their full precision must be kept apart.
    words = ("train", corpus, *SHORT, "train.precision=bf16", "train.freeze=[encoder.*]", "--init-from", base)
    tried = forks(*words, "--dry-run", "--output", tmp_path / "dry")
    assert tried.wait() == 0, tried.stderr
    assert "parameters, of which" in tried.stderr
    done = forks(*words, "--output", run)
    assert done.wait() == 0, done.stderr
    before, after = weights(base / "bundle"), weights(run / "bundle")
    assert {name for name in after if after[name].equal(before[name])} == {n for n in after if n.startswith("encoder.")}
    state = load_file(run / "checkpoints" / step_name(12) / "state.safetensors")
    assert {name.partition(".")[0] for name in state if ".encoder." in name} == {"master"}
    refused = forks("train", corpus, *SHORT, "train.precision=bf16", "train.steps=14", "--output", run)
    assert refused.wait() == 2
    assert "train.freeze was ['encoder.*'], is []" in refused.stderr


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(
        UsageError, match=r"train\.freeze: 'encodr\.\*' matches no parameter.*did you mean 'encoder\.\*'"
    ):
        freeze(small(), ["encodr.*"])
    with pytest.raises(UsageError, match="no parameter that learns"):
        freeze(small(), ["*"])
    assert matching(["*.b", "a.*"], ["a.b", "c.b", "c.d"], "key", "name") == ["a.b", "c.b"]


# --- low-rank adaptation

PARTS = ("attention.joined", "attention.output")
ADAPTED = [*(f"{stack}.0.{part}" for stack in ("encoder", "decoder") for part in PARTS), "output"]


def test_a_change_of_low_rank_begins_at_nothing_and_is_merged_exactly() -> None:
    torch.manual_seed(1)
    model, plain = small(tie="none"), small(tie="none")
    plain.load_state_dict(model.state_dict())
    adapt(model, Lora(3, alpha=6.0, targets=["*.attention.*", "output"], whole=["encoder_norm.*"]))
    assert torch.equal(outputs(model), outputs(plain))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *(f"{name}.lora_{half}" for half in "ab" for name in ADAPTED),
        *("encoder_norm.weight", "encoder_norm.bias"),
    }
    for name in ADAPTED:
        nn.init.normal_(model.get_parameter(f"{name}.lora_b"))
    changed = merged(model, model.state_dict())
    assert changed.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        change = changed[name] - weight
        adapted = name.removesuffix(".weight") in ADAPTED
        assert torch.linalg.matrix_rank(change, atol=1e-5) == 3 if adapted else not change.any()
    plain.load_state_dict(changed)
    torch.testing.assert_close(outputs(plain), outputs(model))


def test_the_scale_of_the_change_is_alpha_by_rank() -> None:
    linear = Linear(2, 2, bias=False)
    holder = nn.ModuleDict({"a": linear})
    adapt(holder, Lora(1, alpha=4.0))
    with torch.no_grad():
        for name, value in (("weight", [[1.0, 0], [0, 1]]), ("lora_a", [[1.0, 2]]), ("lora_b", [[3.0], [0]])):
            holder.get_parameter(f"a.{name}").copy_(torch.tensor(value))
    assert holder["a"](torch.tensor([1.0, 1.0])).tolist() == [1 + 4 * 3 * (1 + 2), 1]


WIDE = ("joined.weight", "output.weight", "query.weight", "inner.weight", "outer.weight")
LORA = (*SHORT, "lora.rank=2", "lora.targets=[decoder.*]")


def test_what_is_adapted_must_have_learned_before(forks, corpus, tmp_path):
    done = forks("train", corpus, *LORA, "--output", tmp_path / "run")
    assert done.wait() == 2
    assert "lora.rank" in done.stderr
    assert "--init-from" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_adapted_run_that_was_killed_ends_with_the_same_bytes(forks, base, corpus, tmp_path):
    words = ("train", corpus, *LORA, "train.ema=0.5", "train.optimizer=adafactor", "--init-from", base, "--output")
    unbroken = forks(*words, tmp_path / "unbroken")
    assert unbroken.wait() == 0, unbroken.stderr
    run, generator, kills = tmp_path / "run", random.Random(3), 0
    while True:
        command = forks.start(*words, run)
        wanted = lines_of(run / "log.jsonl") + generator.randint(2, 5)
        while command.code() is None and lines_of(run / "log.jsonl") < wanted:
            time.sleep(0.002)
        if command.code() is not None:
            break
        command.send(9)
        command.wait()
        kills += 1
    assert command.code() == 0, command.stderr
    assert kills
    assert "note: --init-from does nothing now" in command.stderr
    assert fingerprint(run) == fingerprint(tmp_path / "unbroken")
    before, after = weights(base / "bundle"), weights(run / "bundle")
    assert before.keys() == after.keys()
    changed = [name for name in after if not after[name].equal(before[name])]
    assert changed == [name for name in after if name.startswith("decoder.") and name.endswith(WIDE)]
    assert all(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2 for name in changed)
    state = load_file(run / "checkpoints" / step_name(12) / "state.safetensors")
    assert all("lora" in name for name in state if name.startswith(("rows.", "columns.", "square.", "ema.")))
    told = forks("train", corpus, *LORA, "lora.alpha=1.0", "--init-from", base, "--output", run)
    assert told.wait() == 2
    assert "lora.alpha was 16.0, is 1.0" in told.stderr
