"""What TensorBoard reads of a run: the numbers of its log, each update once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from encdec_cli.training.log import Log
from encdec_cli.training.tensorboard import Board
from tests.conftest import log_lines


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads: name -> updates and values."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_run_that_goes_on_is_shown_from_its_log(forks, recipe, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    keys = ("train.tensorboard=true", "train.log_every=2", "train.validate_every=4")
    for steps in (4, 8):
        done = forks("train", recipe, *keys, f"train.steps={steps}", "--output", run)
        assert done.wait() == 0, done.stderr
    shown = scalars(run)
    for event, names in (("train", ("loss", "rate", "norm", "padding")), ("valid", ("loss", "exact"))):
        for name in names:
            logged = [(line["step"], line[name]) for line in log_lines(run, event)]
            assert len(logged) > 1
            assert shown[f"{event}/{name}"] == [(step, pytest.approx(value)) for step, value in logged]
    hours = [line["clock"]["spent"]["hours"] for line in log_lines(run, "train")]
    assert [value for _, value in shown["train/spent/hours"]] == pytest.approx(hours)


def test_what_a_kill_took_from_the_log_is_shown_once(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "log.jsonl"

    def write(log: Log, steps: range) -> None:
        for step in steps:
            value = float("nan") if step == 2 else step / 7
            fields = {"loss": value, "tokens": 7 * step, "order": "ab", "of": [1]}
            log.write(step, "train", fields, {"seconds": step, "mfu": None})

    write(Log(path, Board(path)), range(8))
    seen = tmp_path / "seen"
    shutil.copytree(tmp_path / "tensorboard", seen / "tensorboard")  # by a viewer that was there before the kill
    resumed = Log(path, Board(path))
    resumed.keep(5)
    write(resumed, range(5, 10))
    expected = [(step, pytest.approx(step / 7)) for step in range(10) if step != 2]
    shown = scalars(tmp_path)
    assert shown["train/loss"] == expected
    assert shown.keys() == {"train/loss", "train/tokens"}
    shutil.copytree(tmp_path / "tensorboard", seen / "tensorboard", dirs_exist_ok=True)
    assert scalars(seen)["train/loss"] == expected


def test_without_the_package_nothing_is_begun(forks, recipe, tmp_path):
    plugin = tmp_path / "absent.py"
    plugin.write_text('import sys\n\nsys.modules["tensorboard"] = None\n')
    done = forks("train", recipe, "train.tensorboard=true", "--plugin", plugin, "--output", tmp_path / "run")
    assert done.wait() == 2
    assert "train.tensorboard: needs pip install 'encdec-cli[tensorboard]'" in done.stderr
    assert not (tmp_path / "run").exists()
