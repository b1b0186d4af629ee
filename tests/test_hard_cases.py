"""What goes wrong around training: inputs, disks, folders, signals, damage. One sentence, the documented code,

and what was good is still good. Each test ends by showing that the same command then does its work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encdec_cli import atomic
from encdec_cli.atomic import MANIFEST, verify
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.run import locked
from encdec_cli.errors import BundleError, ResourceError
from tests.conftest import copy_task, environment, start, write_lines
from tests.forked import TIMEOUT, Command
from tests.reliability.bench import Bench
from tests.reliability.folders import unusable_folders
from tests.test_resume import fingerprint, lines_of
from tests.test_train_cli import SHORT, refused
from tests.trainers import ignore, trainer

# A corpus and a search that wait until they are told to go on, and a disk that kills at the n-th step of a save.
PLUGIN = '''\
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from encdec_cli.corpora.files import Files
from encdec_cli.decoding.beam import Beam
from encdec_cli.registry import corpora, strategies


def pause(what):
    """Show that `what` is under way, and wait as long as the file beside stands."""
    folder = Path(os.environ["PAUSE"]) if "PAUSE" in os.environ else None
    if folder and (folder / f"hold-{what}").exists():
        (folder / f"in-{what}").touch()
        while (folder / f"hold-{what}").exists():
            time.sleep(0.01)


@corpora.register("paused")
@dataclass
class Paused(Files):
    def read(self, split):
        for number, example in enumerate(Files.read(self, split)):
            if number == 100:
                pause(split)
            yield example


@strategies.register("paused")
@dataclass
class PausedBeam(Beam):
    def __call__(self, stepper, limits, rules):
        if self.min_length != self.max_length:  # as it is only where memory is predicted
            pause("search")
        return Beam.__call__(self, stepper, limits, rules)


def die_at(number):
    seen = [0]

    def counted(function):
        def call(*arguments, **options):
            seen[0] += 1
            if "COUNT" in os.environ:
                Path(os.environ["COUNT"]).write_text(str(seen[0]))
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("rename", "unlink", "symlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))


if "DIE_AT" in os.environ:
    die_at(int(os.environ["DIE_AT"]))
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "hard.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory) -> tuple[Path, Path]:
    """A recipe, and the folder of its finished run of 10 updates."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = copy_task(folder / "corpus")
    done = forks("train", recipe, *SHORT, "--output", folder / "run")
    assert done.wait() == 0, done.stderr
    return recipe, folder / "run"


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    """A recipe, and a copy of its finished run."""
    shutil.copytree(finished[1], tmp_path / "run", symlinks=True)
    return finished[0], tmp_path / "run"


def until(condition, command: Command) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        assert command.code() is None, command.stderr
        time.sleep(0.005)


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if ".tmp-" in path.name)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- what comes in ---


def cut_target(corpus: Path) -> None:
    write_lines(corpus / "train.tgt", (corpus / "train.tgt").read_text().split("\n")[:-2])


def remove_source(corpus: Path) -> None:
    (corpus / "train.src").unlink()


def empty_train(corpus: Path) -> None:
    write_lines(corpus / "train.src", [])
    write_lines(corpus / "train.tgt", [])


def empty_valid(corpus: Path) -> None:
    write_lines(corpus / "valid.src", [])
    write_lines(corpus / "valid.tgt", [])


def folder_for_file(corpus: Path) -> None:
    (corpus / "train.src").unlink()
    (corpus / "train.src").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_target, ["train.src", "600", "train.tgt", "599"]),
        (remove_source, ["train.src", "No such file"]),
        (empty_train, ["no training example"]),
        (empty_valid, ["no validation example", "train.validate_every=0"]),
        (folder_for_file, ["train.src"]),
    ],
)
def test_bad_input_is_named_and_mended_input_is_learned_from(forks, recipe, tmp_path, damage, words):
    kept = tmp_path / "kept"
    shutil.copytree(recipe.parent, kept)
    damage(recipe.parent)
    refused(forks("train", recipe, *SHORT, "--output", tmp_path / "run"), 4, *words)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not leftovers(tmp_path / "run")
    shutil.rmtree(recipe.parent)
    kept.rename(recipe.parent)
    done = forks("train", recipe, *SHORT, "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr


# --- disks and folders ---


def test_no_room_while_data_is_prepared(forks, finished, tmp_path):
    recipe, unbroken = finished
    refused(forks("train", recipe, *SHORT, "--output", tmp_path / "run", file_limit=3000), 6, "disk full", "data")
    assert not (tmp_path / "run").exists()
    done = forks("train", recipe, *SHORT, "--output", tmp_path / "run")
    assert done.wait() == 0, done.stderr
    assert fingerprint(tmp_path / "run") == fingerprint(unbroken)


def test_no_room_while_saving_keeps_what_was_saved(forks, finished, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "run"
    assert forks("train", recipe, *SHORT, "train.steps=5", "--output", run).wait() == 0
    best = (run / "bundle").resolve()
    stopped = forks("train", recipe, *SHORT, "--output", run, file_limit=20_000)
    refused(stopped, 6, "disk full", "what was saved before is kept")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000005"]
    verify(run / "checkpoints" / "step_00000005")
    assert (run / "bundle").resolve() == best
    verify(best)
    assert not leftovers(run)
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    ours, theirs = fingerprint(run)["files"], fingerprint(unbroken)["files"]
    state = "state.safetensors"
    assert ours["step_00000010"]["files"][state] == theirs["step_00000010"]["files"][state]


def test_a_checkpoint_that_does_not_fit_is_not_begun(recipe, tmp_path, monkeypatch):
    made = trainer(recipe, tmp_path / "run", *SHORT)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: free._replace(free=5000 if made.progress.step > 5 else free.free)
    )
    with pytest.raises(ResourceError, match=r"step_00000010\S*: disk full: [\d,]+ bytes are needed, 5,000 are free"):
        made.run(ignore)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000005"]
    verify(tmp_path / "run" / "checkpoints" / "step_00000005")


def test_a_disk_that_is_really_full(recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    encdec = f"{sys.executable} -m encdec_cli train {recipe} {' '.join(SHORT)} --output {disk}/run"
    script = f"""
        mount -t tmpfs -o size=200k tmpfs {disk} || exit 99
        {encdec}; echo $? >&2; find {disk} -name '*.tmp-*' >&2
        mount -o remount,size=20m {disk}
        {encdec} && test -e {disk}/run/bundle/bundle.json"""
    try:
        done = subprocess.run(
            ["unshare", "-Urm", "bash", "-c", script],
            env=environment(),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no `unshare` here, so no small disk")
    if done.returncode in (1, 99) and b"encdec" not in done.stderr:
        pytest.skip(f"this system grants no mount name space: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr.decode()
    said = done.stderr.decode().split("\n")
    code = said.index("6")
    assert "disk full" in said[code - 1]
    assert ".tmp-" not in said[code + 1]
    assert "Traceback" not in done.stderr.decode()


def test_folders_that_cannot_be_used_are_refused_before_data_is_read(tmp_path):
    bench = Bench(tmp_path, seed=1, share=1)
    try:
        assert {case: wrong for case, wrong in unusable_folders(bench) if wrong} == {}
    finally:
        bench.forks.close()


def test_parents_are_made_and_names_may_be_odd(forks, finished, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "not yet there" / "läuft 走\n$(x) 'y' *"
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert fingerprint(run) == fingerprint(unbroken)
    assert forks("generate", "--model", run, stdin="1 2\n").stdout.count("\n") == 1


# --- signals ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_a_signal_while_data_is_prepared(forks, finished, plugin, tmp_path, number, code, command):
    recipe, unbroken = finished
    run = tmp_path / "run"
    (tmp_path / "hold-train").touch()
    words = (recipe, *SHORT, "data.name=paused", "--plugin", plugin, "--output", run)
    stopped = forks.start(command, *words, PAUSE=str(tmp_path))
    until((tmp_path / "in-train").exists, stopped)
    stopped.send(number)
    refused(stopped, code, "stopped by a signal", "the same command")
    assert not run.exists()
    if command == "train":
        done = forks("train", *words)
        assert done.wait() == 0, done.stderr
        state = "state.safetensors"
        ours, theirs = (fingerprint(each)["files"]["step_00000010"]["files"] for each in (run, unbroken))
        assert ours[state] == theirs[state]


def test_ctrl_c_in_the_first_validation_and_a_second_one(forks, finished, plugin, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "run"
    words = (recipe, *SHORT, "train.save_every=100", "decoding.name=paused", "--plugin", plugin, "--output", run)
    held = tmp_path / "hold-search"
    held.touch()
    first = forks.start("train", *words, PAUSE=str(tmp_path))
    until((tmp_path / "in-search").exists, first)
    first.send(signal.SIGINT)
    time.sleep(0.1)
    held.unlink()
    refused(first, 130, "saved at update 5", "the same command continues")
    assert not (run / "bundle").exists(), "a model that was never judged"
    held.touch()
    (tmp_path / "in-search").unlink()
    second = forks.start("train", *words, PAUSE=str(tmp_path))
    until((tmp_path / "in-search").exists, second)
    second.send(signal.SIGINT)
    time.sleep(0.1)
    second.send(signal.SIGINT)  # while the search still waits
    assert second.wait() == 130
    assert "Traceback" not in second.stderr
    verify(run / "checkpoints" / "step_00000005")
    held.unlink()
    done = forks("train", *words)
    assert done.wait() == 0, done.stderr
    ours, theirs = fingerprint(run), fingerprint(unbroken)
    assert ours["log"] == theirs["log"]
    weights = "model.safetensors"
    assert ours["files"]["bundle"]["files"][weights] == theirs["files"]["bundle"]["files"][weights]


def test_sigterm_while_the_program_starts(forks, recipe, tmp_path):
    run = tmp_path / "run"
    process = start("train", recipe, *SHORT, "--output", run, stdin=-3)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT)
    # Before our own handler stands the system ends the process; a shell shows 143 for both.
    assert process.returncode in (143, -signal.SIGTERM), errors.decode()
    assert b"Traceback" not in errors
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr


def test_sighup_ends_like_sigterm_but_not_under_nohup(forks, recipe, tmp_path):
    long = ("train.steps=100000", "train.save_every=100000", "train.validate_every=0")
    for name, ignored in (("terminal", ()), ("nohup", (signal.SIGHUP,))):
        run = tmp_path / name
        command = forks.start("train", recipe, *SHORT, *long, "--output", run, ignored=ignored)
        until(lambda run=run: lines_of(run / "log.jsonl") >= 1, command)
        command.send(signal.SIGHUP)
        if ignored:
            seen = lines_of(run / "log.jsonl")
            until(lambda run=run, seen=seen: lines_of(run / "log.jsonl") > seen + 1, command)
            command.send(signal.SIGTERM)
        refused(command, 143, "saved at update")
        assert list((run / "checkpoints").iterdir())


# --- who holds the folder ---


def test_of_simultaneous_starts_exactly_one_wins(forks, finished, plugin, tmp_path):
    recipe, _ = finished
    for attempt in range(3):
        run = tmp_path / f"run-{attempt}"
        run.mkdir()
        (run / "lock").write_text("process 999999 on nowhere since 1999-01-01 00:00:00\n")  # of a dead one: free
        (tmp_path / "hold-train").touch()
        words = ("preprocess", recipe, "data.name=paused", "--plugin", plugin, "--output", run)
        commands = [forks.start(*words, PAUSE=str(tmp_path)) for _ in range(4)]
        deadline = time.monotonic() + TIMEOUT
        while sum(command.code() is None for command in commands) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "hold-train").unlink()
        codes = [command.wait() for command in commands]
        assert sorted(codes) == [0, 6, 6, 6]
        winner = commands[codes.index(0)]
        for command in commands:
            if command is not winner:
                refused(command, 6, "in use by", "--output")
        verify(run / "data")
        assert not leftovers(run)


# --- going on ---


def test_a_finished_run_goes_on_with_more_updates_and_not_with_fewer(forks, copied):
    recipe, run = copied
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    fewer = forks("train", recipe, *SHORT, "train.steps=4", "--output", run)
    assert fewer.wait() == 0
    assert "nothing to do" in fewer.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"} == before
    more = forks("train", recipe, *SHORT, "train.steps=14", "--output", run)
    assert more.wait() == 0, more.stderr
    assert "train.steps was 10, is now 14" in more.stderr
    assert "going on from update 10 of 14" in more.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000010", "step_00000014"]
    verify(run / "bundle")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.feed_forward=128", "model.feed_forward was 64, is 128"),
        ("train.tokens=128", "train.tokens was 256, is 128"),
        ("train.accumulate=2", "train.accumulate was 1, is 2"),
        ("train.optimizer=adam", "train.optimizer was 'adamw', is 'adam'"),
        ("train.seed=9", "train.seed was 1, is 9"),
        ("train.precision=bf16", "precision was 'fp32', is 'bf16'"),
        ("text.vocabulary=9", "its training data are others (text.vocabulary was 40, is 9)"),
    ],
)
def test_what_a_run_cannot_go_on_with(forks, copied, change, words):
    recipe, run = copied
    log = (run / "log.jsonl").read_bytes()
    refused(forks("train", recipe, *SHORT, "train.steps=20", change, "--output", run), 2, words, "--output FOLDER")
    assert (run / "log.jsonl").read_bytes() == log
    verify(run / "bundle")
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "nothing to do" in done.stderr


@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_a_refused_run_keeps_its_data(forks, copied, command):
    recipe, run = copied
    before = {path: path.read_bytes() for path in (run / "data").iterdir()}
    words = "its training data are others (text.vocabulary was 40, is 9)"
    refused(forks(command, recipe, *SHORT, "text.vocabulary=9", "--output", run), 2, words, "--output FOLDER")
    assert {path: path.read_bytes() for path in (run / "data").iterdir()} == before


def test_changed_training_data_are_refused(forks, recipe, tmp_path):
    run = tmp_path / "run"
    assert forks("train", recipe, *SHORT, "--output", run).wait() == 0
    with (recipe.parent / "train.src").open("a") as source, (recipe.parent / "train.tgt").open("a") as target:
        source.write("1 2\n")
        target.write("1 2\n")
    refused(forks("train", recipe, *SHORT, "--output", run), 2, "training data are others", "the files have changed")


def test_what_may_change_is_noted(forks, copied):
    recipe, run = copied
    changes = ("train.steps=11", "train.rate=1e-3", "train.threads=2", "decoding.beam=1")
    done = forks("train", recipe, *SHORT, *changes, "--output", run)
    assert done.wait() == 0, done.stderr
    notes = [line for line in done.stderr.split("\n") if line.startswith("note: ")]
    assert any("train.rate was 0.003, is now 0.001" in note for note in notes)
    assert any("decoding.beam was 2, is now 1" in note for note in notes)
    assert any(
        note.startswith("note: threads was 1, is now 2; the weights will not be bit-identical") for note in notes
    )


# --- damage ---


def test_damaged_prepared_data_is_named_with_its_remedy(forks, copied):
    recipe, run = copied
    flip(run / "data" / "train-00000.safetensors")
    refused(
        forks("train", recipe, *SHORT, "--output", run),
        5,
        "train-00000.safetensors",
        "SHA-256",
        f"Delete the folder {run}",
    )
    shutil.rmtree(run / "data")
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "nothing to do" in done.stderr


def test_a_damaged_model_is_refused_and_made_again(forks, copied, finished):
    recipe, run = copied
    flip(run / "bundle" / "model.safetensors")
    refused(forks("generate", "--model", run, stdin="1\n"), 5, "model.safetensors", "SHA-256")
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "model.safetensors" in done.stderr
    assert "will be replaced" in done.stderr
    verify(run / "bundle")
    assert forks("generate", "--model", run, stdin="1\n").wait() == 0


def test_a_step_folder_without_manifest_is_no_checkpoint(forks, finished, tmp_path):
    recipe, unbroken = finished
    run = tmp_path / "run"
    assert forks("train", recipe, *SHORT, "train.steps=6", "train.keep=2", "--output", run).wait() == 0
    half = run / "checkpoints" / "step_00000010"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    done = forks("train", recipe, *SHORT, "--output", run)
    assert done.wait() == 0, done.stderr
    assert "step_00000010 is passed over" in done.stderr
    assert "going on from update 6" in done.stderr
    state = "state.safetensors"
    ours, theirs = (fingerprint(each)["files"]["step_00000010"]["files"] for each in (run, unbroken))
    assert ours[state] == theirs[state]


def test_a_damaged_newest_checkpoint_does_not_outlive_a_good_one(forks, finished, tmp_path):
    """With one checkpoint kept, the clean-up after the next save must not take the damaged one for the newest."""
    recipe, _ = finished
    run = tmp_path / "run"
    assert forks("train", recipe, *SHORT, "train.keep=2", "--output", run).wait() == 0
    flip(run / "checkpoints" / "step_00000010" / "state.safetensors")
    done = forks("train", recipe, *SHORT, "train.steps=7", "train.keep=1", "--output", run)
    assert done.wait() == 0, done.stderr
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000007", "step_00000010.damaged"]
    verify(run / "checkpoints" / "step_00000007")
    assert forks("train", recipe, *SHORT, "train.keep=1", "--output", run).wait() == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_manifest_that_lists_nothing_is_damaged(copied):
    _, run = copied
    folder, said = run / "checkpoints", []
    older, newest = checkpoint.steps(folder)
    (folder / checkpoint.step_name(newest) / "MANIFEST.json").write_text('{"files": {}}')
    assert checkpoint.newest(folder, said.append) == older
    assert "MANIFEST.json: lists no progress.json or no state" in said[0]


def test_what_cannot_be_read_for_once_is_not_deleted(copied, monkeypatch):
    _, run = copied
    folder, said = run / "checkpoints", []
    older, newest = checkpoint.steps(folder)
    sha256 = atomic.sha256

    def broken(path):
        if path.parent.name == checkpoint.step_name(newest):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    monkeypatch.setattr(atomic, "sha256", lambda path: sha256(folder / "nowhere"))
    with pytest.raises(BundleError, match=r"no checkpoint is whole .*; try again if the disk has failed for a moment"):
        checkpoint.newest(folder, said.append)
    assert (said, checkpoint.steps(folder)) == ([], [older, newest])
    monkeypatch.setattr(atomic, "sha256", broken)
    assert checkpoint.newest(folder, said.append) == older
    assert "Input/output error" in said[0]
    monkeypatch.undo()
    aside = folder / f"{checkpoint.step_name(newest)}.damaged"
    assert aside.name in said[0]
    checkpoint.drop(folder, 1)  # the run has not passed it
    whole = checkpoint.read(folder, older).progress.model, json.loads((aside / "progress.json").read_text())
    assert checkpoint.models(folder) == {whole[0], whole[1]["progress"]["model"]}
    half = folder / f"{aside.name}.tmp-{2**22 + 1}"  # somebody died who was deleting one
    half.mkdir()
    checkpoint.recover(folder)
    assert not half.exists()
    aside.rename(folder / checkpoint.step_name(newest))
    assert checkpoint.newest(folder, said.append) == newest


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ResourceError, match=r"run: this file system gives no locks .*choose another --output"),
        locked(tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_no_whole_checkpoint_is_an_error_not_a_new_start(forks, copied):
    recipe, run = copied
    for path in (run / "checkpoints").iterdir():
        (path / MANIFEST).unlink()
    refused(forks("train", recipe, *SHORT, "--output", run), 5, "no checkpoint is whole", MANIFEST)
    assert (run / "checkpoints" / "step_00000010" / "state.safetensors").exists()
    verify(run / "bundle")


def test_a_loss_that_is_no_number_stops_before_the_update(forks, copied):
    recipe, run = copied
    checkpoint = (run / "checkpoints" / "step_00000010" / MANIFEST).read_bytes()
    absurd = ("train.steps=1000", "train.rate=1e38", "train.warmup=0", "train.schedule=constant", "train.clip=0")
    done = forks(
        "train", recipe, *SHORT, *absurd, "train.save_every=1000", "train.validate_every=1000", "--output", run
    )
    refused(done, 7, "loss", "the last checkpoint is of update 10", "lower train.rate")
    assert (run / "checkpoints" / "step_00000010" / MANIFEST).read_bytes() == checkpoint
    verify(run / "checkpoints" / "step_00000010")
    verify(run / "bundle")
    assert "NaN" not in (run / "log.jsonl").read_text()
    again = forks("train", recipe, *SHORT, "train.steps=12", "--output", run)
    assert again.wait() == 0, again.stderr


# --- kill -9 at the steps of a save ---

SAVES = ("train.steps=6", "train.validate_every=2", "train.save_every=3", "train.average=2", "train.valid_lines=5")


def test_kill_9_at_any_step_of_any_save(forks, finished, plugin, tmp_path):
    """Whenever it dies, `bundle` is whole or not there, and the same command ends as if nothing had happened."""
    recipe, run = finished
    words = ("train", recipe, *SHORT, *SAVES, "train.rate=0.03", "--plugin", plugin, "--output")
    shutil.copytree(run / "data", tmp_path / "unbroken" / "data")
    counted = forks(*words, tmp_path / "unbroken", DIE_AT="0", COUNT=str(tmp_path / "count"))
    assert counted.wait() == 0, counted.stderr
    expected, points = fingerprint(tmp_path / "unbroken"), int((tmp_path / "count").read_text())
    assert points > 60
    # Some on the way, and the first deletion after the last checkpoint.
    for number in (*range(3, points, points // 8), points - 15):
        broken = tmp_path / f"at-{number}"
        shutil.copytree(run / "data", broken / "data")
        killed = forks(*words, broken, DIE_AT=str(number))
        assert killed.wait() == -signal.SIGKILL
        check_whole(broken, number)
        # A second death, while what the first one left is brought in order or soon after.
        again = forks(*words, broken, DIE_AT=str(number % 17 + 1))
        assert again.wait() in (-signal.SIGKILL, 0)
        check_whole(broken, number)
        done = forks(*words, broken)
        assert done.wait() == 0, done.stderr
        assert fingerprint(broken) == expected, f"killed at {number}"
        assert not leftovers(broken)
        assert {path.name for path in (broken / "bundles").iterdir()} == {
            path.name for path in (tmp_path / "unbroken" / "bundles").iterdir()
        }


def check_whole(run: Path, number: int) -> None:
    if (run / "bundle").is_symlink():
        assert (run / "bundle").exists(), f"a dangling link after a death at {number}"
        verify(run / "bundle")
    for path in run.glob("checkpoints/step_*"):
        if ".tmp-" not in path.name:
            verify(path)
