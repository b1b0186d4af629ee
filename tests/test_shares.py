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
from tests.test_checkpointing import batches
from tests.test_distributed import assert_same, masters, torchrun, trained

# Without biases: those of keys have no gradient but rounding, of which Adam makes whole steps.
BRIEF = ("train.precision=fp32", "train.accumulate=4", "train.steps=4", "train.validate_every=4", "train.save_every=2")
BRIEF += ("model.bias=false",)
SHARD = "parallel.shard=true"


IMPORTS = ["encdec_cli.training.sharding"]
"""What commands are to have imported, ready to share weights: it takes seconds."""


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


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "bundle" / "bundle.json").read_text())["facts"]["scores"]


def near_one(forks, world: int, folder: Path, *options: str | Path) -> None:
    """Assert that one process (`one`) and shares (`more`) learn the same and publish the same."""
    one, more = folder / "one", folder / "more"
    trained(forks, 1, *options, "--output", one)
    trained(forks, world, *options, SHARD, "--output", more)
    assert_near(masters(more), masters(one))
    assert_near(bundle(more), bundle(one))
    assert scores(more) == pytest.approx(scores(one), rel=1e-4)


def goes_on(forks, world: int, folder: Path, *options: str | Path) -> None:
    """Assert that shares (`more`) that were broken end with the same bytes, and go on as a whole, too."""
    broken, whole = folder / "broken", folder / "whole"
    trained(forks, world, *options, SHARD, "train.steps=2", "--output", broken)
    shutil.copytree(broken, whole, symlinks=True)
    trained(forks, world, *options, SHARD, "--output", broken)
    assert_same(broken, folder / "more")
    trained(forks, 1, *options, "--output", whole)
    assert_near(masters(whole), masters(folder / "more"))


def test_what_a_recipe_asks_for_all_at_once(forks, corpus, alone, tmp_path):
    options = (corpus, *BRIEF, "train.ema=0.6", "train.freeze=[encoder.*, target_embedding.weight]")
    options += ("train.checkpointing=true", "train.optimizer=adafactor", f"teacher.model={alone}", "guide.weight=0.5")
    near_one(forks, 2, tmp_path, *options)
    goes_on(forks, 2, tmp_path, *options)
    state, published = masters(tmp_path / "more"), bundle(tmp_path / "more")
    frozen = {name for name in published if f"ema.{name}" not in state}
    assert "target_embedding.weight" in frozen
    assert "decoder.0.cross.joined.weight" not in frozen
    for name, value in published.items():
        assert torch.equal(value, state[f"master.{name}" if name in frozen else f"ema.{name}"])
    # Nothing that is frozen has been moved, by whichever rows.
    begun = masters(tmp_path / "one")
    assert all(torch.equal(published[name], begun[f"master.{name}"]) for name in frozen)


ALONE = "ALONE"
KEYS = {
    "averages": ("train.ema=0.6",),
    "frozen": ("train.freeze=[encoder.*, target_embedding.weight]",),
    "again": ("train.checkpointing=true",),
    # 14 rows for the words: shares of unequal size. Six shapes, of one to four matrices.
    "adafactor": ("train.optimizer=adafactor", "train.weight_decay=0.1"),
    "muon": ("train.optimizer=muon", "train.weight_decay=0.1"),
    "teacher": (f"teacher.model={ALONE}",),
    "guide": ("guide.weight=0.5",),
    "agreement": ("regularize.rdrop=5",),
    # Of a rank of 3 the last of 4 processes has no row.
    "lora": ("lora={rank: 3, whole: [encoder_norm.*]}", "--init-from", ALONE),
    "risk": ("risk={metric: chrf, samples: 3}", "--init-from", ALONE, "decoding.max_length=8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_each_thing_that_a_recipe_asks_for(forks, corpus, alone, tmp_path, keys, world):
    options = (corpus, *BRIEF, *(key.replace(ALONE, str(alone)) for key in keys))
    near_one(forks, world, tmp_path, *options)
    goes_on(forks, world, tmp_path, *options)


@pytest.mark.slow
def test_layers_that_are_computed_again_give_the_same_bits(forks, corpus, tmp_path):
    for name, key in (("again", "true"), ("once", "false")):
        trained(forks, 2, corpus, *BRIEF, SHARD, f"train.checkpointing={key}", "--output", tmp_path / name)
    assert_same(tmp_path / "again", tmp_path / "once")


def test_low_rank_adaptation_with_steps_for_whole_matrices(forks, corpus, alone, tmp_path):
    keys = ("lora={rank: 3, whole: [encoder_norm.*]}", "--init-from", alone, "train.optimizer=muon")
    near_one(forks, 2, tmp_path, corpus, *BRIEF, *keys)
    state, published = masters(tmp_path / "more"), bundle(tmp_path / "more")
    assert published.keys() == bundle(alone).keys()
    name = "decoder.0.cross.joined"
    a, b = (state[f"master.{name}.lora_{kind}"].double() for kind in "ab")
    added = published[f"{name}.weight"].double() - state[f"master.{name}.weight"].double()
    torch.testing.assert_close(added, b @ a * (16 / 3), rtol=1e-4, atol=1e-6)
    assert torch.equal(state[f"master.{name}.weight"], bundle(alone)[f"{name}.weight"])


def test_outputs_that_a_model_in_shares_draws(forks, corpus, alone, tmp_path):
    keys = ("risk={metric: chrf, samples: 3}", "--init-from", alone, "decoding.max_length=8")
    near_one(forks, 2, tmp_path, corpus, *BRIEF, *keys)


def test_a_layer_that_is_computed_again_keeps_as_little_as_without_shares():
    from encdec_cli.training.collective import Gathered
    from encdec_cli.training.sharding import Root, share_out

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
