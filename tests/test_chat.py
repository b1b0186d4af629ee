"""`encdec chat` in a pipe and on a terminal, with a model that answers with the oldest turn it can see."""

from __future__ import annotations

import os
import random
import select
import time

import pytest

from tests.conftest import start, write_lines
from tests.forked import TIMEOUT
from tests.test_train_cli import SHORT, Terminal, refused

RECIPE = """\
task: {{name: dialogue, turns: 3}}
data:
  name: files
  root: {root}
  train: {{source: train.src, target: train.tgt}}
  valid: {{source: valid.src, target: valid.tgt}}
text: {{tokenizer: word, vocabulary: 40, max_source: 10, max_target: 5}}
model:
  name: transformer
  encoder_layers: 1
  decoder_layers: 1
  d_model: 64
  heads: 2
  feed_forward: 64
  dropout: 0.0
train:
  steps: 150
  tokens: 1024
  rate: 5e-3
  warmup: 20
  schedule: cosine
  label_smoothing: 0.0
  precision: fp32
  validate_every: 150
  save_every: 150
  metric: exact
  threads: 1
decoding: {{name: beam, beam: 1}}
"""


@pytest.fixture(scope="module")
def model(forks, tmp_path_factory):
    """The answer is the first of at most three turns, so it tells how many of them the model was shown."""
    folder = tmp_path_factory.mktemp("dialogue")
    generator = random.Random(5)
    for split, count in (("train", 2000), ("valid", 60)):
        talks = []
        for _ in range(count):
            talk = [" ".join(generator.choice("0123456789") * generator.choice((1, 1, 2))) for _ in range(3)]
            talks.append(talk[: generator.choice((1, 2, 3, 3))])
        write_lines(folder / f"{split}.src", ["\t".join(talk) for talk in talks])
        write_lines(folder / f"{split}.tgt", [talk[0].split()[0] for talk in talks])
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    done = forks("train", folder / "recipe.yaml", "--output", folder / "run")
    assert done.wait() == 0, done.stderr
    assert "exact 100" in done.stderr, done.stderr
    return folder / "run"


def answers(command):
    assert command.wait() == 0, command.stderr
    return command.stdout.split("\n")[:-1]


def test_it_remembers_what_was_said_and_says_when_it_no_longer_does(forks, model):
    # Seen by the model: 3 | 3 3 7 | 7 3 5 | 5 7 9
    done = forks("chat", "--model", model, stdin="3\n7\n5\n9\n")
    assert answers(done) == ["3", "3", "7", "5"]
    assert done.stderr.count("no longer fit") == 1
    assert "the first 2 turns of this conversation no longer fit" in done.stderr


def test_new_forgets_everything(forks, model):
    done = forks("chat", "--model", model, stdin="3\n7\n/new\n8\n6\n")
    assert answers(done) == ["3", "3", "8", "8"]
    assert "no longer fit" not in done.stderr


def test_a_blank_line_is_answered_by_a_blank_line_and_is_no_turn(forks, model):
    done = forks("chat", "--model", model, stdin="3\n\n  \n7\n")
    assert answers(done) == ["3", "", "", "3"]


def test_turns_that_together_are_too_long_are_forgotten(forks, model):
    # Nine tokens fit: "1 1 1 1" + <turn> + "1" + <turn> + "2 2 2" are ten, so the first turn leaves.
    done = forks("chat", "--model", model, stdin="1 1 1 1\n2 2 2\n")
    assert len(answers(done)) == 2
    assert "the first turn of this conversation no longer fits; from here on" in done.stderr


def test_a_turn_that_is_too_long_is_cut_and_said(forks, model):
    done = forks("chat", "--model", model, stdin="4 " * 30 + "\n")
    assert len(answers(done)) == 1
    assert "longer than the model can read" in done.stderr


def test_a_pipe_gets_each_answer_before_it_asks_again(model):
    process = start("chat", "--model", model)
    try:
        for said, answer in (("4", "4"), ("6", "4"), ("/new", None), ("6", "6")):
            process.stdin.write(f"{said}\n".encode())
            process.stdin.flush()
            if answer:
                ready, _, _ = select.select([process.stdout], [], [], 60)
                assert ready, "no answer while the pipe stays open"
                assert process.stdout.readline() == f"{answer}\n".encode()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == b""
    finally:
        process.kill()
        process.wait()


def talk(forks, model, ending: bytes):
    """Say two things on a terminal, then end; return the exit code and what the terminal showed."""
    terminal = Terminal()
    command = forks.start("chat", "--model", model, tty=terminal.name, tty_stdout=True)
    for number, said in enumerate((b"3\n", b"\n", b"7\n", ending), start=1):
        deadline = time.monotonic() + TIMEOUT
        while terminal.so_far().count("> ") < number:
            assert time.monotonic() < deadline, terminal.so_far()
            assert command.code() is None, terminal.so_far()
            time.sleep(0.01)
        time.sleep(0.05)  # input() sets the terminal up after the prompt
        os.write(terminal.master, said)
    code = command.wait()
    return code, terminal.text().replace("\r\n", "\n")


def test_on_a_terminal_it_prompts_and_ends_with_ctrl_d(forks, model):
    code, seen = talk(forks, model, b"\x04")
    assert code == 0, seen
    # The terminal shows what is typed; a blank line gets no answer, only a new prompt.
    assert seen.replace("^D\b\b", "") == "> 3\n3\n> \n> 7\n3\n> \n"


def test_ctrl_c_on_a_terminal(forks, model):
    code, seen = talk(forks, model, b"\x03")
    assert code == 130, seen
    assert "Traceback" not in seen
    assert seen.endswith("\n")  # so that the shell's prompt begins a line


def test_a_model_of_another_task_is_refused(forks, recipe, tmp_path):
    assert forks("train", recipe, *SHORT, "--output", tmp_path / "run").wait() == 0
    refused(
        forks("chat", "--model", tmp_path / "run", stdin="1\n"),
        2,
        "chat needs a model of the task dialogue",
        "translation",
    )
