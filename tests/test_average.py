"""Means of weights: the moving average of a run, the average of its checkpoints, and `encdec average`."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from encdec_cli.atomic import verify
from encdec_cli.bundle.checkpoint import step_name
from tests.conftest import copy_task, log_lines
from tests.trainers import ignore, trainer

SHORT = ("train.steps=16", "train.save_every=4", "train.precision=fp32", "train.validate_every=2", "train.metric=chrf")


@pytest.fixture(scope="module")
def run(forks, corpus, tmp_path_factory):
    """A run that has kept its three best models."""
    folder = tmp_path_factory.mktemp("run") / "run"
    kept = ("train.average=3", "train.average_of=best", "train.rate=3e-2")
    done = forks("train", corpus, *SHORT, *kept, "--output", folder)
    assert done.wait() == 0, done.stderr
    return folder


def weights(bundle):
    return load_file(bundle / "model.safetensors")


def test_the_best_models_are_averaged(run):
    scores = {line["step"]: line["chrF2"] for line in log_lines(run, "valid")}
    best = sorted(sorted(scores, key=lambda step: (scores[step], step))[-3:])
    assert best != sorted(scores)[-3:], "this run shows nothing"
    assert log_lines(run, "average")[0]["of"] == best
    assert {step_name(step) for step in best} <= {path.name for path in (run / "bundles").iterdir()}


def test_the_command_writes_a_mean_that_translates(forks, run, tmp_path):
    parts = sorted((run / "bundles").glob("step_*"))
    done = forks("average", *parts, "--output", tmp_path / "mean")
    assert done.wait() == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'mean'}\n"
    verify(tmp_path / "mean")
    tensors = [weights(part) for part in parts]
    for name, mean in weights(tmp_path / "mean").items():
        expected = sum(each[name].double() for each in tensors) / len(parts)
        assert (mean - expected).abs().max() < 1e-7
    facts = json.loads((tmp_path / "mean" / "bundle.json").read_text())["facts"]
    assert facts["averaged"] == [str(part) for part in parts]
    assert facts["scores"] == {}
    out = forks("generate", "--model", tmp_path / "mean", stdin="1 2\n")
    assert out.wait() == 0, out.stderr
    assert out.stdout.count("\n") == 1


@pytest.mark.parametrize("metric", ["chrf", "ter"])  # more is better, less is better
def test_the_last_and_the_best_models_of_a_run(forks, corpus, tmp_path, metric):
    run, parts = tmp_path / "run", tmp_path / "run" / "bundles"
    kept = ("train.average=8", f"train.metric={metric}", "train.rate=3e-2")
    done = forks("train", corpus, *SHORT, *kept, "--output", run)
    assert done.wait() == 0, done.stderr
    name = {"chrf": "chrF2", "ter": "TER"}[metric]
    scores = {line["step"]: line[name] for line in log_lines(run, "valid")}
    sign = -1 if metric == "ter" else 1
    order = sorted(scores, key=lambda step: (sign * scores[step], step))
    best = sorted(order[-3:])
    for flag, steps in (("--best", best), ("--last", [12, 14, 16])):
        assert forks("average", run, flag, "3", "--output", tmp_path / flag).wait() == 0
        assert forks("average", *(parts / step_name(s) for s in steps), "--output", tmp_path / "mean").wait() == 0
        assert (tmp_path / flag / "model.safetensors").read_bytes() == (
            tmp_path / "mean/model.safetensors"
        ).read_bytes()
    (parts / "step_00000016.tmp-1").mkdir()  # of a save that was killed
    many = forks("average", run, "--last", "9", "--output", tmp_path / "no")
    assert many.wait() == 2
    assert "has 8 such models, not 9; one of each validation is kept" in many.stderr


def test_the_mean_of_one_model_with_itself_is_that_model(forks, run, tmp_path):
    done = forks("average", run, run / "bundle", "--output", tmp_path / "mean")
    assert done.wait() == 0, done.stderr
    assert (tmp_path / "mean" / "model.safetensors").read_bytes() == (run / "bundle/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [("model.heads=4", "model.heads is not that of"), ("text.vocabulary=9", "source vocabulary is not that of")],
)
def test_models_that_do_not_fit_are_refused(forks, corpus, run, tmp_path, change, words):
    other = forks("train", corpus, *SHORT, "train.steps=2", change, "--output", tmp_path / "other")
    assert other.wait() == 0, other.stderr
    done = forks("average", run, tmp_path / "other", "--output", tmp_path / "mean")
    assert done.wait() == 5
    assert str(tmp_path / "other") in done.stderr
    assert words in done.stderr
    assert not (tmp_path / "mean").exists()


def test_what_the_command_refuses(forks, run, tmp_path):
    for words, code in (
        ((run, "--output", tmp_path / "mean"), 2),
        ((run, run, "--output", run / "data"), 2),
        ((run, run, "--output", run / "bundle"), 2),
        ((run, run, "--output", (run / "bundle").resolve()), 2),
        ((run, tmp_path / "no", "--output", tmp_path / "mean"), 5),
        ((run, run, "--last", "2", "--output", tmp_path / "mean"), 2),
        ((run, "--last", "2", "--best", "2", "--output", tmp_path / "mean"), 2),
        ((run, "--last", "1", "--output", tmp_path / "mean"), 2),
        ((tmp_path / "no", "--best", "2", "--output", tmp_path / "mean"), 5),
    ):
        done = forks("average", *words)
        assert done.wait() == code, done.stderr
        assert "Traceback" not in done.stderr
    verify(run / "data")


def test_with_ema_the_average_is_validated_and_kept(forks, corpus, tmp_path):
    run = tmp_path / "run"
    done = forks("train", corpus, *SHORT, "train.ema=0.7", "train.average=2", "--output", run)
    assert done.wait() == 0, done.stderr
    last = run / "bundles" / step_name(16)
    state = load_file(run / "checkpoints" / step_name(16) / "state.safetensors")
    for name, weight in weights(last).items():
        assert weight.equal(state[f"ema.{name}"])
        assert not weight.equal(state[f"master.{name}"])
    # What was validated is what is kept: with a rate of next to nothing its loss is found again.
    still = ("train.steps=1", "train.rate=1e-12", "train.warmup=0")
    found = forks("train", corpus, *SHORT, *still, "--init-from", last, "--output", tmp_path / "found")
    assert found.wait() == 0, found.stderr
    losses = {line["step"]: line["loss"] for line in log_lines(run, "valid")}
    assert log_lines(tmp_path / "found", "valid")[0]["loss"] == pytest.approx(losses[16], abs=1e-5)


def test_of_models_with_equal_scores_the_newest_is_kept_and_patience_runs_out(tmp_path):
    small = ("train.steps=6", "train.validate_every=2", "train.rate=1e-6", "train.metric=exact", "train.patience=2")
    made = trainer(copy_task(tmp_path), tmp_path / "run", *small)
    made.run(ignore)
    assert (made.progress.best, made.progress.model, made.progress.stale) == (0.0, "step_00000006", 2)
    assert (tmp_path / "run" / "bundle").resolve().name == "step_00000006"
