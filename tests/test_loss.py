"""The chunked loss against torch's cross-entropy of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli.training import loss as loss_module
from encdec_cli.training.loss import CrossEntropy, Project, chunked_loss, log_probs, real_rows

DIM, VOCAB = 12, 31


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(DIM, VOCAB, bias=bias)


def example(rows: int = 37) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(rows, DIM) * 2, torch.randint(1, VOCAB, (rows,))


def plain(hidden: Tensor, output: nn.Module, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(output(hidden), target, label_smoothing=smoothing, reduction="sum")


def token_loss(
    hidden: Tensor, output: Project, target: Tensor, smoothing: float, parameters: list[Tensor], **options
) -> Tensor:
    return chunked_loss(hidden, output, CrossEntropy(target, smoothing), parameters, **options)


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [1, 8 * VOCAB, 10 * VOCAB, 37 * VOCAB, 10**9])
def test_loss_and_gradients_equal_cross_entropy(smoothing: float, chunk: int) -> None:
    hidden, target = example()
    hidden.requires_grad_()
    output = layer()
    loss = token_loss(hidden, output, target, smoothing, list(output.parameters()), chunk=chunk)
    expected = plain(hidden, output, target, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        gradients(loss, hidden, *output.parameters()), gradients(expected, hidden, *output.parameters()), strict=True
    ):
        assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)


def test_worked_by_hand() -> None:
    # Two classes with logits (0, ln 3): probabilities 1/4 and 3/4.
    hidden = torch.tensor([[0.0, 3.0]]).log().nan_to_num(neginf=0.0).requires_grad_()
    loss = token_loss(hidden, nn.Identity(), torch.tensor([1]), 0.2, [])
    quarter, three_quarters = torch.tensor(0.25).log(), torch.tensor(0.75).log()
    torch.testing.assert_close(loss, -(0.9 * three_quarters + 0.1 * quarter))
    torch.testing.assert_close(gradients(loss, hidden)[0], torch.tensor([[0.25 - 0.1, 0.75 - 0.9]]))


def test_bf16_is_close_to_fp32_of_the_same_numbers() -> None:
    hidden, target = example(400)
    output = layer().bfloat16()
    short = hidden.bfloat16().requires_grad_()
    loss = token_loss(short, output, target, 0.1, list(output.parameters()), chunk=50 * VOCAB)
    exact = layer()
    exact.load_state_dict(output.state_dict())
    long = short.detach().float().requires_grad_()
    expected = plain(long, exact, target, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    ours = gradients(loss, short, *output.parameters())
    assert [g.dtype for g in ours] == [torch.bfloat16] * 3
    for a, b in zip(ours, gradients(expected, long, *exact.parameters()), strict=True):
        assert torch.linalg.norm(a.float() - b) < 0.01 * torch.linalg.norm(b)


def test_sums_over_chunks_are_kept_in_fp32() -> None:
    # 4,096 equal addends of 1/4: a bf16 sum would stop growing long before their total.
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    output = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(output.weight)
    loss = token_loss(hidden, output, torch.zeros(4096, dtype=torch.int64), 0.0, [output.weight], chunk=1)
    assert gradients(loss, output.weight)[0].float().tolist() == [[-2048.0], [2048.0]]


def test_weighted_micro_batches_add_up_to_the_gradient_of_one_batch() -> None:
    hidden, target = example(40)
    whole, parts = layer(), layer()
    token_loss(hidden, whole, target, 0.1, list(whole.parameters()), weight=1 / 40).backward()
    losses = []
    for rows in (slice(0, 3), slice(3, 30), slice(30, 40)):  # of unequal size on purpose
        loss = token_loss(hidden[rows], parts, target[rows], 0.1, list(parts.parameters()), weight=1 / 40)
        loss.backward()
        losses.append(float(loss.detach()))
    expected = F.cross_entropy(whole(hidden), target, label_smoothing=0.1)
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_a_scaled_loss_has_scaled_gradients() -> None:
    hidden, target = example()
    output = layer()
    single = gradients(token_loss(hidden, output, target, 0.1, list(output.parameters())), output.weight)[0]
    tripled = gradients(3 * token_loss(hidden, output, target, 0.1, list(output.parameters())), output.weight)[0]
    torch.testing.assert_close(tripled, 3 * single)


def test_any_output_layer_and_unused_parameters() -> None:
    class Capped(nn.Module):
        """Its tanh keeps the logits for its own backward, which an in-place loss would destroy."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.output, self.unused = nn.Linear(DIM, 7), nn.Linear(7, VOCAB), nn.Linear(3, 3)
            self.frozen = nn.Parameter(torch.full((VOCAB,), 0.5), requires_grad=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.tanh(self.output(F.gelu(self.inner(hidden))) + self.frozen)

    torch.manual_seed(3)
    output = Capped()
    hidden, target = example()
    token_loss(hidden, output, target, 0.1, list(output.parameters()), chunk=10 * VOCAB).backward()
    ours = {name: p.grad for name, p in output.named_parameters()}
    output.zero_grad()
    plain(hidden, output, target, 0.1).backward()
    assert ours["unused.weight"] is None
    assert ours["frozen"] is None
    for name in ("inner.weight", "inner.bias", "output.weight", "output.bias"):
        torch.testing.assert_close(ours[name], output.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_a_tied_embedding_gets_both_its_gradients() -> None:
    torch.manual_seed(4)
    embedding = nn.Embedding(VOCAB, DIM)
    ids, target = torch.randint(VOCAB, (20,)), torch.randint(VOCAB, (20,))

    def output(hidden: Tensor) -> Tensor:
        return F.linear(hidden, embedding.weight)

    token_loss(embedding(ids).tanh(), output, target, 0.1, list(embedding.parameters())).backward()
    ours = embedding.weight.grad
    embedding.zero_grad()
    F.cross_entropy(output(embedding(ids).tanh()), target, label_smoothing=0.1, reduction="sum").backward()
    torch.testing.assert_close(ours, embedding.weight.grad, rtol=1e-5, atol=1e-6)


def test_log_probabilities_are_those_of_a_softmax(monkeypatch) -> None:
    hidden, target = example()
    output = layer()
    calls = []

    def counted(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return output(rows)

    monkeypatch.setattr(loss_module, "chunk_of", lambda _device: 10 * VOCAB)
    found = log_probs(hidden, counted, target)
    assert not found.requires_grad
    assert max(calls) == 10
    expected = output(hidden).log_softmax(1).gather(1, target[:, None]).squeeze(1).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    target = torch.tensor([1, 1])
    loss = token_loss(hidden, nn.Identity(), target, 0.1, [])
    expected = F.cross_entropy(hidden, target, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden)[0], gradients(expected, hidden)[0])


def test_no_rows_have_no_loss_and_no_gradient() -> None:
    hidden = torch.zeros(0, DIM, requires_grad=True)
    output = layer()
    loss = token_loss(hidden, output, torch.zeros(0, dtype=torch.int64), 0.1, list(output.parameters()))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None


def test_real_rows_leave_padding_out() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    rows, labels = real_rows(hidden, torch.tensor([[5, 6, 0], [7, 0, 0]]))
    assert rows.tolist() == [[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]
    assert labels.tolist() == [5, 6, 7]
