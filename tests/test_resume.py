"""A run that was killed, at any moment and any number of times, ends as one that never was."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from encdec_cli.atomic import MANIFEST
from tests.conftest import copy_task, encdec, log_lines, start

TIMEOUT = 120


def fingerprint(run: Path) -> dict[str, object]:
    """Everything a run leaves that must not depend on interruptions; a signal's checkpoint may be one more."""
    files = {}
    for folder in (run / "data", run / "bundle", max((run / "checkpoints").iterdir())):
        files[folder.name] = json.loads((folder / MANIFEST).read_text())
    return {"files": files, "log": [{k: v for k, v in line.items() if k != "clock"} for line in log_lines(run)]}


IN_TURN = ("train.average=2",)
SIDE_BY_SIDE = ("train.threads=2", "train.accumulate=2", "train.tokens=128", "train.optimizer=muon", "train.ema=0.9")


def trained(folder: Path, overrides: tuple[str, ...]) -> tuple[Path, dict[str, object]]:
    recipe = copy_task(folder / "corpus")
    done = encdec("train", recipe, *overrides, "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return recipe, fingerprint(folder / "run")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("unbroken"), IN_TURN)


@pytest.fixture(scope="module")
def unbroken_side_by_side(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("side"), SIDE_BY_SIDE)


def wait_for(condition, process) -> bool:
    """Wait until the condition holds; False if the process ended before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("fixture", "overrides", "seed"),
    [("unbroken", IN_TURN, 0), ("unbroken", IN_TURN, 1), ("unbroken_side_by_side", SIDE_BY_SIDE, 2)],
)
def test_killed_at_any_moment_and_started_again(request, tmp_path, fixture, overrides, seed):
    recipe, expected = request.getfixturevalue(fixture)
    run, generator = tmp_path / "run", random.Random(seed)
    kills = 0
    while True:
        before = lines_of(run / "log.jsonl")
        process = start("train", recipe, *overrides, "--output", run, stdin=-3)
        wanted = before + generator.randint(1, 4)
        # Half of the first starts die while the data is prepared, or before anything is there.
        early = kills == 0 and generator.random() < 0.5
        if wait_for(lambda early=early, w=wanted: early or lines_of(run / "log.jsonl") >= w, process):
            time.sleep(generator.random() * (2.0 if early else 0.15))
            process.kill()
            kills += 1
        _, errors = process.communicate(timeout=TIMEOUT)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 1
    assert fingerprint(run) == expected
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name or path.name.endswith(".old")]


@pytest.mark.parametrize(
    ("fixture", "overrides", "number", "code"),
    [
        ("unbroken", IN_TURN, signal.SIGTERM, 143),
        ("unbroken", IN_TURN, signal.SIGINT, 130),
        ("unbroken_side_by_side", SIDE_BY_SIDE, signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_leaves(request, tmp_path, fixture, overrides, number, code):
    recipe, expected = request.getfixturevalue(fixture)
    run = tmp_path / "run"
    process = start("train", recipe, *overrides, "train.save_every=1000", "--output", run, stdin=-3)
    assert wait_for(lambda: lines_of(run / "log.jsonl") >= 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    assert list((run / "checkpoints").iterdir()), "nothing was saved"
    done = encdec("train", recipe, *overrides, "--output", run)
    assert done.returncode == 0, done.stderr
    found = fingerprint(run)
    assert found["log"] == expected["log"]
    assert (
        found["files"]["bundle"]["files"]["model.safetensors"]
        == expected["files"]["bundle"]["files"]["model.safetensors"]
    )


def test_a_finished_run_has_nothing_to_do_and_touches_no_file(copy_run):
    from tests.conftest import encdec

    recipe = copy_run.parent / "corpus" / "recipe.yaml"
    before = {path: path.stat().st_mtime_ns for path in copy_run.rglob("*") if path.name != "lock"}
    overrides = ["train.steps=500", "train.tokens=512", "train.rate=5e-3", "train.validate_every=100"]
    overrides += ["train.save_every=100", "train.schedule=cosine", "train.label_smoothing=0.0"]
    overrides += ["model.dropout=0.0", "model.d_model=64", "model.positions=sinusoidal"]
    done = encdec("train", recipe, "--output", copy_run, *overrides)
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert done.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in copy_run.rglob("*") if path.name != "lock"} == before


def test_what_must_not_change_is_refused_by_name(copy_run):
    recipe = copy_run.parent / "corpus" / "recipe.yaml"
    done = encdec("train", recipe, "--output", copy_run, "train.steps=600", "train.tokens=512", "train.seed=7")
    assert done.returncode == 2
    assert "train.seed was 1, is 7" in done.stderr
    assert "--output" in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(unbroken, tmp_path):
    recipe, _ = unbroken
    run = tmp_path / "run"
    first = encdec("train", recipe, "train.average=2", "train.steps=30", "train.keep=2", "--output", run)
    assert first.returncode == 0, first.stderr
    newest = sorted((run / "checkpoints").iterdir())[-1]
    weights = newest / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    second = encdec("train", recipe, "train.average=2", "train.steps=30", "train.keep=2", "--output", run)
    assert second.returncode == 0, second.stderr
    assert f"{newest.name} is passed over" in second.stderr
    assert "SHA-256" in second.stderr


def test_two_runs_in_one_folder(recipe, tmp_path):
    run = tmp_path / "run"
    first = start("train", recipe, "train.steps=100000", "--output", run, stdin=-3)
    try:
        assert wait_for(lambda: lines_of(run / "log.jsonl") >= 1, first)
        second = encdec("train", recipe, "--output", run)
        assert second.returncode == 6
        assert f"process {first.pid} on" in second.stderr
    finally:
        first.kill()
        first.communicate()
    # The lock of a dead process holds nobody up.
    third = encdec("train", recipe, "train.steps=10", "--output", run)
    assert third.returncode in (0, 2), third.stderr
