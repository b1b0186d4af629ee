"""What a recipe can ask for is the same with shares of a model (`parallel.shard`) as with the whole of it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from encdec_cli.models.checkpointing import checkpointed
from encdec_cli.models.dropout import drawing
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.meter import Meter
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.precision import Precision
from tests.forked import Forks
from tests.test_checkpointing import batches
from tests.test_distributed import assert_same, masters, torchrun, trained

# Without biases: those of keys have no gradient but rounding, of which Adam makes whole steps.
BRIEF = ("train.precision=fp32", "train.accumulate=4", "train.steps=4", "train.validate_every=4", "train.save_every=2")
BRIEF += ("model.bias=false",)
SHARD = "parallel.shard=true"


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory):
    """As everywhere, and ready to share weights: that is seconds of imports."""
    commands = Forks(tmp_path_factory.mktemp("commands"), "encdec_cli.training.sharding")
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def alone(forks, corpus, tmp_path_factory) -> Path:
    """The folder of a run of one process, with a model to begin from."""
    run = tmp_path_factory.mktemp("alone") / "run"
    trained(forks, 1, corpus, *BRIEF, "train.accumulate=1", "--output", run)
    return run


def bundle(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "bundle" / "model.safetensors")


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


def same_as_one(forks, world: int, folder: Path, *options: str | Path) -> None:
    """Train by one process and by shares, unbroken and broken; leave the runs `one` and `more`."""
    one, more, broken = (folder / name for name in ("one", "more", "broken"))
    trained(forks, 1, *options, "--output", one)
    trained(forks, world, *options, SHARD, "--output", more)
    assert_near(masters(more), masters(one))
    assert_near(bundle(more), bundle(one))
    trained(forks, world, *options, SHARD, "train.steps=2", "--output", broken)
    shutil.copytree(broken, folder / "other", symlinks=True)
    trained(forks, world, *options, SHARD, "--output", broken)
    assert_same(broken, more)


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_averages_and_frozen_weights(forks, corpus, tmp_path, world):
    options = (corpus, *BRIEF, "train.ema=0.6", "train.freeze=[encoder.*, target_embedding.weight]")
    same_as_one(forks, world, tmp_path, *options)
    state, published = masters(tmp_path / "more"), bundle(tmp_path / "more")
    frozen = [name for name in published if f"ema.{name}" not in state]
    assert "target_embedding.weight" in frozen
    assert "decoder.0.cross.joined.weight" not in frozen
    for name, value in published.items():
        assert torch.equal(value, state[f"master.{name}" if name in frozen else f"ema.{name}"])
        # Nothing that is frozen has been moved, by whichever rows.
        start = masters(tmp_path / "one")[f"master.{name}"]
        assert (name not in frozen) or torch.equal(value, start)
    # From shares to the whole.
    trained(forks, 1, *options, "--output", tmp_path / "other")
    assert_near(masters(tmp_path / "other"), masters(tmp_path / "more"))
    scores = [json.loads((tmp_path / run / "bundle" / "bundle.json").read_text())["facts"] for run in ("one", "more")]
    assert scores[0]["scores"] == pytest.approx(scores[1]["scores"], rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_layers_that_are_computed_again(forks, corpus, tmp_path, world):
    same_as_one(forks, world, tmp_path, corpus, *BRIEF, "train.checkpointing=true")
    trained(forks, world, corpus, *BRIEF, SHARD, "--output", tmp_path / "plain")
    assert_same(tmp_path / "more", tmp_path / "plain")


def test_a_layer_that_is_computed_again_keeps_as_little_as_without_shares():
    from encdec_cli.training.sharding import Gathered, Root, share_out

    def read(shared: bool, checkpointing: bool) -> tuple[int, int]:
        torch.manual_seed(1)
        model = Transformer(Transformer.Config(4, 4, 32, 4, 128), 30, 30)
        model.checkpointing = checkpointing
        root = Root(model)
        if shared:
            share_out(root, Ranks(), Precision(torch.float32))
        (batch,) = batches(16, 20, 1)
        for _ in range(2):  # the first time the gathered weights get their place
            with drawing(0), Meter() as meter:
                loss = root(partial(CrossEntropy(0.1), model, batch, Gathered(model), 1.0))
                saved = meter.live
                loss.backward()
        return saved, meter.peak

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        (plain, plain_peak), (less, less_peak) = read(True, False), read(True, True)
        assert less == read(False, True)[0] < plain / 3
        assert less_peak < plain_peak / 2
        # A model that would do it around a layer's call gets no gradients, so it is told.
        model = Transformer(Transformer.Config(1, 1, 8, 2, 16), 30, 30)
        share_out(Root(model), Ranks(), Precision(torch.float32))
        with pytest.raises(TypeError, match="inside the layer's call"):
            checkpointed(model.encoder[0], lambda x: (x,), torch.ones(1, 2, 8))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", WORLDS)
def test_low_rank_adaptation(forks, corpus, alone, tmp_path, world):
    # Of a rank of 3 the last of 4 processes has no row.
    keys = ("lora={rank: 3, whole: [encoder_norm.*]}", "--init-from", alone, "train.rate=0.01")
    same_as_one(forks, world, tmp_path, corpus, *BRIEF, *keys)
    state, published = masters(tmp_path / "more"), bundle(tmp_path / "more")
    assert published.keys() == bundle(alone).keys()
    name = "decoder.0.cross.joined"
    a, b = (state[f"master.{name}.lora_{kind}"].double() for kind in "ab")
    added = published[f"{name}.weight"].double() - state[f"master.{name}.weight"].double()
    torch.testing.assert_close(added, b @ a * (16 / 3), rtol=1e-4, atol=1e-6)
    assert torch.equal(state[f"master.{name}.weight"], bundle(alone)[f"{name}.weight"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_rules_for_whole_matrices(forks, corpus, tmp_path, optimizer, world):
    # 14 rows for the words: shares of unequal size. Six shapes, of one to four matrices.
    keys = (f"train.optimizer={optimizer}", "train.weight_decay=0.1")
    same_as_one(forks, world, tmp_path, corpus, *BRIEF, *keys)
    trained(forks, 1, corpus, *BRIEF, *keys, "--output", tmp_path / "other")
    assert_near(masters(tmp_path / "other"), masters(tmp_path / "more"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.checkpointing=true",)])
def test_compiled_layers(corpus, tmp_path, more):
    # Not as forks of a parent, in which the compiler hangs.
    def run(name: str, world: int, *changes: str) -> None:
        options = (*BRIEF, "train.compile=true", "model.dropout=0", *more, *changes)
        done = torchrun(world, corpus, *options, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr

    run("one", 1)
    run("more", 2, SHARD)
    assert_near(masters(tmp_path / "more"), masters(tmp_path / "one"))
    run("broken", 2, SHARD, "train.steps=2")
    run("broken", 2, SHARD)
    assert_same(tmp_path / "broken", tmp_path / "more")


@pytest.mark.parametrize("world", WORLDS)
def test_outputs_that_a_model_in_shares_draws(forks, corpus, alone, tmp_path, world):
    keys = ("risk={metric: chrf, samples: 3, weight: 1.0}", "--init-from", alone, "decoding.max_length=8")
    same_as_one(forks, world, tmp_path, corpus, *BRIEF, *keys)


@pytest.mark.parametrize("world", WORLDS)
def test_a_teacher_and_a_guide(forks, corpus, alone, tmp_path, world):
    same_as_one(forks, world, tmp_path, corpus, *BRIEF, f"teacher.model={alone}", "guide={weight: 0.5}")
