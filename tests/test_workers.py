"""Worker processes, and outputs that do not depend on how lines are decoded."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding.beam import Beam
from encdec_cli.generation.lines import Generated, Options, _groups, _Line, generate
from encdec_cli.generation.search import Job
from encdec_cli.models.packed import pack
from encdec_cli.text.example import Example
from encdec_cli.training.machine import available_cores
from tests.conftest import encdec, environment, start

BY_WORKERS = pytest.mark.skipif(available_cores() < 2, reason="there are no more worker processes than cores")

HURT = r"""
import os, time
from dataclasses import dataclass
from encdec_cli.decoding.beam import Beam
from encdec_cli.errors import DataError
from encdec_cli.registry import strategies

@strategies.register("hurt")
@dataclass(kw_only=True)
class Hurt(Beam):
    how: str = "die"

    def __call__(self, stepper, limits, rules):
        if self.how == "die":
            os.kill(os.getpid(), 9)
        if self.how == "sleep":
            os.write(1, b"asleep\n")
            time.sleep(60)
        if self.how == "tell":
            raise DataError("line 3: not a text; write one.")
        raise ValueError("an odd thing")
"""
INPUT = "".join(f"{number % 10} {number // 10 % 10}\n" for number in range(100))


@pytest.fixture(scope="module")
def bundle(copy_run):
    loaded = Bundle.load(copy_run)
    pack(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def lines():
    random_ = random.Random(7)
    texts = [" ".join(random_.choice("0123456789") for _ in range(random_.randint(0, 12))) for _ in range(100)]
    return [Example(text) for text in texts]


def decoded(bundle, lines, **options):
    """What is written for each line, down to the last bit of every number."""
    settings = Options(bundle.recipe.decoding.config, n_best=2, **options)
    return [(result.example, result.candidates) for result in generate([bundle], [lines], settings)]


def test_workers_write_what_one_process_writes_in_the_same_order(bundle, lines):
    alone = decoded(bundle, lines, batch=16)
    for workers in (2, 5):
        found = decoded(bundle, lines, batch=16, workers=workers)
        assert [example for example, _ in found] == lines
        for (_, ours), (_, theirs) in zip(found, alone, strict=True):
            assert [one.text for one in ours] == [one.text for one in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one.token_scores == pytest.approx(other.token_scores, abs=1e-4)


@pytest.mark.parametrize(("workers", "sizes"), [(1, [200, 100]), (2, [64, 64, 64, 64, 44])])
def test_batches_are_as_large_as_asked_for_unless_workers_share_the_lines(bundle, workers, sizes):
    options = Options(Beam(beam=1), batch=200, workers=workers)
    lines = [_Line(place, Generated(Example("1"), []), Job([5])) for place in range(300)]
    assert [len(group) for group in _groups(lines, options)] == sizes


def test_workers_leave_the_garbage_of_the_caller_to_be_collected(bundle, lines):
    before = gc.get_freeze_count()
    decoded(bundle, lines[:8], batch=2, workers=2)
    assert gc.get_freeze_count() == before


def test_exact_outputs_depend_on_nothing_but_the_line(bundle, lines):
    expected = decoded(bundle, lines, exact=True)
    threads = torch.get_num_threads()
    try:
        for batch, workers, count in ((1, 1, 2), (7, 1, 1), (64, 2, 2)):
            torch.set_num_threads(count)
            assert decoded(bundle, lines[::-1], exact=True, batch=batch, workers=workers) == expected[::-1]
            assert torch.get_num_threads() == count, "the caller's setting stays"
        assert decoded(bundle, lines[40:43], exact=True) == expected[40:43]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_thousand_lines_in_twelve_batchings_are_the_same_to_the_bit(bundle):
    random_ = random.Random(11)
    texts = [" ".join(random_.choice("0123456789") for _ in range(random_.randint(1, 20))) for _ in range(1000)]
    many = [Example(text) for text in texts]
    expected = dict(zip(texts, (candidates for _, candidates in decoded(bundle, many, exact=True)), strict=True))
    threads = torch.get_num_threads()
    try:
        for batch, workers in product((1, 5, 64, 1000), (1, 2, 3)):
            torch.set_num_threads(workers)
            random_.shuffle(many)
            for example, candidates in decoded(bundle, many, exact=True, batch=batch, workers=workers):
                assert candidates == expected[example.source]
    finally:
        torch.set_num_threads(threads)


def test_the_command_writes_the_same_with_any_number_of_workers(copy_run):
    outputs = {
        encdec("generate", "--model", copy_run, "--batch", "8", "--exact", "--workers", count, stdin=INPUT).stdout
        for count in ("1", "3")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == 100


@pytest.fixture
def hurt(tmp_path, copy_run):
    (tmp_path / "hurt.py").write_text(HURT)
    (tmp_path / "in.txt").write_text(INPUT)
    words = ("--model", copy_run, "--plugin", tmp_path / "hurt.py", "--batch", "8", "--workers", "2")
    return (*words, tmp_path / "in.txt")


@BY_WORKERS
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("die", 6, "a worker process has ended (exit code -9), perhaps for lack of memory"),
        ("raise", 1, "in a worker process: ValueError: an odd thing"),
        ("tell", 4, "encdec: error: line 3: not a text; write one."),
    ],
)
def test_a_worker_that_dies_or_fails_is_told_of(hurt, how, code, words):
    done = encdec("generate", *hurt, "--strategy", f"hurt,how={how}", timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@BY_WORKERS
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_workers_end_with_the_command(hurt, number, code):
    process = start("generate", *hurt, "--strategy", "hurt,how=sleep", start_new_session=True)
    try:
        assert process.stdout.readline() == b"asleep\n"
        workers = children_of(process.pid)
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert gone(workers)
    finally:
        process.kill()
        process.communicate()


def test_head_ends_the_workers_quietly(copy_run):
    generating = f"{sys.executable} -m encdec_cli generate in.txt --model {copy_run} --workers 2"
    command = f"yes '1 2 3' | head -n 100000 > in.txt; {generating} | head -n 3"
    done = subprocess.run(
        ["bash", "-c", command], cwd=copy_run.parent, env=environment(), capture_output=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == (b"1 2 3\n" * 3, b"")


def test_workers_are_for_a_cpu(copy_run):
    done = encdec("generate", "--model", copy_run, "--workers", "2", "--device", "meta", stdin="1\n")
    assert done.returncode == 2
    assert "--workers 2: only a CPU is shared by processes; leave it out" in done.stderr
