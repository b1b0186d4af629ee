"""`train.compile`: where it applies, where it is refused, and that it computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encdec_cli.errors import UsageError
from encdec_cli.models.model import Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Recipe, load
from encdec_cli.training.compiling import compiles
from encdec_cli.training.loss import CrossEntropy, chunked_loss
from tests.conftest import copy_task, encdec
from tests.trainers import losses


class Other(Model):
    """A model of another kind."""


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load(copy_task(folder), overrides)


def model() -> Transformer:
    return Transformer(Transformer.Config(1, 1, 8, 2, 16), 20, 20)


def test_by_itself_a_cpu_does_not_compile(tmp_path):
    assert not compiles(recipe(tmp_path, "train.steps=100000"), model(), "cpu")


def test_a_run_that_asks_for_it_compiles(tmp_path):
    assert compiles(recipe(tmp_path, "train.compile=true"), model(), "cpu")
    assert not compiles(recipe(tmp_path, "train.compile=false", "train.steps=100000"), model(), "cpu")


def test_what_cannot_be_compiled_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"train.compile: this model \(Other\) cannot be compiled"):
        compiles(recipe(tmp_path, "train.compile=true"), Other(), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("model.positions=rotary", "model.norm_order=post"), ("train.checkpointing=true",)]
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_has_the_same_losses(more, tmp_path):
    copies = copy_task(tmp_path / "corpus")
    options = ("train.steps=12", "train.validate_every=0", "model.dropout=0.0", *more)
    plain = losses(copies, tmp_path / "plain", *options)
    assert losses(copies, tmp_path / "compiled", *options, "train.compile=true") == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prior", [None, torch.rand(50).softmax(0)])
def test_the_compiled_loss_has_the_same_gradients_for_any_number_of_rows(prior):
    torch.manual_seed(1)
    weight = torch.randn(50, 8, requires_grad=True)
    for rows in (3, 40, 70, 101):
        hidden, target = torch.randn(rows, 8, requires_grad=True), torch.randint(0, 50, (rows,))
        found = []
        for compiled in (False, True):
            criterion = CrossEntropy(target, 0.1, prior, torch.rand(rows, generator=torch.manual_seed(2)), compiled)
            loss = chunked_loss(hidden, lambda x: x @ weight.T, criterion, [weight], 1 / rows, chunk=50 * 32)
            found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_compiled_run_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    recipe = copy_task(tmp_path / "corpus")
    done = encdec("train", recipe, "--prove-resume", "2", "train.compile=true", "train.steps=30", timeout=900)
    assert done.returncode == 0, done.stderr
