"""The log of a run: its lines, and what a resumed run cuts off."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from encdec_cli.errors import ResourceError
from encdec_cli.training.log import CLOCK, Log


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != CLOCK} for line in read(path)]


def write_steps(writer: Log, steps: range) -> None:
    for step in steps:
        # The clock differs from run to run.
        writer.write(step, "train", {"loss": 1 / (step + 1)}, {"seconds": time.perf_counter()})


def test_one_object_a_line_readable_at_once_with_the_clock_last(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    writer = Log(path)
    writer.write(1, "train", {"loss": 0.5, "text": "two\nlines"}, {"tokens_per_second": 9.0})
    (line,) = path.read_text().splitlines()
    value = json.loads(line)
    assert list(value) == ["event", "step", "loss", "text", "clock"]
    assert value["text"] == "two\nlines"
    assert value["clock"] == {"tokens_per_second": 9.0}


def test_a_killed_and_resumed_log_equals_an_unbroken_one_but_for_the_clock(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken.jsonl", tmp_path / "killed.jsonl"
    write_steps(Log(unbroken), range(10))
    write_steps(Log(killed), range(7))
    with killed.open("ab") as file:  # killed in the middle of a line
        file.write(b'{"kind": "train", "st')
    resumed = Log(killed)
    resumed.keep(4)
    write_steps(resumed, range(4, 10))
    assert without_clock(killed) == without_clock(unbroken)
    assert [line["step"] for line in read(killed)] == list(range(10))


def test_kept_lines_stay_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_steps(Log(path), range(5))
    before = path.read_bytes().splitlines(keepends=True)
    Log(path).keep(3)
    assert path.read_bytes() == b"".join(before[:3])


def test_an_unfinished_line_is_cut_off_even_among_those_to_keep(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    Log(path).keep(2)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_lines_that_are_lost_or_damaged_are_told_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_steps(Log(path), range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", lines[3]]))
    said: list[str] = []
    assert Log(path).keep(4, said.append) == 3
    assert said == [f"note: {path}: of 4 lines 1 are lost and 1 damaged; the run goes on"]
    assert Log(path).keep(2, said.append) == 2
    assert Log(tmp_path / "none").keep(0, said.append) == 0
    assert len(said) == 2


def test_notes_stand_in_the_clock_of_the_next_line(tmp_path: Path) -> None:
    log, said = Log(tmp_path / "log.jsonl"), []
    log.noting(said.append)("note: a")
    for step in (1, 2):
        log.write(step, "train", {}, {"seconds": 1})
    assert said == ["note: a"]
    assert [line[CLOCK] for line in read(log.path)] == [{"seconds": 1, "notes": ["note: a"]}, {"seconds": 1}]


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_steps(Log(path), range(5))
    fresh = Log(path)
    fresh.keep(0)
    write_steps(fresh, range(2))
    assert [line["step"] for line in read(path)] == [0, 1]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Log(path).write(1, "valid", {"loss": math.inf, "scores": {"bleu": math.nan, "list": [-math.inf, 1.0]}}, {})
    (line,) = without_clock(path)
    assert (line["loss"], line["scores"]) == (None, {"bleu": None, "list": [None, 1.0]})


def test_a_folder_in_its_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        Log(tmp_path / "file" / "log.jsonl").write(1, "train", {}, {})


def test_sync_before_the_first_line_is_harmless(tmp_path: Path) -> None:
    writer = Log(tmp_path / "log.jsonl")
    writer.sync()
    writer.write(1, "train", {}, {})
    writer.sync()
    assert len(read(tmp_path / "log.jsonl")) == 1
