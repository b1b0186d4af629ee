"""What training makes small, against the textbook's formulas on whole logits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli import atomic, recipe
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, before, collate
from encdec_cli.data.shard import Side
from encdec_cli.data.store import Store, write_shards
from encdec_cli.decoding.attention import Head
from encdec_cli.models.dropout import drawing
from encdec_cli.models.model import Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.tokenizer import Character
from encdec_cli.text.vocabulary import BOS, EOS, PAD
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.guide import GuidedAttention
from encdec_cli.training.loss import CrossEntropy as TokenLoss
from encdec_cli.training.loss import chunked_loss
from encdec_cli.training.objective import Agreement, CrossEntropy, Mixture, Objective, RDrop, make_objective
from encdec_cli.training.risk import ExpectedRisk, Judge, Judged

VOCAB = 12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(vocab: int = VOCAB, **changes) -> Transformer:
    torch.manual_seed(1)
    return Transformer(Transformer.Config(1, 2, 16, 2, 32, **({"dropout": 0.2} | changes)), vocab, vocab).train()


def batch() -> Batch:
    sources = [[4, 5, 6], [7], [8, 9, 4, 5, 11], [6, 6]]
    return collate(sources, [ids[::-1] for ids in sources], range(4))


def log_probs(network: Model, source: Tensor, target: Tensor) -> Tensor:
    """[rows, tgt_len - 1, vocab]"""
    hidden = network(source, source != PAD, before(target))
    return network.project(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1).log_softmax(-1)


def computed(objective: Objective, network: Model, data: Batch, weight: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    parameters = list(network.parameters())
    with drawing(3):
        loss = objective(network, data, parameters, weight)
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def assert_same(ours: tuple[Tensor, list[Tensor]], loss: Tensor, network: nn.Module) -> None:
    torch.testing.assert_close(ours[0], loss.detach(), rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(loss, list(network.parameters()))
    for a, b in zip(ours[1], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("prior", [None, torch.arange(VOCAB) / sum(range(VOCAB))])
def test_rdrop_is_the_papers_loss_halved(prior):
    network, data, alpha = model(), batch(), 3.0
    ours = computed(RDrop(0.1, prior, alpha), network, data, 0.5)
    with drawing(3):  # the same dropout: the same batch of twice the rows
        both = log_probs(network, data.source.repeat_interleave(2, 0), data.known_target.repeat_interleave(2, 0))
    real = data.known_target[:, 1:] != PAD
    p, q = both[0::2][real], both[1::2][real]
    labels = data.known_target[:, 1:][real]
    spread = torch.full((VOCAB,), 1 / VOCAB) if prior is None else prior
    nll = sum(0.9 * F.nll_loss(x, labels, reduction="sum") - 0.1 * (x * spread).sum() for x in (p, q))
    kl = F.kl_div(p, q, reduction="sum", log_target=True) + F.kl_div(q, p, reduction="sum", log_target=True)
    assert kl.item() > 0.01
    assert_same(ours, 0.5 * (nll + alpha * kl / 2) / 2, network)


@pytest.mark.parametrize("chunk", [1, 10 * VOCAB, 10**9])
def test_rdrop_does_not_depend_on_chunks(chunk):
    torch.manual_seed(2)
    hidden, output, labels = (
        torch.randn(26, 16, requires_grad=True),
        nn.Linear(16, VOCAB),
        torch.randint(1, VOCAB, (26,)),
    )
    criterion = Agreement(TokenLoss(labels, 0.1), 2.0)
    loss = chunked_loss(hidden, output, criterion, list(output.parameters()), chunk=chunk)
    whole, gradient = criterion(output(hidden).detach(), slice(0, 26), 1.0)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient @ output.weight.detach())


def test_rdrop_of_equal_passes_is_cross_entropy():
    network, data = model(dropout=0.0), batch()
    loss, gradients = computed(RDrop(0.1, None, 5.0), network, data)
    plain, others = computed(CrossEntropy(0.1), network, data)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_smoothing_toward_the_unigrams_of_the_training_targets(tmp_path):
    sides = (Side(VOCAB, "a"), Side(VOCAB, "b"))
    with atomic.new_folder(tmp_path / "data") as folder:
        write_shards(folder, "train", [([4], [4, 4, 5]), ([5], [6]), ([6], [4])], sides, shard_size=2)
    bundle = small_bundle("", 1)
    bundle.recipe.regularize.smoothing_prior = "unigram"
    objective = make_objective(bundle, Store.open(tmp_path / "data", "train"), "cpu", torch.float32)
    prior = torch.tensor([0, 0, 0, 3, 3, 1, 1, 0, 0, 0, 0, 0]) / 8  # three ends, three of token 4
    network, data = model(dropout=0.0), batch()
    real = data.known_target[:, 1:] != PAD
    scores, labels = log_probs(network, data.source, data.known_target)[real], data.known_target[:, 1:][real]
    expected = 0.9 * F.nll_loss(scores, labels, reduction="sum") - 0.1 * (scores @ prior).sum()
    assert_same(computed(objective, network, data), expected, network)


def test_hidden_target_words_are_read_as_unknown_and_still_predicted():
    network, data = model(dropout=0.0), batch()
    data.seen = torch.where(data.known_target == 5, 1, data.known_target)
    real = data.known_target[:, 1:] != PAD
    scores, labels = log_probs(network, data.source, data.seen)[real], data.known_target[:, 1:][real]
    assert_same(computed(CrossEntropy(0.0), network, data), F.nll_loss(scores, labels, reduction="sum"), network)


def every_output(sources: list[list[int]], tokens: list[int], longest: int) -> Judged:
    """A batch whose candidates are all outputs up to a length; what they cost is drawn by chance."""
    outputs = [one for length in range(1, longest + 1) for one in product(tokens, repeat=length)]
    rows = torch.full((len(outputs), longest + 2), PAD)
    for row, output in enumerate(outputs):
        rows[row, : len(output) + 2] = torch.tensor([BOS, *output, EOS])
    data = collate(sources, [[5], [4, 5]], range(2))
    costs = torch.rand(2, len(outputs), generator=torch.Generator().manual_seed(4))
    return Judged(**vars(data), candidates=rows.expand(2, -1, -1), costs=costs)


@pytest.mark.parametrize("longest", [1, 3])  # 2 candidates share one store of keys and values, 14 do not
@pytest.mark.parametrize("sharpness", [0.3, 1.0])
def test_expected_risk_by_brute_force(longest, sharpness):
    network, data = model(vocab=6, dropout=0.0), every_output([[4, 5, 4], [5]], [4, 5], longest)
    ours = computed(ExpectedRisk(sharpness), network, data, 0.25)
    total = torch.zeros(())
    for sentence, (source, tokens) in enumerate(zip(([4, 5, 4, EOS], [5, EOS]), (2, 3), strict=True)):
        chances, costs = [], []
        for output, cost in zip(data.candidates[sentence], data.costs[sentence], strict=True):
            known = output[output != PAD][None]
            scores = log_probs(network, torch.tensor([source]), known)[0].gather(1, known[0, 1:, None])
            chances.append(scores.sum().exp() ** sharpness)
            costs.append(cost)
        chance = torch.stack(chances)
        total = total + tokens * (chance / chance.sum() * torch.stack(costs)).sum()
    assert_same(ours, 0.25 * total, network)


def test_absent_candidates_change_nothing():
    network, data = model(vocab=6, dropout=0.0), every_output([[4, 5, 4], [5]], [4, 5], 2)
    loss, gradients = computed(ExpectedRisk(0.5), network, data)
    nothing = torch.tensor([BOS, PAD, PAD, PAD]).expand(2, 3, 4)
    data.candidates = torch.cat((data.candidates, nothing), 1)
    data.costs = torch.cat((data.costs, torch.zeros(2, 3)), 1)
    longer, others = computed(ExpectedRisk(0.5), network, data)
    torch.testing.assert_close(loss, longer)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_mixture_is_a_weighted_sum():
    network, data = model(vocab=6), every_output([[4, 5, 4], [5]], [4, 5], 1)
    with drawing(3):
        first = CrossEntropy(0.1)(network, data, list(network.parameters()), 0.5)
        second = ExpectedRisk(1.0)(network, data, list(network.parameters()), 0.5)
    mixed = Mixture([(0.75, CrossEntropy(0.1)), (0.25, ExpectedRisk(1.0))])
    assert_same(computed(mixed, network, data, 0.5), 0.75 * first + 0.25 * second, network)


def test_the_loss_of_a_batch_is_that_of_its_parts():
    network, data = model(vocab=6, dropout=0.0), every_output([[4, 5, 4], [5]], [4, 5], 2)
    data.seen = torch.where(data.known_target == 5, 1, data.known_target)
    data.links = torch.rand(2, data.known_target.shape[1] - 1, data.source.shape[1]) * data.source_mask[:, None]
    data.links *= (data.known_target[:, 1:] != PAD)[:, :, None]
    parts: list[tuple[float, Objective]] = [(1.0, CrossEntropy(0.1)), (1.0, GuidedAttention(Head(1, 0)))]
    objective = Mixture([*parts, (1.0, ExpectedRisk(0.5))])
    whole, halves = (
        [computed(objective, network, one)[0] for one in some] for some in ([data], [data.take(0, 1), data.take(1, 2)])
    )
    torch.testing.assert_close(whole[0], sum(halves))
    assert data.take(1, 2).source.shape == (1, 2)


def small_bundle(metric: str, samples: int) -> Bundle:
    """An untrained model of letters."""
    tokenizer = Character.train(["abcdefgh"], TokenizerOptions(20))
    sections = {"task": {"name": "translation"}, "data": {"name": "cldr"}, "text": {"tokenizer": "character"}}
    settings = recipe.from_resolved(sections | {"risk": {"metric": metric, "samples": samples}})
    settings.decoding.config.max_length = 4
    return Bundle(settings, model(len(tokenizer.vocabulary), dropout=0.1), tokenizer, tokenizer)


def letters(bundle: Bundle, pairs: list[tuple[str, str]]) -> Batch:
    sources, targets = zip(*((bundle.source.encode(a), bundle.target.encode(b)) for a, b in pairs), strict=True)
    return collate(sources, targets, range(len(pairs)))


PAIRS = [("ab", "b"), ("cd", "da"), ("ef", "fff"), ("a", "c")]


def test_outputs_are_drawn_by_the_seed_and_judged_by_the_metric():
    bundle = small_bundle("f1", 6)
    data, judge = letters(bundle, PAIRS), Judge(bundle, bundle.recipe.risk)
    judged, again, other = judge(data, 1), judge(data, 1), judge(data, 2)
    assert torch.equal(judged.candidates, again.candidates)
    assert not (judged.candidates.shape == other.candidates.shape and torch.equal(judged.candidates, other.candidates))
    for row, (_, reference) in enumerate(PAIRS):
        some = [ids[ids != PAD].tolist() for ids in judged.candidates[row]]
        texts = [bundle.target.decode(ids) for ids in some]
        assert texts[0] == reference
        real = [tuple(ids) for ids in some if len(ids) > 1]
        assert len(set(real)) == len(real) > 3
        assert all(len(ids) <= 2 + 4 for ids in real)
        for ids, text, cost in zip(some, texts, judged.costs[row].tolist(), strict=True):
            assert cost == (0.0 if len(ids) == 1 or text == reference else 1.0)  # one word: F1 is all or nothing


def test_less_risk_is_learned():
    bundle = small_bundle("chrf,char_order=2", 8)
    network, data, judge = bundle.model, letters(bundle, PAIRS), Judge(bundle, bundle.recipe.risk)

    def mean_cost(seed: int) -> float:
        judged = judge(data, seed)
        drawn = judged.candidates[:, 1:, 1] != PAD
        return float(judged.costs[:, 1:][drawn].mean())

    before = np.mean([mean_cost(seed) for seed in range(1000, 1005)])
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, 6e-3)
    gradients = Gradients(network, parameters, ExpectedRisk(1.0), 1)
    for update in range(40):
        judged = judge(data, update)
        ((_, found),) = gradients.of([judged], 1 / int(data.target_lengths.sum()), update)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
    gradients.close()
    after = np.mean([mean_cost(seed) for seed in range(1000, 1005)])
    assert after < before - 0.2
