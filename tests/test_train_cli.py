"""`encdec train` and `encdec preprocess` in a shell: flags, what is refused before any work, and how it looks."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import termios
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from encdec_cli.atomic import verify
from encdec_cli.cli import console, progress
from tests.conftest import copy_task, encdec, write_lines
from tests.test_resume import fingerprint

SHORT = ("train.steps=10", "train.validate_every=5", "train.save_every=5", "train.precision=fp32", "train.log_every=2")


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory):
    """A recipe, and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = copy_task(folder / "corpus")
    done = forks("train", recipe, *SHORT, "--output", folder / "run")
    assert done.wait() == 0, done.stderr
    return recipe, folder / "run"


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(command, code, *words):
    """Assert that a command has ended with a code and one sentence that holds the words."""
    assert command.wait() == code, command.stderr
    assert "Traceback" not in command.stderr
    said = command.stderr.rstrip("\n").split("\n")[-1]
    assert said.startswith("encdec: error: "), command.stderr
    for word in words:
        assert word in said
    assert command.stdout == ""


def test_a_dry_run_prepares_and_tries_but_trains_nothing(forks, recipe, tmp_path):
    run = tmp_path / "run"
    done = forks("train", recipe, *SHORT, "--dry-run", "--output", run)
    assert done.wait() == 0, done.stderr
    assert done.stdout == ""
    assert "dry run: the recipe is good" in done.stderr
    assert "parameters" in done.stderr
    assert sorted(path.name for path in run.iterdir()) == ["data", "lock"]
    verify(run / "data")


def test_preprocess_does_the_data_part_and_train_uses_it(forks, finished, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "run"
    first = forks("preprocess", recipe, "--output", run)
    assert first.wait() == 0, first.stderr
    assert "preparing data" in first.stderr
    times = {path: path.stat().st_mtime_ns for path in (run / "data").iterdir()}
    again = forks("preprocess", recipe, "--output", run)
    assert again.wait() == 0
    assert "nothing to do" in again.stderr
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "preparing data" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (run / "data").iterdir()} == times
    assert fingerprint(run)["files"] == fingerprint(unbroken)["files"]


def test_preprocess_does_not_look_at_how_to_train(forks, recipe, tmp_path):
    done = forks("preprocess", recipe, "train.steps=often", "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert forks("train", recipe, "train.steps=often", "--output", tmp_path / "run").wait() == 2


def test_what_explain_prints_is_a_recipe(forks, tmp_path):
    pytest.importorskip("babel", reason="the explained recipe shows the corpus that needs babel")
    shown = forks("train", "--explain")
    assert shown.wait() == 0
    assert shown.stderr == ""
    (tmp_path / "explained.yaml").write_text(shown.stdout)
    tiny = ("text.tokenizer=word", "data.pairs=500", "data.valid=50", "data.test=50", "decoding.max_length=4")
    tiny += ("model.d_model=16", "model.heads=2", "model.encoder_layers=1", "model.decoder_layers=1")
    done = forks("train", tmp_path / "explained.yaml", *tiny, "--dry-run", "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert "the recipe is good" in done.stderr


def test_init_from_starts_with_given_weights(forks, finished, tmp_path):
    recipe, run = finished
    # A rate of next to nothing leaves the weights where they were, so the first loss is the model's own.
    still = (*SHORT, "train.rate=1e-12", "train.steps=1", "train.validate_every=1", "model.dropout=0.0")
    told = forks("train", recipe, *still, "--init-from", run, "--output", tmp_path / "told")
    assert told.wait() == 0, told.stderr
    anew = forks("train", recipe, *still, "--output", tmp_path / "anew")
    assert anew.wait() == 0, anew.stderr
    losses = [float(re.search(r"update 1: loss ([\d.]+)", command.stderr)[1]) for command in (told, anew)]
    given = [
        float(loss) for loss in re.findall(r'"event": "valid".*?"loss": ([\d.]+)', (run / "log.jsonl").read_text())
    ]
    assert any(losses[0] == pytest.approx(loss, abs=2e-3) for loss in given)
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.d_model=16"], ["model.d_model is 16, was 32"]),
        (["model.encoder_layers=2"], ["model.encoder_layers is 2, was 1"]),
        (["model.activation=gelu", "text.vocabulary=9"], ["model.activation is 'gelu', was 'relu'"]),
        (["model.heads=4"], ["model.heads is 4, was 2"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(forks, finished, tmp_path, changes, words):
    recipe, run = finished
    done = forks("train", recipe, *SHORT, *changes, "--init-from", run, "--output", tmp_path / "other")
    refused(done, 5, "--init-from", *words)
    assert not (tmp_path / "other").exists()  # before any data was read


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(forks, finished, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    refused(forks("train", recipe, *SHORT, "--output", run), 5, "no checkpoint to go on from", "bundles")
    assert {path: path.read_bytes() for path in before} == before


def test_init_from_nowhere(forks, recipe, tmp_path):
    refused(forks("train", recipe, "--init-from", tmp_path / "no", "--output", tmp_path / "run"), 5, "no such model")


def test_an_unknown_metric_costs_no_time(forks, recipe, tmp_path):
    done = forks("train", recipe, "train.metric=blue", "--output", tmp_path / "run")
    refused(done, 2, "train.metric", "blue", "did you mean 'bleu'?")
    assert not (tmp_path / "run").exists()


def test_a_metric_that_cannot_be_used_costs_no_time(forks, recipe, tmp_path):
    offline = {"SACREBLEU": str(tmp_path / "sacrebleu"), "https_proxy": "http://127.0.0.1:9"}
    words = ("train", recipe, "train.metric=bleu,tokenize=flores200", "--output", tmp_path / "run")
    refused(forks(*words, **offline), 6, "flores200sacrebleuspm", "put https://")
    assert not (tmp_path / "run").exists()


def test_without_validation_the_last_model_is_kept(forks, recipe, tmp_path):
    run = tmp_path / "run"
    text = re.sub(r"\n  valid: .*", "", recipe.read_text())
    recipe.write_text(text)
    refused(forks("train", recipe, *SHORT, "--output", run), 4, "no validation example", "train.validate_every=0")
    done = forks("train", recipe, *SHORT, "train.validate_every=0", "--output", run)
    assert done.wait() == 0, done.stderr
    assert (run / "bundle").readlink().name == "step_00000010"
    verify(run / "bundle")
    again = forks("train", recipe, *SHORT, "train.validate_every=0", "--output", run)
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize(
    ("policy", "code", "words"), [("skip", 0, "left out"), ("truncate", 0, "cut"), ("stop", 4, "max_source")]
)
def test_examples_that_are_too_long(forks, recipe, tmp_path, policy, code, words):
    done = forks("preprocess", recipe, "text.max_source=4", f"text.too_long={policy}", "--output", tmp_path / "run")
    assert done.wait() == code, done.stderr
    assert words in done.stderr


def test_no_example_that_fits(forks, recipe, tmp_path):
    write_lines(recipe.parent / "train.src", ["1 2 3 4 5 6"] * 600)
    refused(forks("train", recipe, "text.max_source=3", "--output", tmp_path / "run"), 4, "none of the 600")
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_nothing_behind(forks, recipe, tmp_path):
    run = tmp_path / "not" / "yet"
    for command in ("train", "preprocess"):
        refused(forks(command, recipe, "data.train.source=gone", "--output", run), 4, "gone", "No such file")
        assert not (tmp_path / "not").exists()
    run.mkdir(parents=True)
    refused(forks("train", recipe, "data.train.source=gone", "--output", run), 4)
    assert tree(tmp_path / "not") == ["yet", "yet/lock"]  # it was there before


def test_training_data_from_a_pipe_are_those_of_the_file(recipe, tmp_path):
    piped = encdec(
        *("preprocess", recipe, "data.train.source=-", "--output", tmp_path / "piped"),
        stdin=(recipe.parent / "train.src").read_bytes(),
    )
    assert piped.returncode == 0, piped.stderr
    assert encdec("preprocess", recipe, "--output", tmp_path / "read").returncode == 0
    ours, theirs = (tmp_path / name / "data" / "train-00000.safetensors" for name in ("piped", "read"))
    assert ours.read_bytes() == theirs.read_bytes()
    again = encdec("preprocess", recipe, "data.train.source=-", "--output", tmp_path / "piped")
    assert "nothing to do" in again.stderr


def test_stdin_cannot_be_two_files(forks, recipe, tmp_path):
    done = forks("train", recipe, "data.train.source=-", "data.valid.source=-", "--output", tmp_path / "run")
    refused(done, 2, "data.valid", "stdin ('-') can be one file alone")


def test_early_stopping_is_an_end(forks, recipe, tmp_path):
    run = tmp_path / "run"
    stops = ("train.steps=1000", "train.patience=1", "train.validate_every=2", "train.rate=1e-9")
    first = forks("train", recipe, *SHORT, *stops, "--output", run)
    assert first.wait() == 0, first.stderr
    assert re.search(r"stopped early, at update \d+: 1 validation\(s\) without a better exact", first.stderr)
    before = fingerprint(run)
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    again = forks("train", recipe, *SHORT, *stops, "--output", run)
    assert again.wait() == 0
    assert "nothing to do" in again.stderr
    assert "raise train.patience to go on" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"} == times
    more = forks("train", recipe, *SHORT, *stops, "train.patience=2", "--output", run)
    assert more.wait() == 0
    assert "going on from update" in more.stderr
    assert fingerprint(run) != before


class Terminal:
    """A terminal of 100 columns; what is written to it is read until `text` is asked for."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def name(self) -> str:
        return os.ttyname(self.slave)

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # the last writer is gone
                return
            self._bytes += part

    def so_far(self) -> str:
        return self._bytes.decode(errors="replace")

    def text(self) -> str:
        os.close(self.slave)
        self._reader.join(timeout=10)
        os.close(self.master)
        return self._bytes.decode()


def test_progress_is_a_bar_on_a_terminal_and_plain_lines_in_a_file(forks, recipe, tmp_path):
    # Data first, so that both trainings say the same.
    for name in ("file", "terminal", "plain", "dumb"):
        assert forks("preprocess", recipe, "--output", tmp_path / name).wait() == 0
    slow = (*SHORT, "train.steps=40", "train.validate_every=10", "train.valid_lines=5", "train.save_every=40")
    to_file = forks("train", recipe, *slow, "--output", tmp_path / "file")
    assert to_file.wait() == 0, to_file.stderr
    assert to_file.stdout == ""
    assert "\r" not in to_file.stderr
    assert "\x1b" not in to_file.stderr
    assert "update 10: loss" in to_file.stderr
    seen = {}
    for name, changes in (("terminal", {}), ("plain", {"NO_COLOR": "1"}), ("dumb", {"TERM": "dumb"})):
        terminal = Terminal()
        settings = {"TERM": "xterm-256color"} | changes
        done = forks("train", recipe, *slow, "--output", tmp_path / name, tty=terminal.name, **settings)
        seen[name] = terminal.text()
        assert done.code() == 0, seen[name]
        assert done.stdout == ""
        assert "update 10: loss" in seen[name]
    bar = seen["terminal"]
    assert "training" in bar
    assert re.search(r"loss \d+\.\d{3}  [\d,]+ tokens/s  best \d", bar)
    assert re.search(r"\d:\d\d:\d\d|-:--:--", bar)
    assert re.search(r"\d+/40", bar)
    colour = r"\x1b\[[\d;]*[1-9][\d;]*m"
    assert re.search(colour, bar)
    assert not re.search(r"\x1b\[(3|4|9|10)\d(;[\d;]*)?m", seen["plain"])
    assert "tokens/s" in seen["plain"]
    assert "\x1b" not in seen["dumb"]
    assert {name: fingerprint(tmp_path / name)["files"] for name in seen} == {
        name: fingerprint(tmp_path / "file")["files"] for name in seen
    }


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "loss 2.000  1,000 tokens/s"),
        (120, "loss 2.000  1,000 tokens/s  38% of ceiling  0.1% padding  12.00 to pay"),
    ],
)
def test_a_terminal_shows_as_much_of_the_cost_as_it_has_room_for(monkeypatch, columns, shown):
    notes = []

    class Bar:
        def update(self, _done, note=""):
            notes.append(note)

    monkeypatch.setattr(console, "interactive", lambda: True)
    monkeypatch.setattr(console, "columns", lambda: columns)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=partial(next, iter([0.0, 1.0]))))
    cost = ["38% of ceiling", "0.1% padding", "12.00 to pay"]
    progress.TrainingProgress(Bar(), 10, 0, lambda: cost).progress(1, 2.0, 1000, None)
    assert notes == [shown]


def test_where_there_is_no_terminal_every_line_tells_the_cost(monkeypatch, capsys):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=partial(next, iter([0.0, 31.0]))))
    shown = progress.TrainingProgress(console._Quiet(), 11, 0, lambda: ["38% of ceiling", "12.00 to pay"])
    shown.progress(1, 2.0, 3100, 0.5)
    told = "update 1 of 11  loss 2.000  100 tokens/s  best 0.5  5 min left  38% of ceiling  12.00 to pay"
    assert told in capsys.readouterr().err


def test_a_copied_run_is_a_run(forks, finished, tmp_path):
    """Nothing in the folder depends on where it lies: the link is relative, the data is found."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "moved", symlinks=True)
    done = forks("generate", "--model", tmp_path / "moved", stdin="1 2\n")
    assert done.wait() == 0, done.stderr
    assert done.stdout.count("\n") == 1
    again = forks("train", recipe, *SHORT, "--output", tmp_path / "moved")
    assert again.wait() == 0
    assert "nothing to do" in again.stderr
