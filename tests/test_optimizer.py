"""The optimizer and the schedules against torch.optim and against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from encdec_cli.errors import BundleError
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.adafactor import Adafactor
from encdec_cli.training.adam import Adam
from encdec_cli.training.muon import Muon, orthogonalised, square_blocks
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import choose
from encdec_cli.training.rules import hidden_matrices
from encdec_cli.training.schedule import learning_rate

DECAY = Adam(weight_decay=0.1)
NO_DECAY = Adam()


def made(model: nn.Module, rule: Adam | Muon = DECAY, dtype: str = "fp32") -> Optimizer:
    """An optimizer, and the model cast after it, as the trainer does it."""
    optimizer = Optimizer([(rule, model.named_parameters())])
    choose(dtype, "cpu").apply(model)
    return optimizer


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4))


def give_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=random) * scale).to(parameter.dtype)


def collect(model: nn.Module, optimizer: Optimizer) -> None:
    """Hand over the gradients of the model, as a micro-batch would."""
    optimizer.collect([parameter.grad for parameter in optimizer.parameters])


def update(model: nn.Module, optimizer: Optimizer, seed: int, rate: float = 0.01) -> None:
    give_gradients(model, seed)
    collect(model, optimizer)
    optimizer.step(rate)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_equals_torch_for_many_steps_with_decay_of_matrices_only(name: str) -> None:
    ours, theirs = network(), network()
    optimizer = made(ours, Adam(name == "adamw", weight_decay=0.1))
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    reference = kind(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8, foreach=False)
    for step in range(1, 41):
        rate = 0.01 / step
        update(ours, optimizer, step, rate)
        give_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adafactor_equals_torch_where_that_does_not_scale_by_the_weights() -> None:
    ours, theirs = network(), network()
    optimizer = Optimizer([(Adafactor(weight_decay=0.1), ours.named_parameters())])
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Its steps are the rate times the larger of 10 and the weights' root mean square.
    reference = torch.optim.Adafactor(groups, lr=1.0, eps=(1e-30, 10.0), foreach=False)
    for step in range(1, 41):
        rate = 0.001 / step
        update(ours, optimizer, step, 10 * rate)
        give_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = rate
            group["weight_decay"] *= 10 if step == 1 else 1
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_adafactor_bears_rows_without_any_gradient() -> None:
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = Optimizer([(Adafactor(), model.named_parameters())])
    for _ in range(3):
        model.weight.grad = torch.tensor([[0.0, 0.0, 0.0], [1e-6, 1e3, 0.0]])
        collect(model, optimizer)
        optimizer.step(0.1)
    assert torch.isfinite(model.weight).all()
    assert torch.equal(model.weight[0], before[0])
    assert (model.weight[1, :2] < before[1, :2]).all()


def test_adafactor_remembers_a_row_and_a_column_of_a_matrix() -> None:
    state = Optimizer([(Adafactor(), nn.Linear(7, 5).named_parameters())]).state()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(("master", "step"))}
    assert shapes == {"rows.weight": (5, 1), "columns.weight": (1, 7), "square.bias": (5,)}


def test_first_step_of_adam_by_hand() -> None:
    # Without decay the first step of Adam is `rate` against the sign of the gradient.
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = made(model, Adam(decoupled=False))
    model.weight.grad = torch.tensor([[0.5, -3.0]])
    collect(model, optimizer)
    optimizer.step(0.25)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.75, 1.25]]))


def test_bf16_parameters_are_the_rounded_masters() -> None:
    model, exact = network(), network()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, reference = made(model, dtype="bf16"), made(exact)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(optimizer.masters()[name], value) for name, value in initial.items())
    for seed in range(30):
        update(model, optimizer, seed, rate=1e-5)  # far below what bf16 could add to a weight
        give_gradients(exact, seed)
        for parameter in exact.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.bfloat16().float()
        collect(exact, reference)
        reference.step(1e-5)
    for name, parameter in model.named_parameters():
        master = optimizer.masters()[name]
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
        assert not torch.equal(master, initial[name])
        assert torch.equal(master, exact.get_parameter(name))


def test_micro_batches_are_summed_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = made(model, dtype="bf16")
    for value in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        model.weight.grad = torch.tensor([[value]], dtype=torch.bfloat16)
        collect(model, optimizer)
    assert optimizer.clip() == 258.0


def test_clip_equals_torch() -> None:
    ours, theirs = network(), network()
    optimizer = made(ours, NO_DECAY)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for seed, scale in enumerate((3.0, 0.001, 0.5)):
        give_gradients(ours, seed, scale)
        give_gradients(theirs, seed, scale)
        collect(ours, optimizer)
        norm = optimizer.clip(1.0)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)), rel=1e-5)
        optimizer.step(0.01)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_seen_before_the_update(bad: float) -> None:
    model = network()
    optimizer = made(model)
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    give_gradients(model, 1)
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    weight.grad[0, 0] = bad
    collect(model, optimizer)
    assert not math.isfinite(optimizer.clip(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_restored_state_goes_on_with_the_same_bytes(dtype: str) -> None:
    unbroken = network()
    optimizer = made(unbroken, dtype=dtype)
    for seed in range(7):
        update(unbroken, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    resumed = network()
    nn.init.zeros_(resumed.get_parameter("0.weight"))
    other = made(resumed, dtype=dtype)
    other.load(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state().items())
    for seed in range(7, 12):
        update(unbroken, optimizer, seed)
        update(resumed, other, seed)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.updates == 12


def test_the_names_of_the_state() -> None:
    optimizer = made(nn.Linear(2, 2))
    kinds = ("master", "moment1", "moment2")
    assert optimizer.state().keys() == {"step"} | {f"{kind}.{name}" for kind in kinds for name in ("weight", "bias")}


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    optimizer = made(nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    with pytest.raises(BundleError, match=r"lacks 'master\.bias'"):
        optimizer.load(made(nn.Linear(2, 2, bias=False)).state())
    with pytest.raises(BundleError, match=r"\[3, 2\], expected torch.float32 \[2, 2\]"):
        optimizer.load(made(nn.Linear(2, 3)).state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state().items())


def test_frozen_parameters_stay_and_unused_ones_do_no_harm() -> None:
    model = network()
    model.get_parameter("0.weight").requires_grad_(False)
    frozen = model.get_parameter("0.weight").clone()
    optimizer = made(model, NO_DECAY)
    unused = model.get_parameter("3.bias").detach().clone()
    give_gradients(model, 1)
    model.get_parameter("3.bias").grad = None
    collect(model, optimizer)
    optimizer.step(0.01)
    assert torch.equal(model.get_parameter("0.weight"), frozen)
    assert torch.equal(model.get_parameter("3.bias").detach(), unused)
    assert {name for name in optimizer.state() if name.endswith("0.weight")} == {"master.0.weight"}


def test_frozen_parameters_keep_their_full_precision() -> None:
    model = network()
    frozen = model.get_parameter("0.weight").requires_grad_(False).clone()
    optimizer = made(model, dtype="bf16")
    other = network()
    other.get_parameter("0.weight").requires_grad_(False).zero_()
    resumed = made(other, dtype="bf16")
    resumed.load(optimizer.state())
    for each, network_ in ((optimizer, model), (resumed, other)):
        assert torch.equal(each.masters()["0.weight"], frozen)
        assert torch.equal(network_.get_parameter("0.weight"), frozen.bfloat16())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_moving_average_by_its_definition_and_where_it_is_used(dtype: str) -> None:
    model = network()
    optimizer = Optimizer([(DECAY, model.named_parameters())], ema=0.8)
    choose(dtype, "cpu").apply(model)
    seen: list[dict[str, torch.Tensor]] = []
    for seed in range(1, 12):
        update(model, optimizer, seed)
        seen.append({name: master.clone() for name, master in optimizer.masters().items()})
        shares = [0.8 ** (len(seen) - number) for number in range(1, len(seen) + 1)]
        for name, average in optimizer.averages().items():
            expected = sum(share * old[name].double() for share, old in zip(shares, seen, strict=True)) / sum(shares)
            torch.testing.assert_close(average, expected.float(), rtol=1e-5, atol=1e-6)
    with optimizer.averages_in_use():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, optimizer.averages()[name].to(parameter.dtype))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, seen[-1][name].to(parameter.dtype))
    update(model, optimizer, 12)  # the parameters of fp32 are the masters again
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters()[name].to(parameter.dtype))


def test_the_moving_average_goes_on_with_the_same_bytes() -> None:
    unbroken, resumed = network(), network()
    optimizer = Optimizer([(DECAY, unbroken.named_parameters())], ema=0.9)
    other = Optimizer([(DECAY, resumed.named_parameters())], ema=0.9)
    for seed in range(5):
        update(unbroken, optimizer, seed)
    other.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for each, model in ((optimizer, unbroken), (other, resumed)):
        update(model, each, 5)
    assert optimizer.averages().keys() == optimizer.masters().keys()
    assert all(torch.equal(average, other.averages()[name]) for name, average in optimizer.averages().items())


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("inverse_sqrt", {1: 0.25, 2: 0.5, 4: 1.0, 16: 0.5, 64: 0.25}),
        ("cosine", {1: 0.25, 4: 1.0, 8: 0.75, 10: 0.5, 12: 0.25, 16: 0.0, 20: 0.0}),
        ("linear", {1: 0.25, 4: 1.0, 7: 0.75, 10: 0.5, 16: 0.0, 20: 0.0}),
        ("constant", {1: 0.25, 4: 1.0, 5: 1.0, 100: 1.0}),
    ],
)
def test_schedules_by_hand(kind: str, rates: dict[int, float]) -> None:
    for step, rate in rates.items():
        assert learning_rate(step, kind, 2e-3, 4, 16) == pytest.approx(2e-3 * rate, abs=1e-12)


@pytest.mark.parametrize("kind", ["inverse_sqrt", "cosine", "linear", "constant"])
def test_schedules_without_warmup_start_near_the_peak_and_never_rise(kind: str) -> None:
    rates = [learning_rate(step, kind, 1.0, 0, 50) for step in range(1, 51)]
    assert rates[0] > 0.97
    assert rates == sorted(rates, reverse=True)


def test_muon_makes_the_singular_values_of_each_square_block_nearly_equal() -> None:
    random = torch.Generator().manual_seed(4)
    for shape in ((48, 16), (16, 48), (16, 16), (20, 16)):
        left, _, right = torch.linalg.svd(square_blocks(torch.randn(shape, generator=random)), full_matrices=False)
        blocks = left @ torch.diag(torch.linspace(10, 1, 16)) @ right
        steps = orthogonalised(blocks, torch.float32)
        assert steps.shape == blocks.shape
        # The singular vectors stay, so U^T step V is diagonal.
        torch.testing.assert_close(
            left.mT @ steps @ right.mT, torch.eye(16).expand(len(blocks), 16, 16), atol=0.35, rtol=0
        )


def test_square_blocks_are_views_of_the_parts() -> None:
    joined = torch.arange(12.0).view(6, 2)  # as queries, keys and values of width 2
    assert torch.equal(square_blocks(joined), torch.stack(joined.chunk(3)))
    assert torch.equal(square_blocks(joined.T), torch.stack(joined.T.chunk(3, dim=1)))
    square_blocks(joined)[1].zero_()
    assert joined.sum() == 66 - (4 + 5 + 6 + 7)


def test_first_step_of_muon_by_hand() -> None:
    # Orthogonal already: the gradient 2 * I stays a multiple of I, and a step is about 0.2 * sqrt(side) * rate of it.
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = made(model, Muon())
    model.weight.grad = 2 * torch.eye(4)
    collect(model, optimizer)
    optimizer.step(0.5)
    step = -model.weight.detach()
    assert torch.equal(step, torch.diag(step.diagonal()))
    assert (step.diagonal() / (0.2 * 2 * 0.5)).sub(1).abs().max() < 0.3


def test_muon_is_for_matrices_between_layers_alone() -> None:
    # The feed-forward is as wide as the vocabulary is large: sizes tell nothing.
    config = Transformer.Config(1, 1, 8, 2, 16, positions="learned", tie="none")
    names = hidden_matrices(Transformer(config, 16, 16))
    assert names == {
        *(f"encoder.0.{part}.weight" for part in ("attention.joined", "attention.output")),
        *(f"decoder.0.{part}.weight" for part in ("attention.joined", "attention.output")),
        *(f"decoder.0.cross.{part}.weight" for part in ("query", "joined", "output")),
        *(f"{stack}.0.feed_forward.{part}.weight" for stack in ("encoder", "decoder") for part in ("inner", "outer")),
    }


def test_gradients_that_share_their_memory_stay_apart() -> None:
    model = network()
    weight = model.get_parameter("3.bias")
    optimizer = Optimizer([(NO_DECAY, [("a", weight), ("b", nn.Parameter(weight.detach().clone()))])])
    shared = torch.tensor([3.0, 0.0, 4.0, 0.0])
    for _ in range(2):
        optimizer.collect([shared, shared])
    assert shared.tolist() == [3.0, 0.0, 4.0, 0.0]
    assert optimizer.clip(0.0) == pytest.approx(10 * 2**0.5)


def test_adafactor_remembers_means_of_columns_where_a_process_has_no_row():
    kept = Adafactor().moments(torch.zeros(0, 5))
    assert {name: list(moment.shape) for name, moment in kept.items()} == {"rows": [0, 1], "columns": [1, 5]}
