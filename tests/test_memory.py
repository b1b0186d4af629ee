"""A micro-batch for which there is not enough memory is computed in halves, and gives the same gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from encdec_cli.data.batch import Batch, collate
from encdec_cli.errors import ResourceError
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy
from tests.conftest import environment
from tests.test_gradients import VOCAB, batches, model

ERRORS = {
    "of torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "of Python": MemoryError(),
    "of the allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Narrow(Transformer):
    """Fails for more than `most` examples."""

    most, error = 3, ERRORS["of torch"]

    def encode(self, source, mask):
        if len(source) > self.most:
            raise self.error
        return super().encode(source, mask)


def narrow(most: int, **changes) -> Narrow:
    torch.manual_seed(1)
    made = Narrow(Transformer.Config(2, 2, 32, 4, 64, **({"dropout": 0.0} | changes)), VOCAB, VOCAB)
    made.most = most
    return made


def computed(made: Transformer, workers: int, said: list[str]) -> list:
    torch.set_num_threads(workers)
    gradients = Gradients(made, list(made.parameters()), CrossEntropy(0.1), workers, said.append)
    try:
        return list(gradients.of(batches(4), 0.01, 3))
    finally:
        gradients.close()


@pytest.mark.parametrize(
    ("error", "workers", "most"), [("of torch", 1, 5), ("of Python", 2, 5), ("of the allocator", 2, 1)]
)
def test_halves_give_the_gradient_of_the_whole(monkeypatch, error, workers, most):
    monkeypatch.setattr(Narrow, "error", ERRORS[error])
    parts, whole = computed(narrow(most), workers, []), computed(model(dropout=0.0), workers, [])
    assert len(parts) == len(whole) == 4
    for (loss, gradient), (expected, other) in zip(parts, whole, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        for one, two in zip(gradient, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert parts[0][0] == whole[0][0] or most < 5  # five examples fit: not touched


def test_it_is_said_once_for_a_size():
    said: list[str] = []
    made = narrow(4)
    gradients = Gradients(made, list(made.parameters()), CrossEntropy(0.1), 1, said.append)
    for seed in (1, 2):
        list(gradients.of(batches(1) * 2, 0.01, seed))
    assert len(said) == 1
    assert "out of memory for 5 examples (source [5, " in said[0]
    assert "train.tokens" in said[0]


def test_dropout_of_halves_follows_the_seed_and_differs_between_them():
    def losses(seed: int) -> list[float]:
        made = narrow(1, dropout=0.3)
        twins = collate([[5, 6, 7]] * 2, [[8, 9]] * 2, [0, 1])
        gradients = Gradients(made, list(made.parameters()), CrossEntropy(0.1), 1)
        seen, own = [], gradients._one

        def one(batch: Batch, weight: float, seed: int):
            result = own(batch, weight, seed)
            seen.append(result[0])
            return result

        gradients._one = one
        list(gradients.of([twins], 0.01, seed))
        return seen

    first, second = losses(3)
    assert first != second
    assert losses(3) == [first, second]
    assert losses(4) != [first, second]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_example_that_does_not_fit_is_named(workers):
    with pytest.raises(ResourceError, match=r"out of memory for training example 1 alone \(source \[1, "):
        computed(narrow(0), workers, [])


def test_another_error_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(Narrow, "error", RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        computed(narrow(3), 2, [])


def test_a_part_of_a_batch_is_the_batch_of_its_examples():
    sources, targets = [[5, 6, 7, 8], [5], [6, 7]], [[9], [9, 8], [7]]
    part, alone = collate(sources, targets, [4, 5, 6]).take(1, 3), collate(sources[1:], targets[1:], [5, 6])
    assert torch.equal(part.source, alone.source)
    assert torch.equal(part.known_target, alone.known_target)
    assert part.rows == alone.rows


LIMITED = """\
import resource
import torch
from tests.test_memory import *
torch.set_num_threads(1)
torch.manual_seed(1)
made = Transformer(Transformer.Config(1, 1, 64, 2, 2048), 40, 40)
ids = [[5 + (i + j) % 30 for j in range(60)] for i in range(512)]
gradients = Gradients(made, list(made.parameters()), CrossEntropy(0.1), 1, print)
list(gradients.of([collate(ids[:8], ids[:8], range(8))], 1.0, 3))
free = 300 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free))
loss, gradient = next(gradients.of([collate(ids, ids, range(512))], 1.0, 3))
print(loss > 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_machine_that_really_has_not_enough():
    """The activations of this batch take more than a gigabyte; there are 300 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")
    assert lines[0].startswith("out of memory for 512 examples")
    assert lines[-2] == "True"
