"""The gradient of an update does not depend on how its micro-batches are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch, collate
from encdec_cli.models.model import Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import CrossEntropy, Objective, RDrop

VOCAB = 30


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model(dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    torch.manual_seed(1)
    return Transformer(Transformer.Config(2, 2, 32, 4, 64, **({"dropout": 0.2} | changes)), VOCAB, VOCAB).to(dtype)


def batches(number: int) -> list[Batch]:
    random = torch.Generator().manual_seed(2)

    def some(rows: int) -> list[list[int]]:
        lengths = torch.randint(1, 9, (rows,), generator=random).tolist()
        return [torch.randint(4, VOCAB, (length,), generator=random).tolist() for length in lengths]

    return [collate(some(5 + i), some(5 + i), range(5 + i)) for i in range(number)]


def computed(
    model: nn.Module, threads: int, most: int, number: int = 5, seed: int = 3, objective: Objective | None = None
) -> tuple[int, list]:
    """The workers that were used; loss and gradients of each micro-batch."""
    torch.set_num_threads(threads)
    parameters = list(model.parameters())
    gradients = Gradients(model, parameters, objective or CrossEntropy(0.1), most)
    results = list(gradients.of(batches(number), 0.01, seed))
    gradients.close()
    assert torch.get_num_threads() == threads
    return gradients.workers, results


def assert_equal(a: list, b: list) -> None:
    for (loss, first), (other, second) in zip(a, b, strict=True):
        assert loss == other
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("objective", [CrossEntropy(0.1), RDrop(0.1, None, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_side_by_side_gives_the_bytes_of_in_turn(dtype, objective):
    one, in_turn = computed(model(dtype), threads=1, most=5, objective=objective)
    two, beside = computed(model(dtype), threads=2, most=2, objective=objective)
    three, wider = computed(model(dtype), threads=3, most=5, objective=objective)
    assert (one, two, three) == (1, 2, 3)
    assert_equal(in_turn, beside)
    assert_equal(in_turn, wider)


def test_dropout_follows_the_seed_and_differs_between_micro_batches():
    _, first = computed(model(), threads=2, most=2, number=1)
    _, again = computed(model(), threads=2, most=2, number=1)
    _, other = computed(model(), threads=2, most=2, number=1, seed=4)
    assert_equal(first, again)
    assert first[0][0] != other[0][0]
    torch.set_num_threads(1)
    twin = batches(1) * 2
    network = model()
    pair = list(Gradients(network, list(network.parameters()), CrossEntropy(0.1), 1).of(twin, 0.01, 3))
    assert pair[0][0] != pair[1][0]


def test_gradients_add_up_to_that_of_the_mean_token():
    network = model(dropout=0.0)
    _, parts = computed(network, threads=2, most=2)
    losses = 0
    for batch in batches(5):
        target = batch.known_target
        logits = network.project(network(batch.source, batch.source_mask, target[:, :-1]))
        losses += nn.functional.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, label_smoothing=0.1, reduction="sum"
        )
    (losses * 0.01).backward()
    assert sum(loss for loss, _ in parts) == pytest.approx(float(losses.detach()), rel=1e-5)
    for number, parameter in enumerate(network.parameters()):
        total = sum(gradients[number] for _, gradients in parts)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-6)


class Noisy(Transformer):
    """Draws from torch's own random numbers, as a plugin with nn.Dropout does, and does not ask for threads."""

    side_by_side = False

    def encode(self, source: Tensor, mask: Tensor):
        memory = super().encode(source, mask)
        memory.states = nn.functional.dropout(memory.states, 0.3)
        return memory


def test_a_model_is_computed_in_turn_unless_it_says_otherwise():
    def noisy() -> Noisy:
        torch.manual_seed(1)
        return Noisy(Transformer.Config(1, 1, 16, 2, 16), VOCAB, VOCAB)

    assert not Model.side_by_side
    workers, first = computed(noisy(), threads=2, most=2)
    assert workers == 1
    torch.rand(7)
    _, again = computed(noisy(), threads=2, most=2)
    assert_equal(first, again)


class Failing(Transformer):
    """Fails on one of several micro-batches."""

    def encode(self, source: Tensor, mask: Tensor):
        if len(source) == 7:
            raise ValueError("seven rows")
        return super().encode(source, mask)


def test_what_fails_in_a_thread_is_raised():
    with pytest.raises(ValueError, match="seven rows"):
        computed(Failing(Transformer.Config(1, 1, 16, 2, 16), VOCAB, VOCAB), threads=2, most=2)
