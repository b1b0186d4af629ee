"""What a model is given to learn from: the examples, and noise that follows from seed, update and example alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from encdec_cli import atomic, recipe
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch
from encdec_cli.data.prepared import Prepared, tokenizer_sides
from encdec_cli.data.store import Store, write_shards
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.vocabulary import BOS, EOS, PAD, UNK
from encdec_cli.training.data import prepared_data
from encdec_cli.training.feed import Feed
from encdec_cli.training.signals import Stop
from encdec_cli.training.trainer import Setting, Trainer
from tests.conftest import copy_task
from tests.test_resampling import some_lines
from tests.trainers import trainer

LINES = some_lines(200)
LONGEST = 32


@pytest.fixture(scope="module")
def tokenizer() -> SentencePiece:
    return SentencePiece.train(LINES, TokenizerOptions(350, "unigram"))


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory) -> Store:
    ids = [tokenizer.encode(line) for line in LINES]
    with atomic.new_folder(tmp_path_factory.mktemp("data") / "data") as folder:
        write_shards(folder, "train", zip(ids, ids[::-1], strict=True), tokenizer_sides(tokenizer, tokenizer))
    return Store.open(folder.parent / "data", "train")


@pytest.fixture
def feed(tokenizer, store):
    def make(**noise) -> Feed:
        text = {"max_source": LONGEST, "max_target": LONGEST}
        sections = {"task": {"name": "translation"}, "data": {"name": "cldr"}, "text": text, "regularize": noise}
        network = Transformer(Transformer.Config(1, 1, 8, 2, 8), len(tokenizer.vocabulary), len(tokenizer.vocabulary))
        data = Prepared(Path(), {}, tokenizer, tokenizer, {"train": store})
        return Feed(Bundle(recipe.from_resolved(sections), network, tokenizer, tokenizer), data, "cpu")

    return make


EVERY = np.arange(len(LINES))
SUBWORDS = {"subword_sampling": 0.2}
HIDDEN = {"word_dropout_source": 0.2, "word_dropout_target": 0.4}


def texts(tokenizer: SentencePiece, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row[row != PAD].tolist()) for row in ids]


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Source, and target as it is read, without padding."""
    read = batch.known_target if batch.seen is None else batch.seen
    return [(a[a != PAD].tolist(), b[b != PAD].tolist()) for a, b in zip(batch.source, read, strict=True)]


def test_other_subwords_spell_the_same_lines(tokenizer, feed):
    plain, noisy = feed()(EVERY, 1), feed(**SUBWORDS)(EVERY, 1)
    assert texts(tokenizer, noisy.source) == LINES
    assert texts(tokenizer, noisy.known_target) == LINES[::-1]
    assert rows_of(plain) != rows_of(noisy)
    assert int(noisy.target_lengths.sum()) > int(plain.target_lengths.sum())
    assert int(noisy.target_lengths.max()) <= LONGEST
    assert noisy.source.shape[1] <= LONGEST
    assert (plain.source_mask.sum(1) > LONGEST - 4).any(), "no example is near the limit"


@pytest.mark.parametrize("noise", [SUBWORDS, HIDDEN, SUBWORDS | HIDDEN])
def test_noise_follows_from_seed_update_and_example_alone(feed, noise):
    whole = rows_of(feed(**noise)(EVERY, 7))
    some = np.array([150, 3, 77])
    assert rows_of(feed(**noise)(some, 7)) == [whole[row] for row in some]
    assert rows_of(feed(**noise)(EVERY, 8)) != whole
    other = feed(**noise)
    other._seed = 2
    assert rows_of(other(EVERY, 7)) != whole


def test_words_are_hidden_as_often_as_asked_and_stay_to_be_predicted(feed):
    plain, noisy = feed()(EVERY, 1), feed(**HIDDEN)(EVERY, 1)
    assert torch.equal(noisy.known_target, plain.known_target)
    followed = noisy.known_target[:, 1:] != PAD
    assert torch.equal(noisy.decoder_input, noisy.seen[:, :-1] * followed)
    for before, after, share in ((plain.source, noisy.source, 0.2), (plain.known_target, noisy.seen, 0.4)):
        hidden = before != after
        words = (before != PAD) & (before != BOS) & (before != EOS)
        assert (after[hidden] == UNK).all()
        assert not (hidden & ~words).any()
        assert hidden.sum() / words.sum() == pytest.approx(share, abs=0.04)


def test_hiding_words_begins_slowly(feed):
    slow = feed(**HIDDEN, word_dropout_warmup=10)
    numbers = [int((slow(EVERY, update).source == UNK).sum()) for update in (0, 2, 5, 10, 20)]
    assert numbers[0] == 0
    assert 0 < numbers[1] < numbers[2] < numbers[3]
    assert numbers[4] == pytest.approx(numbers[3], rel=0.2)
    assert rows_of(slow(EVERY, 10)) == rows_of(feed(**HIDDEN)(EVERY, 10))


def test_without_noise_nothing_is_changed(feed, store):
    batch = feed()(EVERY, 1)
    assert batch.seen is None
    assert (batch.target_lengths - 1).tolist() == store.target_lengths.tolist()


ALL_OF_IT = {
    "rdrop": 5.0, "smoothing_prior": "unigram", "word_dropout_source": 0.1, "word_dropout_target": 0.1,
    "word_dropout_warmup": 10, "subword_sampling": 0.3,
}  # fmt: skip


class Killed(Exception):
    pass


def test_a_run_with_all_of_it_that_is_killed_ends_with_the_same_bytes(tmp_path):
    path = copy_task(tmp_path / "corpus", train=200, held_out=10)
    settings = recipe.load(
        path,
        [
            *("text={tokenizer: sentencepiece, vocabulary: 300}", f"regularize={json.dumps(ALL_OF_IT)}"),
            *("guide.weight=0.1", "risk={metric: chrf, samples: 2, weight: 0.5}", "decoding.max_length=8"),
            *(
                "train.steps=12",
                "train.save_every=4",
                "train.validate_every=0",
                "train.tokens=128",
                "train.accumulate=2",
            ),
        ],
    )
    data, _ = prepared_data(settings, tmp_path, lambda _: None)

    def train(name: str, killed_after: int = 0) -> dict[str, object]:
        def show(update: int, *_: object) -> None:
            if update == killed_after:
                raise Killed

        Trainer(Setting(settings, data, tmp_path / name, "cpu", Stop(), lambda _: None)).run(show)
        return json.loads((tmp_path / name / "bundle" / atomic.MANIFEST).read_text())

    unbroken = train("unbroken")
    for update in (3, 6, 11):
        with pytest.raises(Killed):
            train("broken", update)
    assert train("broken") == unbroken


def test_what_was_read_ahead_is_what_is_read_when_asked_for(tmp_path):
    made = trainer(copy_task(tmp_path / "corpus"), tmp_path / "run", "regularize.word_dropout_source=0.3")
    rows, others = made.sampler.batch(0, 0), made.sampler.batch(0, 1)
    plain = made.feed(rows, 3)
    made.feed.expect(rows, 3)
    made.feed.expect(others, 4)
    ahead = made.feed(rows, 3)
    assert torch.equal(ahead.source, plain.source)
    assert not torch.equal(made.feed(rows, 4).source, plain.source)
    made.feed.close()
