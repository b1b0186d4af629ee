"""Activation checkpointing takes less memory and changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from encdec_cli.data.batch import collate
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy
from tests.test_resume import fingerprint

VOCAB = 30


def batches(rows: int, longest: int, number: int = 2) -> list:
    random = torch.Generator().manual_seed(2)

    def some() -> list[list[int]]:
        lengths = torch.randint(1, longest, (rows,), generator=random).tolist()
        return [torch.randint(4, VOCAB, (length,), generator=random).tolist() for length in lengths]

    return [collate(some(), some(), range(rows)) for _ in range(number)]


def gradients(dtype: torch.dtype, threads: int, checkpointing: bool, **changes) -> list:
    torch.manual_seed(1)
    settings = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1} | changes
    model = Transformer(Transformer.Config(2, 2, 32, 4, 64, **settings), VOCAB, VOCAB).to(dtype)
    model.checkpointing = checkpointing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    computer = Gradients(model, list(model.parameters()), CrossEntropy(0.1), 2)
    found = list(computer.of(batches(6, 9), 0.01, 3))
    computer.close()
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize(
    ("dtype", "threads", "changes"),
    [
        (torch.float32, 1, {}),
        (torch.bfloat16, 2, {"positions": "rotary", "activation": "swiglu"}),
        (torch.float32, 1, {"dropout": 0.0, "attention_dropout": 0.0, "norm_order": "post", "tie": "none"}),
    ],
)
def test_loss_and_gradients_are_equal_to_the_bit(dtype, threads, changes):
    plain = gradients(dtype, threads, False, **changes)
    again = gradients(dtype, threads, True, **changes)
    for (loss, ours), (other, theirs) in zip(plain, again, strict=True):
        assert loss == other
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class TorchDropout(Transformer):
    """Draws from torch's own random numbers inside a layer, as the layers of a plugin may."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        for layer in self.encoder:
            layer.feed_forward.dropout = nn.Dropout(0.5)


def test_layers_that_draw_from_torch_draw_the_same_again():
    def computed(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = TorchDropout(Transformer.Config(2, 1, 16, 2, 16), VOCAB, VOCAB)
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        (batch,) = batches(4, 6, 1)
        loss = CrossEntropy(0.0)(model, batch, list(model.parameters()), 1.0)
        found = torch.autograd.grad(loss, list(model.parameters()))
        return [*found, torch.rand(1)]

    assert all(torch.equal(a, b) for a, b in zip(computed(False), computed(True), strict=True))


def test_it_keeps_less():
    model = Transformer(Transformer.Config(4, 4, 32, 4, 128), VOCAB, VOCAB)
    (batch,) = batches(16, 20, 1)
    gradients = Gradients(model, list(model.parameters()), CrossEntropy(0.1), 1)
    plain = gradients.read(batch)
    model.checkpointing = True
    less = gradients.read(batch)
    assert less.saved < plain.saved / 3
    assert less.peak < plain.peak / 2
    assert plain.flops < less.flops < 1.5 * plain.flops


def test_a_run_with_it_has_the_weights_of_one_without(forks, recipe, tmp_path):
    for name, key in (("with", "true"), ("without", "false")):
        done = forks("train", recipe, "train.steps=10", f"train.checkpointing={key}", "--output", tmp_path / name)
        assert done.wait() == 0, done.stderr
    ours, theirs = (fingerprint(tmp_path / name)["files"]["bundle"]["files"] for name in ("with", "without"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_a_model_that_cannot_says_so(forks, recipe, tmp_path):
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from encdec_cli.models.transformer import Transformer\nfrom encdec_cli.registry import models\n\n\n"
        '@models.register("own")\nclass Own(Transformer):\n    can_checkpoint = False\n'
    )
    done = forks(
        *("train", recipe, "--plugin", plugin, "model.name=own", "train.checkpointing=true"),
        *("--output", tmp_path / "run"),
    )
    assert done.wait() == 2, done.stderr
    assert "train.checkpointing" in done.stderr
