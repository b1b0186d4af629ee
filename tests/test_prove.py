"""`encdec train --prove-resume`: it kills, it compares, and it finds what differs."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from encdec_cli.training.prove import compare
from tests.conftest import copy_task, encdec, environment, log_lines, start
from tests.trainers import ignore, trainer

SMALL = ("model.d_model=16", "model.feed_forward=16", "train.tokens=128")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    words = (*SMALL, "train.steps=4", "train.validate_every=2", "train.log_every=1")
    trainer(copy_task(folder / "corpus"), folder / "run", *words).run(ignore)
    return folder / "run"


@pytest.fixture
def twins(finished, tmp_path) -> tuple[Path, Path]:
    """A finished run and a copy of it."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return finished, tmp_path / "copy"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(run: Path, **fields: object) -> None:
    lines = log_lines(run)
    lines[1] |= fields
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_runs_have_no_difference_whatever_the_clock_says(twins):
    rewrite(twins[1], clock={"seconds": 77})
    assert list(compare(*twins)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda run: flip(run / "checkpoints" / "step_00000004" / "state.safetensors"),
            "checkpoints/step_00000004/state.safetensors differs",
        ),
        (lambda run: flip(run / "bundle" / "model.safetensors"), "bundle/model.safetensors differs"),
        (lambda run: (run / "bundle" / "bundle.json").unlink(), "bundle/bundle.json differs"),
        (lambda run: rewrite(run, order="0"), "log.jsonl: update 2: order differ"),
        (lambda run: os.truncate(run / "log.jsonl", 0), "the log has 0 lines, not 6"),
    ],
    ids=["state", "model", "gone", "order", "log"],
)
def test_a_difference_is_named(twins, change, found):
    change(twins[1])
    assert list(compare(*twins)) == [found]


@pytest.mark.slow
def test_the_proof(recipe, tmp_path):
    done = encdec("train", recipe, *SMALL, "--prove-resume", "1", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("exact: 1 kills -9 in 1 run(s) of 21 updates, ")
    assert "kill 1 of 1: " in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("encdec-prove-*"))


CHANCE = """\
import torch
from encdec_cli.models.transformer import Transformer
from encdec_cli.registry import models


@models.register("chance")
class Chance(Transformer):
    def encode(self, source, mask):
        memory = super().encode(source, mask)
        memory.states = memory.states + 1e-3 * torch.randn(memory.states.shape, generator=self.generator())
        return memory

    def generator(self):
        generator = torch.Generator()
        generator.seed()
        return generator
"""


@pytest.mark.slow
def test_a_model_that_is_not_exact_is_found_out(recipe, tmp_path):
    (tmp_path / "chance.py").write_text(CHANCE)
    chance = tmp_path / "chance.py"
    words = (
        "train",
        recipe,
        *SMALL,
        "model.name=chance",
        "train.precision=fp32",
        "--plugin",
        chance,
        "--prove-resume",
        "1",
    )
    done = encdec(*words, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "state.safetensors differs" in done.stderr
    assert list(tmp_path.glob("encdec-prove-*"))


def test_several_processes_are_refused(recipe):
    done = encdec("train", recipe, "--prove-resume", "2", WORLD_SIZE="2", RANK="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--prove-resume: proves runs of one process" in done.stderr


def test_a_signal_ends_the_process_that_trains_too(recipe, tmp_path):
    with start("train", recipe, "--prove-resume", "2", env=environment(TMPDIR=str(tmp_path))) as process:
        while not list(tmp_path.glob("encdec-prove-*/unbroken/lock")):
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 143
    assert list(tmp_path.glob("encdec-prove-*")) == []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert str(tmp_path).encode() not in path.read_bytes()
