"""What `encdec watch` and `encdec compare` tell of runs: read only, whatever state the folder is in."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from encdec_cli import atomic
from encdec_cli.cli.chart import chart
from encdec_cli.cli.watch import watch
from encdec_cli.training.history import read
from tests.conftest import encdec
from tests.trainers import ignore, trainer

NOBODY = 2**22 + 1  # no process has this number: Linux gives none above 2^22


def line(event: str, step: int, seconds: float, **fields: object) -> dict:
    return {"event": event, "step": step, **fields, "clock": {"seconds": seconds, "tokens_per_second": 100.0}}


def train(step: int, seconds: float, loss: float | None = 2.0) -> dict:
    return line("train", step, seconds, epoch=0, loss=loss, rate=0.001, norm=1.0, tokens=10 * step)


def made(folder: Path, lines: list[dict], saved: dict | None = None, holder: str = "", **recipe: object) -> Path:
    """A run folder as training leaves it: its log, a checkpoint with this progress, and its facts."""
    folder.mkdir(parents=True)
    (folder / "lock").write_text(holder or f"process {NOBODY} on {socket.gethostname()} since 2026-01-01 00:00:00\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    facts = {"recipe": {"plugins": [], "train": {"steps": 100, "patience": 0, **recipe}}, "threads": 1}
    (folder / "run.json").write_text(json.dumps(facts))
    if saved is not None:
        progress = {"best": None, "model": "", "finished": False, "log_lines": len(lines), **saved}
        with atomic.new_folder(folder / "checkpoints" / f"step_{progress['step']:08d}") as new:
            (new / "progress.json").write_bytes(
                atomic.json_bytes({"format": 1, "progress": progress, "facts": facts | {"threads": 2}})
            )
    return folder


LINES = [train(10, 5.0), train(20, 10.0), line("valid", 20, 12.0, loss=1.5, bleu=30.0)]


@pytest.mark.parametrize(
    ("saved", "holder", "state"),
    [
        ({"step": 100, "finished": True}, "", "finished"),
        ({"step": 20}, "", "stopped"),
        ({"step": 10, "log_lines": 1}, "", "dead"),
        (None, "", "dead"),
        ({"step": 20}, "process 1 on another-machine since yesterday", "elsewhere"),
        ({"step": 100, "finished": True}, "process 1 on another-machine since yesterday", "finished"),
    ],
)
def test_the_state_of_a_run(tmp_path, saved, holder, state):
    assert read(made(tmp_path / "run", LINES, saved, holder)).state == state


def test_a_process_that_holds_the_lock_is_told_from_one_that_only_has_its_number(tmp_path):
    run = made(tmp_path / "run", LINES, {"step": 20}, f"process {os.getpid()} on {socket.gethostname()} since now\n")
    if Path("/proc/self/fd").is_dir():
        assert read(run).state == "stopped"  # we live, and do not hold the file
    with (run / "lock").open():
        assert read(run).state == "running"


def test_time_adds_up_over_processes_and_speed_is_of_the_last_one(tmp_path):
    lines = [train(10, 5.0), train(20, 50.0), train(30, 2.0), train(40, 4.0)]
    history = read(made(tmp_path / "run", lines))
    assert [each["seconds"] for each in history.lines] == [5.0, 50.0, 52.0, 54.0]
    assert history.speed() == pytest.approx(10 / 2)


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_named(tmp_path):
    run = made(tmp_path / "run", LINES)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"event": "tr')
    assert len(read(run).lines) == 3
    whole = (run / "log.jsonl").read_text().split("\n")
    (run / "log.jsonl").write_text("\n".join([whole[0], "garbage", *whole[2:]]))
    history = read(run)
    assert [each["step"] for each in history.lines] == [10, 20]
    assert history.alarms(history.written)[0] == "the log is damaged: 1 lines are none, the first is 2"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", {"event": "train", "step": 1, "clock": {}}),
        ("log.jsonl", {"event": "train", "step": 1, "loss": "x", "clock": {}}),
        ("log.jsonl", {"event": "valid", "step": 1, "bleu": [], "clock": {}}),
        ("log.jsonl", {"event": "train", "step": 1, "clock": {"seconds": "1"}}),
        ("log.jsonl", []),
        ("checkpoints/step_00000020/progress.json", {"progress": {"step": 20}, "facts": {}}),
        ("checkpoints/step_00000020/progress.json", {"progress": "q", "facts": {}}),
        ("run.json", {"recipe": {"train": {"steps": "x"}}}),
        ("run.json", {"recipe": 3}),
        ("run.json", []),
    ],
)
def test_files_that_are_damaged_or_of_another_version_are_no_failure_of_ours(tmp_path, name, content):
    runs = [made(tmp_path / each, LINES, {"step": 20}) for each in "ab"]
    (runs[0] / name).write_text(json.dumps(content) + "\n")
    for done in (encdec("watch", runs[0]), encdec("compare", *runs)):
        assert done.returncode == (5 if name == "run.json" and content != {"recipe": {"train": {"steps": "x"}}} else 0)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or str(runs[0] / name) in done.stderr


def test_what_changed_when_a_run_went_on_stands_in_its_log(tmp_path):
    lines = [train(10, 5.0), train(20, 10.0)]
    lines[1]["clock"]["notes"] = ["note: threads was 2, is now 1"]
    run = made(tmp_path / "run", lines, {"step": 20})
    assert "by update 20: note: threads was 2, is now 1" in encdec("watch", run).stdout.split("\n")


def test_watch_as_json(tmp_path):
    run = made(tmp_path / "run", LINES, {"step": 20, "best": 30.0, "model": "step_00000020"})
    told = json.loads(encdec("watch", run, "--json").stdout)
    assert (told["state"], told["update"], told["checkpoint"], told["best"]) == ("stopped", 20, 20, 30.0)
    assert told["alarms"] == []
    assert [each["loss"] for each in told["train"]] == [2.0, 2.0]


def test_alarms(tmp_path):
    losses = [3.0] * 5 + [2.0] * 5 + [2.2] * 5
    lines = [train(number, float(number), loss) for number, loss in enumerate(losses, 1)]
    lines.append(line("non_finite", 16, 16.0, found="loss nan, gradient norm nan", done="left out"))
    holder = f"process {os.getpid()} on {socket.gethostname()} since now"
    history = read(made(tmp_path / "run", lines, {"step": 5, "log_lines": 5}, holder))
    assert history.alarms(history.written)[:2] == [
        "update 16 left out: loss nan, gradient norm nan",
        "the loss rises: 2.200 over 5 lines, 2.000 before",
    ]
    assert any("it died; `encdec train` repeats the last 11 updates" in alarm for alarm in history.alarms(time.time()))
    with (tmp_path / "run" / "lock").open():
        running = read(tmp_path / "run")
        assert not any("no line" in alarm for alarm in running.alarms(running.written + 59))
        assert any("no line in the log for 61 s, at most 1 s" in a for a in running.alarms(running.written + 61))
    calm = read(made(tmp_path / "calm", [train(n, float(n), 3.0 - n / 100) for n in range(1, 30)], {"step": 29}))
    assert calm.alarms(calm.written + 1000) == []


def test_watch_prints_once_into_a_pipe_and_touches_nothing(tmp_path):
    run = made(tmp_path / "run", LINES, {"step": 20, "best": 30.0, "model": "step_00000020"})
    before = {path: path.stat() for path in run.rglob("*")}
    done = encdec("watch", run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == f"{run}: stopped, update 20 of 100 (20%)"
    assert lines[1] == "loss 2  rate 0.001  norm 1  epoch 0  200 tokens in 10 s"
    assert lines[2] == "validation at update 20: loss 1.5, bleu 30; best 30"
    assert re.fullmatch(r"checkpoint: update 20, \d+ s ago", lines[3])
    assert "loss by update" in lines
    assert "\x1b" not in done.stdout
    after = {path: path.stat() for path in run.rglob("*")}
    assert {p: (s.st_mtime_ns, s.st_ino) for p, s in after.items()} == {
        p: (s.st_mtime_ns, s.st_ino) for p, s in before.items()
    }


def test_neither_needs_torch(tmp_path):
    runs = [str(made(tmp_path / name, LINES, {"step": 20})) for name in "ab"]
    code = (
        "import sys, encdec_cli.cli as cli\n"
        f"assert cli.run(['watch', {runs[0]!r}]) == 0 and cli.run(['compare', *{runs!r}]) == 0\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("holder", "saved", "looks"),
    [
        ("process 1 on another-machine since yesterday", {"step": 20}, 3),
        ("process 1 on another-machine since yesterday", {"step": 100, "finished": True}, 1),
        ("", {"step": 20}, 1),
    ],
)
def test_watch_looks_again_while_a_run_may_go_on(tmp_path, monkeypatch, capsys, holder, saved, looks):
    waited = iter([None, None, KeyboardInterrupt()])

    def sleep(_):
        if (ending := next(waited)) is not None:
            raise ending

    run = made(tmp_path / "run", LINES, saved, holder)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with suppress(KeyboardInterrupt):
        watch(run, once=False)
    assert capsys.readouterr().out.count("\x1b[2J") == looks


def test_watch_tells_what_a_run_costs_as_far_as_it_is_known(tmp_path):
    last = train(20, 10.0) | {"padding": 0.0162}
    last["clock"] |= {"mfu": 0.304, "spent": {"hours": 0.58, "kwh": 0.0123, "price": 1.4}}
    told = encdec("watch", made(tmp_path / "a", [last], {"step": 20})).stdout
    assert "cost: 1.6% padding, 30% of the machine's ceiling, 0.0123 kWh, price 1.40\n" in told
    assert "cost" not in encdec("watch", made(tmp_path / "b", LINES, {"step": 20})).stdout


def test_what_is_no_run_is_a_sentence(tmp_path):
    done = encdec("watch", tmp_path)
    assert done.returncode == 2
    assert "not the folder of a run" in done.stderr


def test_compare_lays_recipes_and_scores_side_by_side(tmp_path):
    valid = [line("valid", 40, 9.0, loss=1.25, bleu=31.0), line("valid", 60, 14.0, loss=1.0, bleu=32.0)]
    first = made(tmp_path / "a", [*LINES, train(40, 8.0), valid[0], train(60, 13.0), valid[1]], {"step": 60}, rate=0.1)
    other = made(
        tmp_path / "b", [*LINES, train(30, 50.0)], {"step": 20, "best": 30.0, "model": "step_00000020"}, rate=1
    )
    done = encdec("compare", first, other)
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.split("\n")]
    assert rows[:2] == [["KEY", "a", "b"], ["train.rate", "0.1", "1"]]
    assert rows[3:7] == [["UPDATES", "a", "bleu", "b", "bleu"], ["20", "30", "30"], ["40", "31"], ["60", "32"]]
    assert rows[10] == ["b", "stopped", "30", "300", "50", "s", "2", "bleu", "30", "(step_00000020)"]
    by_tokens = encdec("compare", first, other, "--by", "tokens").stdout.split("\n")
    assert [row.split() for row in by_tokens[4:7]] == [["200", "30", "30"], ["400", "31"], ["600", "32"]]
    value = json.loads(encdec("compare", first, other, "--json").stdout)
    assert value["differences"] == {"train.rate": [0.1, 1]}
    assert value["runs"][1]["best"] == 30.0
    assert [point["step"] for point in value["runs"][0]["valid"]] == [20, 40, 60]
    assert value["runs"][0]["valid"][1] == {"step": 40, "loss": 1.25, "bleu": 31.0, "tokens": 400, "seconds": 21.0}


def test_compare_shows_the_training_loss_of_a_run_without_validations(tmp_path):
    lines = [train(step, float(step)) | {"loss": 100 / step} for step in range(10, 310, 10)]
    first = made(tmp_path / "a", lines, {"step": 300})
    rows = [
        row.split() for row in encdec("compare", first, made(tmp_path / "b", LINES, {"step": 20})).stdout.split("\n")
    ]
    assert rows[2] == ["UPDATES", "a", "loss", "b", "bleu"]
    # Every third of thirty from the last one on, and the other's validation.
    points = [row[0] for row in rows[3 : rows.index([], 3)]]
    assert points == ["20", *(str(step) for step in range(30, 301, 30))]
    assert rows[3] == ["20", "30"]
    assert rows[4] == ["30", "3.333"]


def test_compare_names_a_run_that_has_not_begun(tmp_path):
    run = made(tmp_path / "a", LINES, {"step": 20})
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lock").touch()
    done = encdec("compare", run, tmp_path / "new")
    assert done.returncode == 2
    assert f"{tmp_path / 'new'}: has not begun to train" in done.stderr


def test_compare_without_a_difference(tmp_path):
    run = made(tmp_path / "a", LINES, {"step": 20})
    assert encdec("compare", run, run).stdout.startswith("no difference between the recipes\n")


def test_a_run_of_the_trainer_is_read(recipe, tmp_path):
    """While it runs, stopped, and finished: what the trainer writes is what is read here."""
    overrides = ("train.steps=6", "train.save_every=2", "train.validate_every=3", "train.log_every=1")
    seen = []

    def show(step: int, *_: object) -> None:
        seen.append(read(tmp_path / "run").step)
        if step == 4:
            first.setting.stop.signal = signal.SIGTERM

    first = trainer(recipe, tmp_path / "run", *overrides)
    (tmp_path / "run" / "lock").touch()
    with pytest.raises(Exception, match="saved at update 4"):
        first.run(show)
    stopped = read(tmp_path / "run")
    assert seen == [0, 1, 2, 3]  # the log's line comes after
    assert (stopped.state, stopped.step, stopped.recipe["train.steps"]) == ("stopped", 4, 6)
    trainer(recipe, tmp_path / "run", *overrides).run(ignore)
    finished = read(tmp_path / "run")
    assert (finished.state, finished.step) == ("finished", 6)
    assert [each["step"] for each in finished.events("valid")] == [3, 6]
    tokens = {each["step"]: each["tokens"] for each in finished.events("train")}
    assert [each["tokens"] for each in finished.events("valid")] == [tokens[3], tokens[6]]
    trainer(recipe, tmp_path / "rare", *overrides, "train.log_every=4").run(ignore)  # no line of update 3
    assert [each["tokens"] for each in read(tmp_path / "rare").events("valid")] == [tokens[3], tokens[6]]
    assert finished.saved.bytes > 0


def dots(rows: list[str]) -> set[tuple[int, int]]:
    """The (column, row) of each dot of a chart."""
    places = {1: (0, 0), 2: (0, 1), 4: (0, 2), 64: (0, 3), 8: (1, 0), 16: (1, 1), 32: (1, 2), 128: (1, 3)}
    found = set()
    for number, row in enumerate(rows):
        for column, cell in enumerate(row.partition("│")[2]):
            for bit, (x, y) in places.items():
                if ord(cell) - 0x2800 & bit:
                    found.add((2 * column + x, 4 * number + y))
    return found


def test_a_chart_is_the_curve():
    title, *rows, below = chart([(0, 7.0), (7, 0.0)], "falls", width=1 + 2 + 4, height=2)
    assert title == "falls"
    assert dots(rows) == {(n, n) for n in range(8)}
    assert rows[0].startswith("7 │")
    assert rows[-1].startswith("0 │")
    assert below.split() == ["└", "0", "…", "7"]
    assert dots(chart([(0, 1.0), (10, 1.0)], "flat", 7, 2)[1:-1]) == {(n, 0) for n in range(8)}
    assert chart([], "none") == []
