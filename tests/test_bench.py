"""`encdec bench`: what it tells, and how it weighs quality against speed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from encdec_cli.cli.bench import _tables
from encdec_cli.evaluation.tradeoff import Point, best_at_least, fastest_within, on_front
from encdec_cli.training import ceiling
from tests.conftest import copy_task
from tests.test_resume import lines_of

FRONT = [(100, 30.0, True), (200, 10.0, True), (90, 5.0, False)]


def point(speed: float, score: float) -> Point:
    return Point("fp32", 1, 0, 1, speed, score)


def test_the_fastest_that_is_good_enough():
    points = [point(100, 30.0), point(80, 37.5), point(60, 38.0), point(50, 37.9), point(200, 10.0)]
    assert fastest_within(points, 1.0, True) == points[1]
    assert fastest_within(points, 0.4, True) == points[2]
    assert fastest_within(points, 8.0, True) == points[0]
    assert fastest_within(points, 1.0, False) == points[4]
    assert best_at_least(points, 60, True) == points[2]
    assert best_at_least(points, 70, True) == points[1]
    assert best_at_least(points, 60, False) == points[4]
    assert best_at_least(points, 201, True) is None
    assert [on_front(one, points, True) for one in points] == [True, True, True, False, True]
    assert [on_front(one, points, False) for one in points] == [False, False, False, False, True]


def test_a_model_is_tried_in_every_setting(forks, copy_run):
    done = forks("bench", "--model", copy_run, "--beams", "1,2", "--batches", "4", "--lines", "6", "--json")
    assert done.wait() == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["machine"]["cores"] >= 1
    assert all(value > 0 for key, value in told["machine"].items() if key.endswith(("gflops", "second")))
    settings = told["generation"]["settings"]
    assert {(one["beam"], one["batch"]) for one in settings} == {(1, 4), (2, 4)}
    assert all(one["lines_per_second"] > 0 and one["score"] > 50 for one in settings)
    chosen = told["generation"]["recommended"]
    assert chosen in [{key: one[key] for key in chosen} for one in settings]
    done = forks("bench", "--model", copy_run, "--beams", "1", "--batches", "4", "--lines", "6", "--at-least", "1e9")
    assert done.wait() == 0, done.stderr
    assert "recommended: the fastest, since none decodes 1e+09 lines/s" in done.stdout


def test_a_recipe_is_timed_and_its_run_left_as_it_was(forks, copy_run):
    recipe = copy_run.parent / "corpus" / "recipe.yaml"
    keys = ("train.steps=500", "train.tokens=512", "train.rate=5e-3", "model.dropout=0.0", "model.d_model=64")
    keys += ("train.validate_every=100", "train.save_every=100", "model.positions=sinusoidal", "train.log_every=1")
    before = {path: path.stat().st_mtime_ns for path in copy_run.rglob("*") if path.name != "lock"}
    lines = lines_of(copy_run / "log.jsonl")
    few = ("--beams", "1,2", "--batches", "4", "--lines", "6")
    done = forks("bench", recipe, *keys, *few, "--seconds", "0", "--output", copy_run)
    assert done.wait() == 0, done.stderr
    machine, training, generation, *drawn = done.stdout.split("\n\n")
    assert "fp32_gflops" in machine
    assert "recommended: within 1 of the best" in generation
    assert all("by lines/s, of the settings marked *" in chart for chart in drawn)
    rows = dict(line.split(maxsplit=1) for line in training.split("\n") if line)
    assert float(rows["tokens_per_second"].replace(",", "")) > 0
    assert 0 < float(rows["mfu"]) < 1.5
    assert lines_of(copy_run / "log.jsonl") == lines
    assert {path: path.stat().st_mtime_ns for path in copy_run.rglob("*") if path.name != "lock"} == before


def test_a_recipe_without_a_model_says_so(forks, tmp_path):
    recipe = copy_task(tmp_path / "corpus")
    done = forks("bench", recipe, "--seconds", "0", "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert f"{tmp_path / 'run'}: no model yet" in done.stderr
    assert "lines/s" not in done.stdout


def test_what_was_measured_is_told_although_the_model_cannot_be(forks, copy_run, tmp_path):
    recipe = copy_task(tmp_path / "corpus")
    (tmp_path / "run").mkdir()
    shutil.copytree(copy_run / "bundle", tmp_path / "run" / "bundle")
    (tmp_path / "run" / "bundle" / "model.safetensors").write_bytes(b"damaged")
    done = forks("bench", recipe, "--seconds", "0", "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert "the speed of generation is not measured: " in done.stderr
    assert "tokens_per_second" in done.stdout
    named = forks("bench", "--model", tmp_path / "run")
    assert named.wait() == 5


def test_the_front_is_drawn():
    settings = [asdict(point(speed, score)) | {"front": front} for speed, score, front in FRONT]
    told = {"metric": "bleu", "settings": settings, "recommended": asdict(point(*FRONT[0][:2])), "why": "it is"}
    table, drawn = _tables({"generation": told})
    assert "* recommended: it is" in table
    assert drawn.split("\n")[0] == "bleu by lines/s, of the settings marked *"
    assert "30 │" in drawn  # the best of the front
    assert "10 │" in drawn  # and its fastest
    assert drawn.endswith("└ 100 … 200")


def test_the_ceiling_is_that_of_a_quiet_moment(monkeypatch):
    """Other work takes the machine by turns: most products are slow, some are not, whenever they come."""
    now = [0.0]
    durations = [9.0, *[0.06] * 15, 0.002, *[0.06] * 400]
    taken = iter(durations)
    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: now[0])

    def product():
        now[0] += next(taken)

    assert ceiling._best(product, torch.device("cpu"), 0.2) == pytest.approx(0.06)  # ended by the first, far too slow
    now[0], taken = 0.0, iter(durations[1:])
    assert ceiling._best(product, torch.device("cpu"), 0.2) == pytest.approx(0.002)
    assert next(taken) == 0.06  # and an end is found


@pytest.mark.parametrize("words", [("--beams", "0"), ("--beams", "1;5"), ("--batches", "-1"), ("--batches", "")])
def test_numbers_that_are_none(forks, words):
    done = forks("bench", *words)
    assert done.wait() == 2
    assert words[0] in done.stderr
    assert done.stdout == ""
