"""Guided alignment: words' links become tokens' links, and a head of attention learns them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encdec_cli import recipe
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.prepare import Prepared, prepare
from encdec_cli.decoding.attention import Head, layers
from encdec_cli.errors import DataError, UsageError
from encdec_cli.models.transformer import Transformer
from encdec_cli.recipe import Guide
from encdec_cli.training.guide import GuidedAttention, Links, chosen_head
from encdec_cli.training.objective import make_objective
from tests.conftest import write_lines

PAIRS = [("ab c", "x yz"), ("c", "x"), ("ab", "yz"), ("ab c", "yz x")] * 3


def prepared(folder: Path, pairs: list[tuple[str, str]] = PAIRS, **text: object) -> tuple[Bundle, Prepared]:
    for name, lines in zip(("train.a", "train.b"), zip(*pairs, strict=True), strict=True):
        write_lines(folder / name, lines)
    sections = {
        "task": {"name": "translation"},
        "data": {"name": "files", "root": str(folder), "train": {"source": "train.a", "target": "train.b"}},
        "text": {"tokenizer": "character", "vocabulary": 20, **text},
    }
    settings = recipe.from_resolved(sections)
    task, corpus = settings.task.config, settings.data.config
    data = prepare(task, corpus, settings.text, "x", folder / "data", lambda _: None, lambda _: None)
    torch.manual_seed(1)
    size = len(data.source.vocabulary)
    network = Transformer(Transformer.Config(1, 2, 16, 2, 32, dropout=0.0), size, size)
    return Bundle(settings, network, data.source, data.target), data


def first(bundle: Bundle, data: Prepared) -> Batch:
    return collate(*data.store("train").gather([0, 1]), [0, 1])


def test_links_of_words_become_those_of_their_tokens(tmp_path):
    bundle, data = prepared(tmp_path)
    write_lines(tmp_path / "links", ["0-1 1-0", "", *["0-0"] * 10])
    found = Links(bundle, data, str(tmp_path / "links"))(first(bundle, data))
    # "x yz" from "ab c": a space belongs to the word before it, and EOS to none.
    expected = torch.zeros(2, 5, 5)
    expected[0, :2, 3] = 1.0
    expected[0, 2:4, :3] = 1 / 3
    torch.testing.assert_close(found, expected)


def test_model_1_finds_the_links_of_a_toy(tmp_path):
    bundle, data = prepared(tmp_path)
    found = Links(bundle, data, "")(first(bundle, data))
    assert found[0, 0].argmax() == 3  # x comes from c
    assert found[0, 2, :2].tolist() == found[0, 3, :2].tolist()
    assert (found[0, 2, :3] > 0.3).all()  # yz from ab and its space
    assert found[1, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0-0"] * 11, r"links: 11 lines for 12 training examples"),
        (["0-0", "0-0 0:1", *["0-0"] * 10], r"links:2: expected links such as 0-0 1-2, found '0-0 0:1'"),
        (["0-0", "1-0", *["0-0"] * 10], r"links:2: a link beyond the 1 and 1 words"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path, lines, message):
    bundle, data = prepared(tmp_path)
    write_lines(tmp_path / "links", lines)
    with pytest.raises(DataError, match=message):
        Links(bundle, data, str(tmp_path / "links"))


def test_lines_are_only_trusted_where_every_example_was_kept(tmp_path):
    bundle, data = prepared(tmp_path, [*PAIRS, ("ab", ""), ("c" * 30, "x")], max_source=9)
    write_lines(tmp_path / "links", ["0-0"] * 14)
    with pytest.raises(DataError, match=r"1 of 13 were left out or cut"):
        Links(bundle, data, str(tmp_path / "links"))


def test_the_loss_is_the_cross_entropy_of_the_head(tmp_path):
    bundle, data = prepared(tmp_path)
    batch, network = first(bundle, data), bundle.model
    batch.links = Links(bundle, data, "")(batch)
    weights = list(layers(network, batch.source, batch.source_mask, batch.known_target))
    for head in (Head(0, 1), Head(1, 0)):
        expected = -sum(
            batch.links[row, t, s] * weights[head.layer][row, head.head, t, s].log()
            for row, t, s in batch.links.nonzero().tolist()
        )
        loss = GuidedAttention(head)(network, batch, list(network.parameters()), 0.5)
        torch.testing.assert_close(loss, 0.5 * expected)


def test_heads_that_are_not_there_are_refused(tmp_path):
    bundle, _ = prepared(tmp_path)
    assert chosen_head(bundle.model, Guide(layer=-2, head=1)) == Head(0, 1)
    with pytest.raises(UsageError, match=r"guide\.layer: 2, but the decoder layers are 0 to 1"):
        chosen_head(bundle.model, Guide(layer=2))
    with pytest.raises(UsageError, match=r"guide\.head: 2, but the heads of layer 1 are 0 to 1"):
        chosen_head(bundle.model, Guide(head=2))


def test_the_head_learns_where_words_come_from(tmp_path):
    bundle, data = prepared(tmp_path)
    bundle.recipe.guide = Guide(weight=0.5, layer=0, head=1)
    batch, network = first(bundle, data), bundle.model
    batch.links = Links(bundle, data, "")(batch)
    objective = make_objective(bundle, data.store("train"), "cpu", torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective(network, batch, list(network.parameters()), 0.1).backward()
        optimizer.step()
    weights = next(iter(layers(network, batch.source, batch.source_mask, batch.known_target)))[:, 1]
    linked = batch.links.sum(-1) > 0
    assert (weights[linked] - batch.links[linked]).abs().max() < 0.1
