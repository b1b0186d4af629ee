"""Batches: tokens, EOS, padding at the right; targets begin with BOS."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.shard import Side
from encdec_cli.data.store import Store, write_shards
from encdec_cli.text.vocabulary import BOS, EOS, PAD


def test_a_worked_case():
    batch = collate([[7, 8], [9], []], [[4], [], [5, 6]], [10, 30, 20])
    assert batch.source.tolist() == [[7, 8, EOS], [9, EOS, PAD], [EOS, PAD, PAD]]
    assert batch.target is not None
    assert batch.target.tolist() == [[BOS, 4, EOS, PAD], [BOS, EOS, PAD, PAD], [BOS, 5, 6, EOS]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert batch.rows == [10, 30, 20]
    assert batch.source.dtype == batch.target.dtype == torch.int64


def test_without_targets_and_without_rows():
    assert collate([np.array([5], dtype=np.uint16)], None, [0]).target is None
    assert collate([[]], None, [0]).source.tolist() == [[EOS]]
    assert collate([], None, []).source.shape[0] == 0


def test_to_a_device_and_back_is_the_same():
    batch = collate([[7, 8]], [[4]], [3]).to("cpu")
    assert isinstance(batch, Batch)
    assert batch.source.tolist() == [[7, 8, EOS]]
    assert collate([[7]], None, [3]).to("cpu").target is None


ids = st.lists(st.integers(4, 60_000), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.integers(1, 3))
def test_gathered_from_a_store_or_given_as_lists_is_the_same(tmp_path_factory, pairs, shard_size):
    folder = tmp_path_factory.mktemp("batch")
    write_shards(folder, "train", pairs, (Side(60_001, ""), Side(70_000, "")), shard_size)
    store, rows = Store.open(folder, "train"), np.arange(len(pairs))[::-1]
    mapped = collate(*store.gather(rows), rows.tolist())
    listed = collate([pairs[row][0] for row in rows], [pairs[row][1] for row in rows], rows.tolist())
    assert torch.equal(mapped.source, listed.source)
    assert mapped.target is not None
    assert listed.target is not None
    assert torch.equal(mapped.target, listed.target)
    assert mapped.rows == listed.rows == list(range(len(pairs)))[::-1]
    for row, (source, target) in zip(listed.rows, [pairs[row] for row in rows], strict=True):
        place = listed.rows.index(row)
        assert [token for token in mapped.source[place].tolist() if token != PAD] == [*source, EOS]
        assert [token for token in mapped.target[place].tolist() if token != PAD] == [BOS, *target, EOS]
