"""What a run needs and what it costs: counted, worked by hand, and added up through interruptions."""

from __future__ import annotations

import itertools
import json
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from encdec_cli import kernels
from encdec_cli.atomic import MANIFEST
from encdec_cli.bundle.checkpoint import Progress
from encdec_cli.bundle.run import SPENT
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.prepare import Prepared
from encdec_cli.data.sampler import Sampler
from encdec_cli.decoding.attention import Head
from encdec_cli.errors import ResourceError
from encdec_cli.kernels import attention as fused
from encdec_cli.kernels import linear
from encdec_cli.models import attention
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Cost, Train, load
from encdec_cli.registry import load_plugin, models
from encdec_cli.training import account, budget, decoding_peak, energy, flops, memory
from encdec_cli.training.account import Account
from encdec_cli.training.budget import settle
from encdec_cli.training.energy import EnergyMeter
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.guide import GuidedAttention
from encdec_cli.training.largest import need
from encdec_cli.training.loss import real_rows
from encdec_cli.training.meter import Meter
from encdec_cli.training.objective import CrossEntropy, Mixture, Objective, RDrop
from encdec_cli.training.risk import ExpectedRisk, Judged
from encdec_cli.training.rules import make_optimizer
from encdec_cli.training.signals import Stop
from encdec_cli.training.teacher import Distillation
from encdec_cli.training.trainer import Setting, Trainer
from tests.conftest import log_lines
from tests.test_resume import lines_of

ROOT = Path(__file__).parent.parent
VOCAB = 60
CPU = torch.device("cpu")


def test_bytes_alive_at_a_time():
    older = torch.ones(1000)
    with Meter() as meter:
        first = older * 2
        second = first.view(10, 100) + 1
        assert (meter.live, meter.peak) == (8000, 8000)
        del first, second
        third = older + older
        assert (meter.live, meter.peak) == (4000, 8000)
        third.add_(1)
        _ = third[:10].sum()
    assert meter.peak == 8000


def test_storages_that_change_their_size_count_with_what_they_have():
    older, gathered = torch.ones(1000), torch.empty(1000)
    gathered.untyped_storage().resize_(0)  # as between two uses of a unit of shares
    with Meter(changing=True) as meter:
        gathered.untyped_storage().resize_(4000)
        result = gathered * older
        assert (meter.live, meter.peak) == (8000, 8000)
        gathered.untyped_storage().resize_(0)
        del result
        _ = older[:250] * 2
        assert (meter.live, meter.peak) == (1000, 8000)


def test_flops_of_a_product():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    with Meter() as meter:
        product = a @ b
        assert meter.flops == 2 * 3 * 5 * 7
        torch.autograd.grad(product.sum(), (a, b))
    assert meter.flops == 3 * 2 * 3 * 5 * 7


def gru():
    load_plugin(ROOT / "docs" / "examples" / "gru.py")
    kind = models.get("gru")
    return kind(kind.Config(16), VOCAB, VOCAB)


def transformer(d_model: int = 32, **changes) -> Transformer:
    return Transformer(Transformer.Config(2, 3, d_model, 4, 64, **({"dropout": 0.1} | changes)), VOCAB, VOCAB)


def batch(rows: int, source: int, target: int) -> Batch:
    random = torch.Generator().manual_seed(rows)

    def some(longest: int) -> list[list[int]]:
        lengths = [longest - 1, *torch.randint(1, longest, (rows - 1,), generator=random).tolist()]
        return [torch.randint(4, VOCAB, (length,), generator=random).tolist() for length in lengths]

    return collate(some(source), some(target), range(rows))


MODELS = {
    "transformer": transformer,
    "no bias, rotary, untied": partial(transformer, positions="rotary", bias=False, tie="none", attention_dropout=0.2),
    "gru": gru,
}


def found(model, objective: Objective | None = None) -> flops.Formula:
    return flops.find(model, objective or CrossEntropy(0.1), (VOCAB, VOCAB), "cpu")


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_gives_the_profilers_count(monkeypatch, name):
    assert_counted(monkeypatch, MODELS[name](), packed=False)


wide = pytest.mark.skipif(
    not kernels.wide(), reason="no C compiler, or neither AVX-512 nor AVX2: attention is padded after all"
)


@wide
def test_the_formula_gives_the_profilers_count_of_packed_rows(monkeypatch):
    assert_counted(monkeypatch, transformer(d_model=64), packed=True)


def assert_counted(monkeypatch, model, packed: bool) -> None:
    # torch's own counter does not see fused attention on a CPU.
    monkeypatch.setattr(attention, "_by_matmul", lambda *_: True)
    whole, model.packs = batch(20, 40, 23), packed
    formula = found(model)
    # What computes no padding does as much as with each example alone.
    batches = [whole.take(place, place + 1) for place in range(20)] if packed else [whole]
    model.packs = False
    linear.operators(), fused.operators()  # the counter knows those that are there when it is made
    # A textbook loss: torch's counter hooks into modules, and does not bear gradients inside of a forward pass.
    with FlopCounterMode(display=False) as counter:
        for one in batches:
            target = one.known_target
            rows, labels = real_rows(model(one.source, one.source_mask, target[:, :-1]), target[:, 1:])
            torch.nn.functional.cross_entropy(model.project(rows), labels).backward()
    model.zero_grad()
    assert formula.flops_of(*flops.lengths(whole)) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_two_passes_are_twice_the_work(name):
    one = batch(20, 40, 23)
    once, twice = found(MODELS[name]()), found(MODELS[name](), RDrop(0.1, None, 5.0))
    # But for the logits of the first row, by which the output layer's parameters are found.
    lengths = flops.lengths(one)
    assert twice.flops_of(*lengths) == pytest.approx(2 * once.flops_of(*lengths), rel=1e-3)


def test_what_a_teacher_computes_counts(monkeypatch):
    monkeypatch.setattr(attention, "_by_matmul", lambda *_: True)
    model, teacher, one = transformer(), transformer(d_model=64).eval(), batch(20, 40, 23)
    linear.operators(), fused.operators()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target = one.known_target
        rows, _ = real_rows(teacher(one.source, one.source_mask, one.decoder_input), target[:, 1:])
        teacher.project(rows)
    alone, taught = found(model), found(model, Distillation(teacher, 0.1, None, 0.5, 1.0))
    lengths = flops.lengths(one)
    assert taught.flops_of(*lengths) - alone.flops_of(*lengths) == pytest.approx(counter.get_total_flops(), rel=0.02)


WORKS = {
    "a guided head": GuidedAttention(Head(2, 1)),
    "outputs that are judged": ExpectedRisk(0.005),
    "a teacher": Distillation(transformer(d_model=64).eval(), 0.1, None, 0.5, 1.0),
    "both beside the loss": Mixture(
        [(0.5, CrossEntropy(0.1)), (0.5, ExpectedRisk(0.005)), (0.1, GuidedAttention(Head(0, 0)))]
    ),
}


def test_positions_are_those_that_are_computed():
    lengths = flops.lengths(collate([[5] * 3, [5]], [[6], [6] * 8], range(2)))
    assert [side.tolist() for side in lengths] == [[4, 2], [2, 9]]
    assert flops.positions(*lengths, packed=True) == 17
    assert flops.positions(*lengths, packed=False) == 26


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", WORKS.values(), ids=WORKS)
def test_what_other_objectives_compute_counts_with_the_padding_that_they_have(objective, packed):
    model, one = transformer(), batch(20, 40, 23)
    model.packs = packed
    links, outputs = torch.zeros(20, 23, 40), one.known_target.unsqueeze(1).expand(-1, 4, -1)
    whole = Judged(**{**vars(one), "links": links}, candidates=outputs, costs=torch.zeros(20, 4))
    counted = Gradients(model, list(model.parameters()), objective, 1).read(whole).flops
    formula = flops.find(model, objective, (VOCAB, VOCAB), "cpu", 4)
    assert counted > 0
    # But for the logits of the first row, by which the output layer's parameters are found.
    assert formula.flops_of(*flops.lengths(one)) == pytest.approx(counted, rel=1e-3)


def test_fused_attention_is_counted_too():
    """Without dropout, fp32 takes a fused kernel; its backward pass computes the scores once more."""
    model = transformer(dropout=0.0)
    rows, source, target = 4, 10, 6
    one = collate([[5] * 9] * 4, [[5] * 5] * 4, range(4))
    products = 2 * rows * 32 * (2 * source * source + 3 * target * target + 3 * source * target)
    fused, plain = found(model), found(transformer(attention_dropout=0.5))
    lengths = flops.lengths(one)
    assert fused.flops_of(*lengths) - plain.flops_of(*lengths) == products


def test_counting_leaves_the_model_as_it_was():
    model = transformer()
    model.register_buffer("seen", torch.zeros(1))
    model.encoder[0].register_forward_pre_hook(lambda *_: model.seen.add_(1) and None)
    before, chance = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(parameter.grad is None for parameter in model.parameters())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(31, 120),
    st.sampled_from([7, 1_000_000]),
)
def test_lengths_are_those_of_the_batches_of_every_epoch(pairs, tokens, window):
    lengths = np.array(pairs).T
    sampler = Sampler(*lengths, tokens, "data", 1, window)
    source, target, starts = sampler.lengths()
    parts = zip(np.split(source, starts[1:]), np.split(target, starts[1:]), strict=True)
    cut = [list(zip(*sides, strict=True)) for sides in parts]
    for epoch in (0, 3):
        batches = [sorted(zip(*(side[rows] + 1 for side in lengths), strict=True)) for rows in sampler.batches(epoch)]
        assert sorted(map(sorted, cut)) == sorted(batches)
    for number, pairs_of_it in enumerate(cut):
        rows = sampler.cut(number)
        assert len(set(rows.tolist())) == len(rows) == len(pairs_of_it)
        longest = [int(side[rows[:2]].max()) + 1 for side in lengths]
        assert longest == [max(each) for each in zip(*pairs_of_it, strict=True)]


@wide
def test_the_heaviest_batch_is_the_one_with_the_most_tokens_where_padding_costs_nothing():
    model = transformer(d_model=64)
    source, target, starts = np.array([9, 2, 8, 8, 5, 5]), np.array([9, 2, 8, 8, 5, 5]), np.array([0, 2, 4])
    assert found(model).heaviest(source, target, starts) == 0  # 2 x 9
    model.packs = True
    assert found(model).heaviest(source, target, starts) == 1


def forecast(model, load, accumulate: int = 1, dtype: torch.dtype = torch.float32) -> memory.Forecast:
    optimizer = make_optimizer(model, Train(), (), dtype)
    model.to(dtype)
    gradients = Gradients(model, optimizer.parameters, CrossEntropy(0.1), accumulate)
    gradients.close()
    return memory.Forecast(gradients, optimizer, accumulate, VOCAB, load, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_rows_tell_what_the_whole_batch_keeps_alive(monkeypatch, dtype, checkpointing):
    monkeypatch.setattr(memory.Forecast, "_waste", lambda *_: (0, 0.5))
    monkeypatch.setattr(memory, "chunk_of", lambda _device: 300 * VOCAB)
    model = transformer(attention_dropout=0.1)
    model.checkpointing = checkpointing
    ids = [[[5 + i % 9] * (length - 1) for i in range(160)] for length in (18, 24)]

    def load(rows):
        return collate([ids[0][i] for i in rows], [ids[1][i] for i in rows], rows.tolist())

    several, computed = forecast(model, load, 2, dtype), []
    read = several.gradients.read
    monkeypatch.setattr(several.gradients, "read", lambda one: computed.append(len(one.rows)) or read(one))
    found = several.need(np.arange(160))
    assert len(computed) == 2
    assert max(computed) < 160 / 2
    whole = read(load(np.arange(160))).peak
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found.activations == pytest.approx(several.gradients.workers * whole, rel=0.02, abs=4 * parameters)
    assert found.gradients == 4 * parameters
    assert found.weights == dtype.itemsize * parameters
    assert found.optimizer == (8 if dtype == torch.float32 else 12) * parameters + 8  # and the number of updates
    assert found.waste == round(0.5 * (found.activations + found.gradients))
    assert found.total == found.program + found.weights + found.optimizer + found.growth


def test_what_gathering_keeps_does_not_grow_with_the_batch(monkeypatch):
    def load(rows):
        return collate([[5] * 17 for _ in rows], [[6] * 23 for _ in rows], rows.tolist())

    alone = forecast(transformer(), load)
    monkeypatch.setattr(memory.Forecast, "_beyond", lambda _self, _batch, peak: 50_000_000 + peak // 4)
    found = alone.need(np.arange(160))
    assert found.waste == 3 * (found.activations + found.gradients)  # no rule: the sample is tiny
    monkeypatch.setattr(memory, "held", lambda parameter: parameter.detach())  # as if it were shared out
    found = alone.need(np.arange(160))
    grows = (found.activations + found.gradients) / 4
    assert found.waste == pytest.approx(1.1 * (50_000_000 + grows), rel=1e-6)


def setting(recipe: Path, run: Path, *overrides: str) -> Setting:
    from encdec_cli.training.data import prepared_data

    loaded = load(recipe, overrides)
    data, _ = prepared_data(loaded, run, lambda _: None)
    assert isinstance(data, Prepared)
    return Setting(loaded, data, run, "cpu", Stop(), lambda _: None)


@pytest.mark.parametrize("changed", [(), ("decoding.beam=1",), ("train.precision=fp32", "model.positions=rotary")])
def test_a_few_short_outputs_tell_what_decoding_keeps_alive(recipe, tmp_path, changed):
    trainer = Trainer(setting(recipe, tmp_path / "run", "train.threads=1", *changed))
    bundle, options = trainer.validation._ready(trainer.bundle), trainer.validation.options
    predicted = decoding_peak.decoding_peak(bundle, options, [(100, 90)] * 30 + [(10, 119)])
    assert predicted == pytest.approx(decoding_peak._peak(bundle, options, (31, 100, 120)), rel=0.1)
    reading = decoding_peak.decoding_peak(bundle, options, [(100, 1)] * 30)
    assert reading == pytest.approx(decoding_peak._peak(bundle, options, (30, 100, 1)), rel=0.1)
    assert predicted > reading


def test_decoding_is_part_of_what_a_run_needs_if_there_is_any(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.Forecast, "_waste", lambda *_: (0, 0.5))
    made = partial(setting, recipe, tmp_path / "run", "train.threads=1", "train.tokens=64")
    trainer = Trainer(made())
    found = need(trainer)
    assert found.validation == round(1.5 * trainer.validation.peak(trainer.bundle))
    assert found.growth == found.validation > found.activations
    for nothing_decoded in ("train.validate_every=0", "train.metric=perplexity"):
        assert need(Trainer(made(nothing_decoded))).validation == 0


def test_the_largest_budget_that_fits(recipe, tmp_path, monkeypatch):
    wanted = setting(recipe, tmp_path / "run", "train.tokens=auto", "train.threads=1")
    monkeypatch.setattr(memory.Forecast, "_waste", lambda *_: (0, 0.3))
    monkeypatch.setattr(budget, "_FIRST", 128)
    judge = Trainer(settle_with(wanted, 128))
    free = int(need(judge, 640).growth / budget._SHARE) + 1
    monkeypatch.setattr(budget, "available", lambda _device: free)
    tokens = settle(wanted).recipe.train.tokens
    assert tokens >= 512
    assert need(judge, tokens).growth <= budget._SHARE * free
    monkeypatch.setattr(budget, "available", lambda _device: 1000)
    with pytest.raises(ResourceError, match="a validation does not fit into the 0 MiB"):
        settle(wanted)
    with pytest.raises(ResourceError, match=r"longest example, \d+ tokens"):
        settle(setting(recipe, tmp_path / "run", "train.tokens=auto", "train.threads=1", "train.validate_every=0"))


def settle_with(wanted: Setting, tokens: int) -> Setting:
    return budget._with(wanted, tokens)


def test_a_run_keeps_the_budget_it_began_with(forks, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = forks("train", recipe, "train.tokens=auto", "train.steps=2", "train.validate_every=0", "--output", run)
    assert first.wait() == 0, first.stderr
    assert "train.tokens: auto is " in first.stderr
    kept = int(first.stderr.split("train.tokens: auto is ")[1].split()[0])
    monkeypatch.setattr(budget, "available", lambda _device: 1000)
    again = setting(recipe, run, "train.tokens=auto")
    assert settle(again).recipe.train.tokens == kept
    assert json.loads((run / "bundle" / "bundle.json").read_text())["recipe"]["train"]["tokens"] == kept


def test_free_memory_is_the_least_of_system_and_group(tmp_path, monkeypatch):
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, usage),))
    free = memory.available(CPU)
    assert free > 0
    limit.write_text("max\n")
    usage.write_text("1000\n")
    assert memory.available(CPU) > 0
    limit.write_text("5000\n")
    assert memory.available(CPU) == 4000


class Time:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.busy = 5.0

    def process_time(self) -> float:
        return self.busy

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    told = Time()
    monkeypatch.setattr(account, "time", told)
    monkeypatch.setattr(energy, "time", told)
    monkeypatch.setattr(account, "matrix_ceiling", lambda *_: 1e9)
    return told


def test_costs_are_added_up_over_processes_and_repeated_work_is_told(tmp_path, clock):
    cost = Cost(price_per_hour=3.6, watts=100, carbon_intensity=500)
    first = Account(tmp_path, cost, CPU, torch.float32, Progress())
    clock.now += 1000
    told = first.clock(Progress(step=10, tokens=5000, flops=10**11, real=75, positions=100))
    assert told["seconds"] == 1000
    assert told["tokens_per_second"] == 5
    assert told["mfu"] == 0.1
    # That process is killed; the checkpoint was of update 4.
    second = Account(tmp_path, cost, CPU, torch.float32, Progress(step=4, tokens=2000, flops=4 * 10**10))
    clock.now += 2600
    end = Progress(step=10, tokens=5000, flops=10**11, real=75, positions=100)
    told = second.clock(end)
    assert told["seconds"] == 2600
    assert told["spent"] == {"hours": 1.0, "kwh": 0.1, "price": 3.6, "co2_grams": 50.0}
    sentence = second.sentence(end)
    for words in ("60.0 minutes", "25.0% padding", "6 updates done again", "0.1 kWh", "3.60 to pay", "50 g CO2"):
        assert words in sentence
    assert json.loads((tmp_path / SPENT).read_text())["price"] == 3.6
    for damaged in ("{", "[]", '{"seconds": "many"}', '{"seconds": NaN}'):  # counted anew, never an error
        (tmp_path / SPENT).write_text(damaged)
        said: list[str] = []
        assert Account(tmp_path, cost, CPU, torch.float32, end, say=said.append).spent["seconds"] == 0
        assert "spent.json: damaged; what the run had cost before is not known" in said[0]


def test_energy_that_nobody_knows_is_estimated_from_the_time_of_busy_cores(tmp_path, clock):
    (tmp_path / SPENT).write_text('{"seconds": 3600, "updates": 0, "joules": 0}')  # of before this was counted
    made = Account(tmp_path, Cost(carbon_intensity=500), CPU, torch.float32, Progress())
    made.energy = EnergyMeter(CPU, tmp_path)
    clock.busy += 7200
    clock.now += 3600
    # Two cores were busy for an hour: 24 Wh.
    assert made.clock(Progress())["spent"] == {"hours": 2.0, "kwh_estimated": 0.024, "co2_grams": 12.0}
    assert "about 0.024 kWh, 12 g CO2" in made.sentence(Progress())


def test_every_process_has_a_gpu_of_its_own_and_shares_its_machine(tmp_path, clock):
    told = []
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        made = Account(run, Cost(), CPU, torch.float32, Progress(), processes=8)
        made.device = torch.device(device)
        readings = iter([3.6e6])
        made.energy.joules = partial(next, readings)
        clock.now += 3600
        told.append(made.clock(Progress())["spent"]["kwh_measured"])
    assert told == [1, 8]


def test_the_share_of_the_ceiling_is_of_the_time_that_is_known(tmp_path, clock):
    begun = Progress(step=100, flops=10**15)  # of a run whose `spent.json` is lost
    made = Account(tmp_path, Cost(), CPU, torch.float32, begun)
    clock.now += 1000
    end = Progress(step=110, flops=10**15 + 10**11)
    made.clock(end)
    assert "(10% of the machine's ceiling)" in made.sentence(end)


def test_a_run_of_before_flops_were_counted_has_the_same_share_of_the_ceiling(tmp_path, clock):
    (tmp_path / SPENT).write_text('{"seconds": 1000, "cpu_seconds": 1000, "updates": 100, "joules": 0}')
    made = Account(tmp_path, Cost(), CPU, torch.float32, Progress(step=100, flops=10**11))
    clock.now += 1000
    end = Progress(step=200, flops=2 * 10**11)
    made.clock(end)
    assert "(10% of the machine's ceiling)" in made.sentence(end)


def test_a_model_that_was_never_judged_tells_its_cost_too(forks, recipe, tmp_path):
    run = tmp_path / "run"
    done = forks("train", recipe, "train.steps=3", "train.validate_every=0", "train.log_every=50", "--output", run)
    assert done.wait() == 0, done.stderr
    assert json.loads((run / "bundle" / SPENT).read_text())["updates"] == 3


def test_measured_energy_where_the_machine_tells_it(tmp_path, clock):
    for package, joules in (("intel-rapl:0", 5), ("intel-rapl:1", 7), ("intel-rapl:0:0", 1)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(f"{joules}000000\n")
        (tmp_path / package / "max_energy_range_uj").write_text("10000000\n")
    meter = EnergyMeter(CPU, tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000\n")  # it has begun again at 10 joules
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("9000000\n")  # a part of package 0
    assert meter.joules() == pytest.approx(3 + 4)
    assert meter.joules() == 0
    assert EnergyMeter(CPU, tmp_path / "nothing").joules() is None


def test_a_gpu_is_asked_for_its_power(tmp_path, clock, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --id=GPU-7 ] && echo 250.5\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    meter = EnergyMeter(CPU, tmp_path)
    meter._gpu = "GPU-7"
    clock.now += 10
    assert meter.joules() == pytest.approx(2505)
    meter._gpu = "GPU-8"
    assert meter.joules() is None


def test_the_log_tells_the_work_and_the_bundle_too(forks, recipe, tmp_path):
    run = tmp_path / "run"
    keys = ("train.steps=20", "train.accumulate=2", "train.save_every=5", "train.validate_every=20")
    costs = ("cost.price_per_hour=360", "cost.watts=50", "cost.carbon_intensity=100")
    done = forks("train", recipe, *keys, *costs, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "memory: " in done.stderr
    assert "spent: " in done.stderr
    last = log_lines(run, "train")[-1]
    wanted = setting(recipe, run, *keys)
    store = wanted.data.store("train")
    sampler = Sampler(store.source_lengths, store.target_lengths, 256, wanted.data.data_hash, 1)
    batches = [rows for update in itertools.islice(sampler.updates(0, 2), 20) for rows in update]
    sides = [[side[rows] + 1 for rows in batches] for side in (store.source_lengths, store.target_lengths)]
    real = sum(int(one.sum()) for side in sides for one in side)
    trainer = Trainer(wanted)
    positions = real if trainer.model.packs else sum(len(one) * int(one.max()) for side in sides for one in side)
    assert last["padding"] == pytest.approx(1 - real / positions, abs=1e-4)
    counted = sum(trainer.gradients.read(trainer.first(rows)).flops for rows in batches)
    assert last["flops"] == pytest.approx(counted, rel=1e-3)
    facts = json.loads((run / "bundle" / "bundle.json").read_text())["facts"]
    assert facts["work"] == {key: last[key] for key in ("tokens", "flops", "padding")}
    spent = last["clock"]["spent"]
    assert spent["price"] == pytest.approx(360 * spent["hours"], rel=0.01, abs=1e-6)
    assert spent["kwh"] == pytest.approx(0.05 * spent["hours"], rel=0.01, abs=1e-6)
    # The model tells what it had cost, in a file that its manifest leaves out: no repetition gives it again.
    (judged,) = log_lines(run, "valid")
    in_bundle = json.loads((run / "bundle" / SPENT).read_text())
    assert {key: in_bundle[key] for key in spent} == judged["clock"]["spent"]
    assert SPENT not in json.loads((run / "bundle" / MANIFEST).read_text())["files"]


def test_what_a_kill_cost_is_told(forks, recipe, tmp_path):
    run = tmp_path / "run"
    keys = ("train.steps=3000", "train.save_every=1000", "train.validate_every=0", "train.log_every=2")
    killed = forks.start("train", recipe, *keys, "--output", run)
    while killed.code() is None and lines_of(run / "log.jsonl") < 3:
        time.sleep(0.005)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = forks("train", recipe, *keys, "train.steps=20", "--output", run)
    assert done.wait() == 0, done.stderr
    again = json.loads((run / SPENT).read_text())["updates"] - 20
    assert again >= 6
    assert f"{again} updates done again after a kill" in done.stderr


def test_a_dry_run_shows_the_memory(forks, recipe, tmp_path):
    done = forks("train", recipe, "--dry-run", "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stderr.split("\n") if "MiB" in line)
    assert {"weights", "optimizer", "gradients", "activations", "total"} <= rows.keys()


@pytest.mark.slow
def test_predicted_memory_is_within_a_tenth_of_the_peak():
    from tests.benchmarks.memory import SHAPES, in_a_process

    for number, shape in enumerate(SHAPES):
        found = in_a_process(number)
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.1), shape
