"""Token-level distillation: the loss against the textbook's, with whole logits; and runs that have a teacher."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli.data.batch import Batch, collate
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.loss import CrossEntropy, chunked_loss
from encdec_cli.training.teacher import Distillation, Divergence
from tests.conftest import copy_task

VOCAB = 23


def transformer(seed: int, width: int) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": width, "heads": 2, "feed_forward": 16, "dropout": 0.0}
    return Transformer(Transformer.Config(**sizes), VOCAB, VOCAB)


def textbook(student: Tensor, teacher: Tensor, labels: Tensor, smoothing: float, weight: float, t: float) -> Tensor:
    """The loss of logits [n, vocab]; Hinton et al. 2015 with torch's own functions."""
    hard = F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="sum")
    soft = F.kl_div((student / t).log_softmax(1), (teacher / t).softmax(1), reduction="sum")
    return (1 - weight) * hard + weight * t**2 * soft


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (1.0, 1.0), (0.5, 2.5), (0.0, 4.0)])
@pytest.mark.parametrize("chunk", [8 * VOCAB, 10**9])
def test_loss_and_gradients_equal_the_textbook(weight, temperature, chunk):
    torch.manual_seed(1)
    output, teacher = nn.Linear(6, VOCAB), nn.Linear(4, VOCAB)
    hidden, known = torch.randn(19, 6, requires_grad=True), torch.randn(19, 4)
    labels = torch.randint(VOCAB, (19,))
    criterion = Divergence(CrossEntropy(labels, 0.1), known, teacher, weight, temperature)
    ours = chunked_loss(hidden, output, criterion, list(output.parameters()), weight=0.25, chunk=chunk)
    expected = 0.25 * textbook(output(hidden), teacher(known), labels, 0.1, weight, temperature)
    torch.testing.assert_close(ours, expected)
    tensors = (hidden, *output.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, tensors), torch.autograd.grad(expected, tensors))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], [0, 1])


def test_padding_is_nothing_to_learn_and_the_teacher_learns_nothing(batch):
    student, teacher = transformer(1, 8), transformer(2, 16)
    objective = Distillation(teacher.eval().requires_grad_(False), 0.1, None, 0.4, 2.0)
    parameters = list(student.parameters())
    ours = objective(student, batch, parameters, 1.0)
    expected = torch.zeros(())
    for row, (sources, targets) in enumerate([([5, 6, 7], [9, 10]), ([8], [11, 12, 13, 14])]):
        alone = collate([sources], [targets], [row])
        read = (alone.source, alone.source_mask, alone.known_target[:, :-1])
        logits = [model.project(model(*read)[0]) for model in (student, teacher)]
        expected = expected + textbook(*logits, alone.known_target[0, 1:], 0.1, 0.4, 2.0)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(batch):
    student = transformer(1, 8)
    objective = Distillation(copy.deepcopy(student).requires_grad_(False), 0.0, None, 1.0, 3.0)
    loss = objective(student, batch, list(student.parameters()), 1.0)
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in torch.autograd.grad(loss, student.parameters())) < 1e-5


SHORT = ("train.steps=20", "train.validate_every=20", "train.save_every=10")


def weights(run: Path) -> str:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    return next(entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors"))


def test_a_run_with_a_teacher_goes_on_exactly_and_refuses_another(forks, tmp_path):
    recipe = copy_task(tmp_path / "corpus", train=200)
    assert forks("train", recipe, *SHORT, "--output", tmp_path / "big").wait() == 0
    teacher = (*SHORT, f"teacher.model={tmp_path / 'big'}")
    whole = forks("train", recipe, *teacher, "--output", tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr
    run = ("train", recipe, *teacher, "--output", tmp_path / "parts")
    assert forks(*run, "train.steps=10").wait() == 0
    other = forks(*run, f"teacher.model={tmp_path / 'whole'}")
    assert other.wait() == 2
    assert "this run cannot go on: teacher was " in other.stderr
    assert forks(*run, "train.steps=20").wait() == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts") != weights(tmp_path / "big")


def test_a_teacher_with_other_words_is_refused(forks, tmp_path, copy_run):
    recipe = copy_task(tmp_path / "corpus", train=200)
    for path in (tmp_path / "corpus").glob("*.src"):
        path.write_text(path.read_text().replace("7", "seven"))
    done = forks("train", recipe, *SHORT, f"teacher.model={copy_run}", "--output", tmp_path / "run")
    assert done.wait() == 5
    assert f"teacher {copy_run}: its source vocabulary is another than the model's" in done.stderr
