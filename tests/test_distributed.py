"""Several processes train one model: what they share, who is missed, and what another number of them goes on with."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

from encdec_cli.data.batch import collate
from encdec_cli.data.sampler import Sampler
from encdec_cli.models.parts import Part, divide
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Train
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.rules import make_optimizer
from tests.conftest import copy_task, environment
from tests.forked import Command
from tests.test_resume import fingerprint

SMALL = ("train.precision=fp32", "train.steps=24", "train.save_every=6", "train.validate_every=12", "train.log_every=4")
TWO = (*SMALL, "train.accumulate=2")
FAULTY = '''\
"""A Transformer with which a process may come to harm, when it has read so many sources."""

import os
import signal
import time

from encdec_cli.bundle import checkpoint
from encdec_cli.models.transformer import Transformer
from encdec_cli.registry import models
from encdec_cli.training.trainer import Trainer

seen = {"start": 0, "update": 0, "layer": 0, "backward": 0, "judge": 0, "save": 0}
updating = []


def update(trainer, *arguments, whole=Trainer.update):
    updating.append(trainer.formula)  # found before anything counts
    whole(trainer, *arguments)
    updating.clear()


Trainer.update = update


def perhaps(place):
    seen[place] += 1
    rank, where, call, harm = os.environ["FAULT"].split(":")
    if harm == "nan" and os.environ["RANK"] == rank and where == place and int(call) <= seen[place] < int(call) + 2:
        return harm  # the second time it is asked for what was wrong
    if os.environ["RANK"] != rank or where != place or seen[place] != int(call):
        return
    if harm == "raise":
        raise ValueError("harmed")
    if harm == "memory":
        raise RuntimeError("can't allocate memory")
    if harm == "sleep":
        time.sleep(1000)
    if harm == "drift":
        return harm
    os.kill(os.getpid(), signal.SIGSTOP if harm == "stop" else signal.SIGKILL)


def in_layer(_module, _given, found):
    if updating:
        perhaps("layer")
        if found.requires_grad:
            found.register_hook(lambda _gradient: perhaps("backward"))


@models.register("faulty")
class Faulty(Transformer):
    side_by_side = False

    class Config(Transformer.Config):
        pass

    def __init__(self, *arguments):
        super().__init__(*arguments)
        perhaps("start")
        self.decoder[0].feed_forward.register_forward_hook(in_layer)

    def can_pack(self, dtype, device):
        return Transformer(self.config, 9, 9).can_pack(dtype, device)

    def _embed_source(self, source):
        place = "update" if self.training else "judge"
        harm = perhaps(place) if updating or not self.training else None
        if harm == "drift":
            self.target_embedding.weight.data[5, 5] += 1
        found = super()._embed_source(source)
        return found * float("nan") if harm == "nan" else found


def write_part(*arguments, write=checkpoint.write_part):
    perhaps("save")
    write(*arguments)


checkpoint.write_part = write_part
'''
NO_FAULT = "0:update:0:raise"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(forks, world: int, *arguments: str | Path, **changes: str) -> list[Command]:
    """Start `encdec train` as torchrun would, but for its agent: the first process holds the store."""
    port = str(free_port())
    where = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        forks.start("train", *arguments, **where, RANK=str(rank), LOCAL_RANK=str(rank), **changes)
        for rank in range(world)
    ]


def trained(forks, world: int, *arguments: str | Path, **changes: str) -> list[Command]:
    commands = launch(forks, world, *arguments, **changes)
    for command in commands:
        assert command.wait() == 0, command.stderr
    return commands


IMPORTS = ["encdec_cli.training.sharding"]
"""What commands are to have imported, ready to share weights: it takes seconds."""


@pytest.fixture(scope="module")
def alone(forks, corpus, tmp_path_factory):
    """The folder of a run of one process, with two micro-batches an update."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = forks("train", corpus, *TWO, "--output", run)
    assert done.wait() == 0, done.stderr
    return run


def torchrun(world: int, *arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), *options]
    command += ["--master-port", str(free_port()), "-m", "encdec_cli", "train", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)


def test_two_processes_by_torchrun_learn_the_bytes_of_one(alone, corpus, tmp_path):
    done = torchrun(2, corpus, *TWO, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("model:") == 1  # one speaks for all
    ours, theirs = fingerprint(tmp_path / "run"), fingerprint(alone)
    assert ours["log"] == theirs["log"]
    assert ours["files"]["bundle"] == theirs["files"]["bundle"]
    assert ours["files"]["data"] == theirs["files"]["data"]


def test_two_then_one_then_two_go_on_where_the_others_stood(forks, alone, corpus, tmp_path):
    run = tmp_path / "run"
    for world, steps in ((2, 7), (1, 13), (2, 24)):
        told = trained(forks, world, corpus, *TWO, f"train.steps={steps}", "--output", run)
        if steps > 7:
            was = 1 if world == 2 else 2
            assert f"processes was {was}, is now {world}; the weights will not be bit-identical" in told[0].stderr
    # Of two addends there is but one sum: here even the bits are equal, though nothing is promised.
    assert_same(run, alone)


def masters(run: Path) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state of the newest checkpoint, put together from however many files."""
    parts = [safetensors.torch.load_file(path) for path in sorted(max((run / "checkpoints").iterdir()).glob("state*"))]
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0] if name != "step"}


def assert_same(run: Path, other: Path) -> None:
    """Assert that two runs have ended with the same weights and the same state of the optimizer."""
    ours, theirs = masters(run), masters(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_of_an_update_does_not_depend_on_who_shares_it(forks, corpus, tmp_path, world):
    # The first moment after one update is a tenth of its gradient; a decay of the rate to nothing keeps the weights.
    options = (*SMALL, "train.accumulate=5", "train.steps=1", "train.betas=[0.9,0.9]", "train.clip=0")
    trained(forks, 1, corpus, *options, "--output", tmp_path / "one")
    trained(forks, world, corpus, *options, "--output", tmp_path / "more")
    again = tmp_path / "again"
    trained(forks, world, corpus, *options, "--output", again)
    one, more = masters(tmp_path / "one"), masters(tmp_path / "more")
    assert one.keys() == more.keys()
    for name, value in one.items():
        torch.testing.assert_close(more[name], value, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(value, more[name]) for name, value in masters(again).items())  # a rerun is exact


SHARD = "parallel.shard=true"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_of_a_model_learn_what_the_whole_learns(forks, corpus, tmp_path, world):
    options = (*SMALL, "train.accumulate=4", "train.steps=1", "train.clip=0.1", "--output")
    trained(forks, 1, corpus, *options, tmp_path / "one")
    told = trained(forks, world, corpus, *options, tmp_path / "more", SHARD)
    assert told[1].stderr == ""
    one, more = masters(tmp_path / "one"), masters(tmp_path / "more")
    assert one.keys() == more.keys()
    for name, value in one.items():
        torch.testing.assert_close(more[name], value, rtol=1e-4, atol=1e-6)
    newest = max((tmp_path / "more" / "checkpoints").iterdir())
    assert len(list(newest.glob(f"state-*-of-{world:05d}.safetensors"))) == world
    first = safetensors.torch.load_file(newest / f"state-00000-of-{world:05d}.safetensors")
    for name, value in one.items():
        assert len(first[name]) == -(-len(value) // world)  # nobody wrote what another has
    # The bundle has the whole masters.
    bundle = safetensors.torch.load_file(tmp_path / "more" / "bundle" / "model.safetensors")
    assert all(torch.equal(value, more[f"master.{name}"]) for name, value in bundle.items())


def test_shares_are_read_by_any_number_and_go_on_to_the_bit(forks, corpus, tmp_path):
    # A weight of 14 rows for the words: shares of unequal size, whatever the number.
    options = (*TWO, "train.validate_every=0", "train.steps=8", "train.log_every=1", "--output")
    trained(forks, 2, corpus, *options, tmp_path / "unbroken", SHARD)
    broken, other = tmp_path / "broken", tmp_path / "other"
    trained(forks, 2, corpus, *options, broken, SHARD, "train.steps=3")
    shutil.copytree(broken, other, symlinks=True)
    trained(forks, 2, corpus, *options, broken, SHARD)
    assert_same(broken, tmp_path / "unbroken")
    # From shares to the whole, and back to shares.
    trained(forks, 1, corpus, *options, other, "train.steps=5")
    trained(forks, 2, corpus, *options, other, SHARD)
    assert losses(other) == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-5)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.mark.parametrize("layout", ["", SHARD, "parallel.tensor=2"])
def test_memory_is_predicted_and_auto_finds_one_number_for_all(forks, corpus, tmp_path, layout):
    options = (*TWO, "train.tokens=auto", "model.feed_forward=4096", *filter(None, [layout]), "--output")
    dry = trained(forks, 2, corpus, *options, tmp_path / "dry", "--dry-run")
    rows = dict(line.split(maxsplit=1) for line in dry[0].stderr.splitlines() if line.endswith(" MiB"))
    assert {"optimizer", "total"} <= rows.keys()
    # Two matrices of 32 x 4,096 in each of two layers have two moments; in shares or parts half of them.
    assert float(rows["optimizer"].removesuffix(" MiB")) == pytest.approx(2 if layout else 4, abs=0.6)
    run = tmp_path / "run"
    told = trained(forks, 2, corpus, *options, run, "train.steps=2", "train.validate_every=0")
    found = re.search(r"train.tokens: auto is (\d+) here", told[0].stderr)
    assert found
    assert int(found[1]) > 256
    assert "memory: " in told[0].stderr
    assert told[1].stderr == ""
    again = trained(forks, 2, corpus, *options, run, "train.steps=3", "train.validate_every=0")
    assert "going on from update 2 of 3" in again[0].stderr
    assert json.loads((run / "run.json").read_text())["recipe"]["train"]["tokens"] == int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["1:update:9:stop", "1:save:2:kill", "0:save:2:kill", "1:save:2:raise", "0:judge:1:stop"]
)
def test_a_lost_process_of_shares_and_what_is_left_of_its_checkpoint(forks, corpus, tmp_path, fault):
    options = (faulty(corpus, tmp_path), *TWO, "parallel.timeout=2", SHARD, "--output")
    trained(forks, 2, *options, tmp_path / "unbroken", FAULT=NO_FAULT)
    lose(forks, (*options, tmp_path / "run"), fault)
    trained(forks, 2, *options, tmp_path / "run", FAULT=NO_FAULT)
    assert_same(tmp_path / "run", tmp_path / "unbroken")


def cluster() -> ModuleType:
    """Return `docs/cluster.py`."""
    spec = importlib.util.spec_from_file_location("cluster", Path(__file__).parent.parent / "docs" / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster"] = module  # a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


def test_the_plan_of_the_page_is_that_of_its_formulas_and_counts_as_the_model_does():
    page = cluster()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python docs/cluster.py"
    plan = page.Plan("small", 3, 64, 96, 50, 1000, True)
    model = Transformer(Transformer.Config(3, 3, 64, 4, 96), 50, 50)
    assert plan.weights() == sum(parameter.numel() for parameter in model.parameters())
    part = deepcopy(model)
    divide(part, Part(0, 2, id))
    assert replace(plan, tensor=2).own() == sum(parameter.numel() for parameter in part.parameters())
    layer, reader = model.decoder[0], model.decoder[0].cross.joined
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (layer, reader)]
    assert plan.unit() == sizes[0] - sizes[1]
    assert plan.sent(2) == 8 * plan.weights() / 2


@pytest.mark.parametrize(
    ("layers", "width", "inner", "rows", "length"), [(3, 128, 512, 40, 50), (2, 256, 1024, 64, 32)]
)
def test_the_plan_of_the_page_needs_what_is_predicted_for_a_run(layers, width, inner, rows, length):
    plan = cluster().Plan("small", layers, width, inner, 200, rows * length, shard=False)
    model = Transformer(Transformer.Config(layers, layers, width, 4, inner, dropout=0.1), 200, 200)
    optimizer = make_optimizer(model, Train(), (), torch.bfloat16)
    gradients = Gradients(model.to(torch.bfloat16), optimizer.parameters, CrossEntropy(0.1), 1)
    found = gradients.read(collate([[5] * (length - 1)] * rows, [[5] * (length - 1)] * rows, range(rows)))
    assert plan.activations() == pytest.approx(found.saved, rel=0.1)
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *optimizer.state().values()))
    assert plan.state(1) == pytest.approx(state + (2 + 4) * plan.weights(), rel=0.001)  # and both gradients


def order(ranks: list[Ranks], plan: Sampler, step: int, updates: int, accumulate: int) -> list[list[int]]:
    """The examples of some updates, put together from the shares of all processes."""
    taken = []
    for update in itertools.islice(plan.updates(step, accumulate), updates):
        shares = [one.share(range(len(update))) for one in ranks]
        assert all(shares)  # nobody waits for nothing
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        whole = sorted(itertools.chain(*shares))
        assert whole == list(range(accumulate))
        taken += [update[number].tolist() for number in whole]
    return taken


UNEVEN = list(itertools.product(range(1, 51), (1, 2, 3, 4)))


@pytest.mark.parametrize(("count", "world"), UNEVEN[::7])
def test_uneven_data_every_example_once_an_epoch_and_no_process_without_work(count, world):
    plan = Sampler(*np.random.default_rng(count).integers(1, 20, (2, count)), 64, "data", 1)
    updates, ranks = 3 * len(plan), [Ranks(rank, world) for rank in range(world)]
    taken = order(ranks, plan, 0, updates, 4)
    assert taken == order([Ranks(0, 1)], plan, 0, updates, 4)
    for epoch in range(12):
        batches = taken[epoch * len(plan) : (epoch + 1) * len(plan)]
        assert sorted(itertools.chain(*batches)) == list(range(count))
    for step in range(0, updates, 5):
        assert order(ranks, plan, step, 1, 4) == taken[4 * step : 4 * step + 4]


@pytest.mark.slow
def test_one_example_for_two_processes(forks, tmp_path):
    recipe = copy_task(tmp_path / "corpus", train=1)
    trained(forks, 2, recipe, *TWO, "--output", tmp_path / "run")


def test_an_update_that_cannot_be_shared_is_refused_once(forks, corpus, tmp_path):
    commands = launch(forks, 2, corpus, *SMALL, "--output", tmp_path / "run")
    assert [command.wait() for command in commands] == [2, 2]
    assert "train.accumulate: 2 processes cannot share an update in 1 part" in commands[0].stderr
    assert commands[1].stderr == ""


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_any_process_saves_and_stops_all(forks, alone, corpus, tmp_path, told):
    run = tmp_path / "run"
    options = (*TWO, "train.save_every=1000", "--output", run)
    commands = launch(forks, 2, corpus, *options)
    wait_for(run / "log.jsonl")
    commands[told].send(signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143], [command.stderr for command in commands]
    assert "saved at update" in commands[0].stderr
    assert commands[1].stderr == ""
    trained(forks, 2, corpus, *options)
    assert_same(run, alone)


def test_a_signal_to_another_process_breaks_off_a_validation(forks, corpus, tmp_path):
    run, plugin = tmp_path / "run", tmp_path / "slow.py"
    plugin.write_text(SLOW_VALIDATION.format(mark=str(tmp_path / "judging")))
    options = (*TWO, "train.validate_every=3", "--plugin", plugin, "--output", run)
    commands = launch(forks, 2, corpus, *options)
    wait_for(tmp_path / "judging")
    commands[1].send(signal.SIGTERM)
    assert [command.wait() for command in commands] == [143, 143], [command.stderr for command in commands]
    assert "saved at update 3" in commands[0].stderr
    assert not (run / "bundles").exists()


SLOW_VALIDATION = """
import time
from pathlib import Path
from encdec_cli.training import validation

def slow(stop):
    Path({mark!r}).touch()
    for _ in range(1200):  # a minute
        if stop:
            raise stop.error("stopped in validation.")
        time.sleep(0.05)

validation._leave = slow
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


HARMS = {
    "kill": "gives no sign of life|which holds the store",
    "stop": "gives no sign of life|which holds the store, does not answer",
    "sleep": "lives, but did not come within 2 s",
    "raise": "ValueError: harmed",
    "memory": "can't allocate memory",
}
PLACES = ("update:1", "update:9", "update:24", "judge:1", "save:2")
SLOW = pytest.mark.slow
SAMPLE = {(1, "update:9", "kill"), (1, "update:9", "stop"), (1, "update:9", "raise")}
# Before the first update the first one prepares the data, as long as it likes if it lives.
START = [(0, "start:1", "kill"), (0, "start:1", "stop"), *((1, "start:1", harm) for harm in ("kill", "stop", "sleep"))]
CASES = [
    case
    for case in itertools.product((0, 1), PLACES, HARMS)
    # The first alone judges and writes, as long as it likes if it lives; an update for which memory lacks is halved.
    if (case[2] != "memory" if case[1].startswith("update") else case[0] == 0 and case[2] != "sleep")
]


@pytest.mark.parametrize(
    ("rank", "place", "harm"), [pytest.param(*case, marks=() if case in SAMPLE else SLOW) for case in START + CASES]
)
def test_a_lost_process_is_named_and_the_others_leave_in_time(forks, alone, corpus, tmp_path, rank, place, harm):
    options = (faulty(corpus, tmp_path), *TWO, "parallel.timeout=2", "--output", tmp_path / "run")
    lose(forks, options, f"{rank}:{place}:{harm}")
    trained(forks, 2, *options, FAULT=NO_FAULT)
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize("place", ["update", "layer", "backward"])
@pytest.mark.parametrize("shared", [SHARD, "parallel.tensor=2"])
def test_a_process_that_hangs_within_a_micro_batch_of_shared_layers_is_named(forks, corpus, tmp_path, shared, place):
    options = (faulty(corpus, tmp_path), *TWO, shared, "parallel.timeout=2", "--output", tmp_path / "run")
    lose(forks, options, f"1:{place}:9:sleep")


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_one_process_lacks_halves_its_batch_and_all_go_on(forks, corpus, tmp_path, rank):
    options = (faulty(corpus, tmp_path), *TWO, "model.dropout=0", "--output")
    told = trained(forks, 2, *options, tmp_path / "run", FAULT=f"{rank}:update:9:memory")
    assert f"process {rank}: out of memory for " in told[rank].stderr
    assert "computed in halves" in told[rank].stderr
    assert "out of memory" not in told[1 - rank].stderr
    trained(forks, 2, *options, tmp_path / "whole", FAULT=NO_FAULT)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize("shared", [SHARD, "parallel.tensor=2"])
def test_memory_that_lacks_where_layers_are_shared_halves_the_batches_of_all_from_the_next_start(
    forks, corpus, tmp_path, shared
):
    options = (faulty(corpus, tmp_path), *TWO, shared, "model.dropout=0", "--output")
    commands = launch(forks, 2, *options, tmp_path / "run", FAULT="1:update:9:memory")
    assert [command.wait() for command in commands] == [6, 6]
    found = re.search(
        r"process 1: out of memory for (\d+) examples .*start all processes again, .* at most (\d+) positions",
        commands[1].stderr,
    )
    assert found, commands[1].stderr
    assert f"process 1: out of memory for {found[1]} examples" in commands[0].stderr
    told = trained(forks, 2, *options, tmp_path / "run", FAULT=NO_FAULT)
    assert f"computed in pieces of at most {found[2]} positions" in told[0].stderr
    assert "pieces" not in told[1].stderr
    trained(forks, 2, *options, tmp_path / "whole", FAULT=NO_FAULT)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def faulty(corpus: Path, folder: Path) -> Path:
    """Write the plugin, and return the recipe that uses it."""
    (folder / "faulty.py").write_text(FAULTY)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"plugins: [faulty.py]\n{corpus.read_text()}".replace("name: transformer", "name: faulty"))
    return recipe


@pytest.mark.parametrize("more", [(), pytest.param((SHARD,), marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_in_one_process_touches_no_weight_of_any(forks, corpus, tmp_path, more):
    options = (faulty(corpus, tmp_path), *TWO, *more, "--output")
    commands = launch(forks, 2, *options, tmp_path / "stopped", FAULT="1:update:9:nan")
    assert [command.wait() for command in commands] == [7, 7], [command.stderr for command in commands]
    # The 18th micro-batch is the second of the ninth update; what the other process had is not accused.
    assert re.search(r"update 9: loss nan, gradient norm nan, from batch \d+ of epoch \d+ \(", commands[0].stderr)
    assert commands[0].stderr.count("of epoch") == 1
    assert commands[1].stderr == ""
    told = trained(forks, 2, *options, tmp_path / "run", "--on-nan=skip", FAULT="1:update:9:nan")
    assert re.search(r"update 9: loss nan.* left out\n", told[0].stderr)
    assert all(bool(value.isfinite().all()) for value in masters(tmp_path / "run").values())


def lose(forks, options, fault: str) -> float:
    """Start two processes of which one is lost; assert that the other names it and leaves, after so many seconds."""
    rank, harm = int(fault[0]), fault.rpartition(":")[2]
    commands = launch(forks, 2, *options, FAULT=fault)
    lost, other = commands[rank], commands[1 - rank]
    began = time.monotonic()
    assert other.wait(60) == 6, other.stderr
    assert time.monotonic() - began < 30
    left = other.stderr.rstrip("\n").split("\n")[-1]
    assert f"process {1 - rank} leaves at" in left
    assert re.search(f"process {rank}.*({HARMS[harm]})", left)
    assert "Traceback" not in other.stderr
    if harm in ("stop", "sleep"):
        os.kill(lost.pid, signal.SIGKILL)
    lost.wait()
    return time.monotonic() - began


def test_weights_that_differ_between_processes_are_never_saved(forks, corpus, tmp_path):
    options = (faulty(corpus, tmp_path), *TWO, "--output", tmp_path / "run")
    commands = launch(forks, 2, *options, FAULT="1:update:9:drift")
    assert [command.wait() for command in commands] == [6, 6]
    assert "the processes have come to different weights" in commands[0].stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000006"]


@pytest.mark.slow
def test_torchrun_starts_all_again_and_the_run_is_exact(alone, corpus, tmp_path):
    recipe, run = faulty(corpus, tmp_path), tmp_path / "run"
    once = '["1:update:9:kill", "", ""][int(os.environ["TORCHELASTIC_RESTART_COUNT"])] or "0:update:0:raise"'
    (tmp_path / "faulty.py").write_text(FAULTY.replace('os.environ["FAULT"]', f"({once})"))
    done = torchrun(2, recipe, *TWO, "--output", run, options=("--max-restarts", "2"))
    assert done.returncode == 0, done.stderr
    assert "going on from update 6" in done.stderr
    assert_same(run, alone)


def test_a_process_that_never_comes_is_named(forks, corpus, tmp_path):
    port = str(free_port())
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0"}
    done = forks("train", corpus, *TWO, "parallel.timeout=0.2", "--output", tmp_path / "run", **where)
    assert done.wait() == 6
    assert "process 0 leaves: of 2, process 1 did not come within 1.2 s" in done.stderr
    assert not (tmp_path / "run").exists()


HOSTS = """
set -e
unshare -n sleep 600 & other=$!
trap 'kill $other' EXIT
sleep 1
there="nsenter -t $other -n"
ip link add here type veth peer name there netns $other
ip addr add 10.9.0.1/24 dev here
$there ip addr add 10.9.0.2/24 dev there
ip link set here up; ip link set lo up
$there ip link set there up; $there ip link set lo up
GLOO_SOCKET_IFNAME=there $there "$@" --node-rank 1 $COMMAND 2> there.txt & two=$!
GLOO_SOCKET_IFNAME=here "$@" --node-rank 0 $COMMAND 2> here.txt & one=$!
if [ -n "$CUT" ]; then while [ ! -e "$CUT" ]; do sleep 0.1; done; ip link set here down; fi
wait $one; wait $two
"""


def two_hosts(folder: Path, command: str, cut: str = "") -> tuple[int, str, str]:
    """Run torchrun in two network namespaces with a cable between them; cut it when a file appears."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    where = (*torchrun, "--master-addr", "10.9.0.1", "--master-port", "29400")
    done = subprocess.run(
        ["unshare", "-Urn", "bash", "-c", HOSTS, "bash", *where],
        env=environment(COMMAND=f"-m encdec_cli train {command}", CUT=cut),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (folder / "here.txt").exists(), done.stderr
    return done.returncode, (folder / "here.txt").read_text(), (folder / "there.txt").read_text()


def has_namespaces() -> bool:
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip")))
    return tools and subprocess.run(["unshare", "-Urn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="needs unshare, nsenter, ip and user namespaces")
def test_two_hosts(alone, corpus, tmp_path):
    code, here, there = two_hosts(tmp_path, f"{corpus} {' '.join(TWO)} --output {tmp_path / 'run'}")
    assert code == 0, here + there
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="needs unshare, nsenter, ip and user namespaces")
def test_a_cable_that_is_cut_is_noticed_at_both_ends(corpus, tmp_path):
    run = tmp_path / "run"
    options = f"{' '.join(TWO)} train.steps=100000 train.validate_every=0 parallel.timeout=5"
    _, here, there = two_hosts(tmp_path, f"{corpus} {options} --output {run}", cut=str(run / "log.jsonl"))
    assert "encdec: error: process 0 leaves at" in here
    assert "encdec: error: process 1 leaves at" in there
