"""What a run is refused for, and what it is told does nothing, before any data is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.fsdp import FSDPModule

from encdec_cli.errors import BundleError, DataError, UsageError
from encdec_cli.recipe import load
from encdec_cli.training.beforehand import check
from encdec_cli.training.distributed import Ranks
from tests.conftest import RECIPE


def told(folder: Path, *overrides: str, world: int = 1, starts: bool = False) -> list[str]:
    """The notes on a recipe whose data are nowhere."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root=folder / "nowhere"))
    said: list[str] = []
    recipe = load(path, overrides)
    check(recipe, folder / "run", starts, Ranks(0, world, None, recipe.parallel.tensor), said.append)
    return said


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora.rank=2", "lora.rank: .* --init-from"),
        ("train.freeze=[encodr.*]", r"train.freeze: 'encodr\.\*' matches no parameter"),
        ("train.freeze=['*']", "train.freeze: .* leave no parameter"),
        ("guide={weight: 0.1, head: 2}", "guide.head: 2, but the heads of layer 0 are 0 to 1"),
        ("risk.metric=perplexity", "risk.metric: perplexity judges no outputs"),
        ("risk.metric=bluu", "no metric 'bluu'"),
        ("teacher.model=nowhere", "nowhere: no such model folder"),
        ("guide={weight: 0.1, alignments: nowhere}", "guide.alignments: nowhere: there is no such file"),
        ("regularize.subword_sampling=0.1", "regularize.subword_sampling: a word tokenizer knows one way"),
    ],
)
def test_what_needs_no_data_is_told_without_any(tmp_path, key, message):
    with pytest.raises((UsageError, BundleError, DataError), match=message):
        told(tmp_path, key)


def test_a_pattern_of_lora_is_tried(tmp_path):
    with pytest.raises(UsageError, match=r"lora.targets: 'nothing' matches no linear layer"):
        told(tmp_path, "lora={rank: 2, targets: [nothing]}", starts=True)
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert told(tmp_path, "lora.rank=2") == []  # it goes on


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.accumulate=2"], "3 processes cannot share an update in 2 part"),
        (["train.accumulate=4", "parallel.shard=true"], "multiple of 3"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, keys, message):
    with pytest.raises(UsageError, match=message):
        told(tmp_path, *keys, world=3)


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ([], []),
        (["lora.targets=[encoder.nothing]"], ["lora.targets does nothing without lora.rank"]),
        (["train.average=3", "train.patience=2", "train.average_of=best"], []),
        (
            ["train.average=3", "train.patience=2", "train.validate_every=0"],
            [
                "train.average does nothing without train.validate_every",
                "train.patience does nothing",
            ],
        ),
        (["train.average_of=best"], ["train.average_of does nothing without train.average"]),
        (["regularize.rdrop=5"], []),
        (["regularize.rdrop=5", "model.dropout=0"], ["regularize.rdrop does nothing without dropout"]),
        (["regularize.rdrop=5", "model.dropout=0", "model.attention_dropout=0.1"], []),
        (
            ["regularize.smoothing_prior=unigram", "train.label_smoothing=0"],
            ["regularize.smoothing_prior does nothing without train.label_smoothing"],
        ),
        (
            ["risk.metric=chrf", "regularize.rdrop=5", "regularize.smoothing_prior=unigram"],
            ["risk.metric: the outputs of a model that has learned nothing", "regularize.rdrop does", "regularize.smo"],
        ),
        (["regularize.word_dropout_warmup=9"], ["regularize.word_dropout_warmup does nothing without word dropout"]),
        (
            ["risk.samples=3", "teacher.weight=1"],
            ["risk.samples does nothing", "teacher.weight does"],
        ),
    ],
)
def test_each_key_that_does_nothing_is_told_once(tmp_path, keys, notes):
    said = told(tmp_path, *keys)
    assert len(said) == len(notes)
    for sentence, note in zip(said, notes, strict=True):
        assert sentence.startswith(f"note: {note}")


def test_shares_need_a_torch_that_sums_their_gradients(tmp_path, monkeypatch):
    keys = ["train.accumulate=2", "parallel.shard=true"]
    assert told(tmp_path, *keys, world=2) == []
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(UsageError, match=r"parallel.shard: torch .* install torch 2.9 or newer"):
        told(tmp_path, *keys, world=2)
    assert told(tmp_path, *keys) == []  # one process shares with nobody


def test_a_warmup_that_is_longer_than_the_run_is_noted(tmp_path):
    (said,) = told(tmp_path, "train.steps=10", "train.warmup=11")
    assert said == "note: train.warmup: 11 of 10 updates, so train.rate is never reached"
    assert told(tmp_path, "train.steps=10", "train.warmup=10") == []
