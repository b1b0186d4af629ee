"""Every command of the README runs; training with fewer updates here, and in full under `pytest -m slow`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
QUICK = (
    "train.steps=30 train.validate_every=30 train.valid_lines=20 train.tokens=1024 train.threads=1 model.d_model=32 "
    "model.feed_forward=64 model.encoder_layers=1 model.decoder_layers=1"
)
DATA = {"mt": "data.pairs=1000 data.valid=50 data.test=50", "summarization": "", "dialogue": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `encdec` is a command and the recipes lie where the README says."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "bin").mkdir()
    command = folder / "bin" / "encdec"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m encdec_cli "$@"\n')
    command.chmod(0o755)
    return folder


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}:{environment()['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment(PATH=path, XDG_CACHE_HOME=str(folder / "cache")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def quicker(command: str) -> str:
    """The command with a smaller model and fewer updates, if it trains one."""
    found = re.search(r"encdec train recipes/(\w+)\.yaml", command)
    return f"{command} {QUICK} {DATA[found[1]]}" if found else command


def without_installation(command: str) -> str:
    return command.split("&& ", 3)[-1]


def commands() -> list[str]:
    lines = [line for block in BLOCKS for line in block.strip().split("\n")]
    assert lines[1].startswith("pip install"), "the second command line installs what the tests need"
    first = without_installation(lines[0]).split(" && ")
    return [*first, *lines[2:]]


@pytest.fixture(scope="module")
def outputs(folder):
    """What each command of the README writes to stdout."""
    outputs = {}
    for command in commands():
        done = shell(folder, quicker(command))
        # `| head` may end `generate` early, as it should.
        assert done.returncode == 0 or ("| head" in command and done.returncode == 141), f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
        outputs[command] = done.stdout
    return outputs


def test_every_command_runs(folder, outputs):
    assert (folder / "out.txt").read_text().count("\n") == 3
    assert (folder / "out.txt").read_text().split("\n")[1] == ""
    assert outputs["encdec evaluate --metric bleu"].startswith("BLEU = ")
    assert "transformer" in outputs["encdec list"]


@pytest.mark.parametrize(
    ("name", "line", "metric"),
    [
        ("summarization", '{"id": 7, "document": "Return the sum of a and b, which must be numbers."}', "rougeL ="),
        ("dialogue", '{"id": 7, "turns": ["Hello", "Hi there!", "What are you?"]}', "f1 ="),
    ],
)
@pytest.mark.usefixtures("outputs")
def test_the_other_tasks_have_all_commands_too(folder, name, line, metric):
    model = f"--model runs/{name}"
    written = shell(folder, f"printf '%s\\n\\n' '{line}' | encdec generate --beam 2 --json {model}")
    assert written.returncode == 0, written.stderr
    first, second = map(json.loads, written.stdout.splitlines())
    assert first["id"] == 7
    assert (first["status"] == "empty", second["status"]) == (False, "empty")
    judged = shell(folder, f"encdec evaluate {model}")
    assert judged.returncode == 0, judged.stderr
    assert metric in judged.stdout
    exported = shell(folder, f"encdec export --to ctranslate2 --check {model}")
    assert exported.returncode == 0, exported.stderr
    assert "equal" in exported.stdout
    assert (folder / f"{name}-ctranslate2" / "model.bin").is_file()


def test_the_commands_of_the_mission_stand_in_it():
    for command in ("encdec train recipes/mt.yaml", "encdec generate --beam 5", "encdec evaluate --metric bleu"):
        assert command in README


def test_its_size_and_its_links():
    assert README.count("\n") < 200
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_continuous_integration_calls_the_test_command_of_the_readme():
    found = re.search(r"<!-- tests -->\n```sh\n(.*?)```\n<!-- end tests -->", README, flags=re.DOTALL)
    assert found
    assert "pytest" in found[1]
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_first_two_command_lines_in_a_fresh_clone(tmp_path):
    """As they are written: environment, installation, training, translating, then the tests."""
    asked = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, "typer"]
    index = subprocess.run(asked, capture_output=True, text=True, check=False)
    if index.returncode != 0:
        pytest.skip(f"pip cannot reach an index: {index.stderr.strip()}")
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)  # what is committed, no more
    outside = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", BLOCKS[0] + BLOCKS[1]],
        cwd=tmp_path / "clone",
        env=outside,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1971" in done.stdout.split("\n")[0]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt", "summarization", "dialogue"])
def test_the_recipes_of_the_readme_in_full(folder, name):
    done = shell(folder, f"encdec train recipes/{name}.yaml --output runs/full-{name}")
    assert done.returncode == 0, done.stderr
    judged = shell(folder, f"encdec evaluate --model runs/full-{name} --metric exact --score-only")
    assert judged.returncode == 0, judged.stderr
    if name == "mt":
        assert float(judged.stdout) >= 90
