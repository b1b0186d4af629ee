"""Pieces of micro-batches that processes compute together: the same gradient, and as many pieces in every process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from encdec_cli.data.batch import Batch, collate
from encdec_cli.errors import ResourceError
from encdec_cli.models.transformer import Transformer
from encdec_cli.training.collective import CollectiveGradients
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.objective import CrossEntropy
from encdec_cli.training.room import Room, positions_of_a_row

BATCHES = [collate([[5] * 4, [6] * 7, [7] * 2, [8] * 9, [9] * 3], [[9] * 3] * 5, range(5)), collate([[4]], [[5]], [7])]


class Greedier(Ranks):
    """A process whose peer needs more pieces."""

    def most(self, what: str, values: list[float]) -> list[float]:
        return [value + 2 for value in values]


def room(folder: Path, most: int, ranks: Ranks | None = None) -> Room:
    (folder / "room-0.json").write_text(f'{{"most_positions": {most}}}')
    return Room(folder, ranks or Ranks(), str)


def rows_of(pieces: list[Batch | None]) -> list[list[int]]:
    return [piece.rows if piece else [] for piece in pieces]


def gradients(room: Room, ranks: Ranks) -> list[tuple[float, list]]:
    torch.manual_seed(1)
    model = Transformer(Transformer.Config(2, 2, 32, 4, 64, dropout=0.0), 30, 30)
    own = CollectiveGradients(model, lambda work: work(), list(model.parameters()), CrossEntropy(0.1), ranks, room)
    return list(own.of(BATCHES, 0.01, 3))


def test_a_batch_is_cut_into_no_more_pieces_than_it_needs(tmp_path):
    row = positions_of_a_row(BATCHES[0])
    assert row == 10 + 4
    cases = ((5 * row, [5]), (5 * row - 1, [2, 3]), (3 * row - 1, [1, 2, 2]), (row, [1] * 5), (1, [1] * 5))
    for most, expected in cases:
        pieces, alone = room(tmp_path, most).cut(BATCHES)
        assert [len(piece.rows) for piece in pieces if piece] == expected
        assert list(chain(*rows_of(pieces))) == BATCHES[0].rows
        assert rows_of(alone) == [[7]]


def test_who_needs_fewer_pieces_than_another_has_some_without_rows(tmp_path):
    pieces, alone = room(tmp_path, 1000, Greedier()).cut(BATCHES)
    assert rows_of(pieces) == [[0], [1, 2], [3, 4]]
    assert rows_of(alone) == [[], [], [7]]


@pytest.mark.parametrize("ranks", [Ranks(), Greedier()])
def test_pieces_have_the_gradient_of_the_whole(tmp_path, ranks):
    whole = gradients(Room(tmp_path, ranks, str), ranks)
    for (loss, parts), (other, pieces) in zip(whole, gradients(room(tmp_path, 30, ranks), ranks), strict=True):
        assert other == pytest.approx(loss, rel=1e-6)
        for one, two in zip(parts, pieces, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)


def test_every_failure_leaves_less_room_until_one_example_alone_is_named(tmp_path):
    batch, found = BATCHES[0], []
    for _ in range(9):
        own = Room(tmp_path, Ranks(), str)
        with pytest.raises(ResourceError, match="out of memory for ") as caught, own.watched(own.cut([batch])[0][-1]):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        found.append(str(caught.value))
        if "training example 5 alone" in found[-1]:
            break
        assert Room(tmp_path, Ranks(), str).most < (own.most or 5 * positions_of_a_row(batch))
    assert len(found) == 3  # of five rows, of two, and of one alone


def test_of_several_notes_the_smallest_counts(tmp_path):
    for rank, most in enumerate((40, 30, 50)):
        (tmp_path / f"room-{rank}.json").write_text(f'{{"most_positions": {most}}}')
    said: list[str] = []
    assert Room(tmp_path, Ranks(), said.append).most == 30
    assert "at most 30 positions" in said[0]


def test_what_lacks_is_told_even_where_nothing_can_be_noted(tmp_path):
    own = Room(tmp_path / "file", Ranks(), str)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="out of memory for 5 examples"), own.watched(BATCHES[0]):
        raise MemoryError


def test_other_errors_leave_no_note(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), Room(tmp_path, Ranks(), str).watched(BATCHES[0]):
        raise RuntimeError("shapes do not match")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"most_positions": "x"}', '{"most_positions": -3}', "\0\0"])
def test_a_damaged_note_is_as_none(tmp_path, content):
    (tmp_path / "room-3.json").write_text(content)
    assert Room(tmp_path, Ranks(), str).most == 0
