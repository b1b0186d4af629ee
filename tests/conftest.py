"""What several test files share: running `encdec` as a subprocess, and a task that is learned in seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle

RECIPE = """\
task: {{name: translation}}
data:
  name: files
  root: {root}
  train: {{source: train.src, target: train.tgt}}
  valid: {{source: valid.src, target: valid.tgt}}
  test: {{source: test.src, target: test.tgt}}
text: {{tokenizer: word, vocabulary: 40, shared: true, max_source: 32, max_target: 32}}
model:
  name: transformer
  encoder_layers: 1
  decoder_layers: 1
  d_model: 32
  heads: 2
  feed_forward: 64
  dropout: 0.1
train:
  steps: 40
  tokens: 256
  rate: 3e-3
  warmup: 10
  validate_every: 20
  save_every: 5
  valid_lines: 20
  metric: exact
  log_every: 5
  threads: 1
decoding: {{name: beam, beam: 2}}
"""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command under test: nothing of the user's own settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ENCDEC_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **changes}


def start(*arguments: str | Path, cwd: Path | None = None, **options) -> subprocess.Popen:
    """Start `encdec` and return the process, with all three streams piped unless told otherwise."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "encdec_cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=streams.pop("env", environment()), **streams)


def encdec(
    *arguments: str | Path,
    stdin: str | bytes | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run `encdec` to its end. Without `stdin` it reads the null device."""
    content = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "encdec_cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        timeout=timeout,
        check=False,
        **({"input": content} if content is not None else {"stdin": subprocess.DEVNULL}),
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def save(bundle: Bundle, folder: Path) -> None:
    """Write a bundle with its model's own weights."""
    bundle.save_weights(folder, bundle.model.state_dict())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def copy_task(folder: Path, train: int = 600, held_out: int = 40, reverse: bool = False, seed: int = 1) -> Path:
    """Write a corpus of digit sequences whose target is the source, or the source reversed; return a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    seen: set[str] = set()
    for split, count in (("train", train), ("valid", held_out), ("test", held_out)):
        lines: list[str] = []
        while len(lines) < count:
            line = " ".join(generator.choice("0123456789") for _ in range(generator.randint(1, 6)))
            if line not in seen or len(line) < 4:
                seen.add(line)
                lines.append(line)
        write_lines(folder / f"{split}.src", lines)
        write_lines(folder / f"{split}.tgt", [line[::-1] if reverse else line for line in lines])
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=folder))
    return recipe


def log_lines(run: Path, event: str = "") -> list[dict[str, Any]]:
    """The lines of a run's log, or those of one event."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().split("\n")[:-1]]
    return [line for line in lines if event in ("", line["event"])]


@pytest.fixture(scope="session", autouse=True)
def usual_signals():
    """Let commands under test get signals although a shell in the background, or nohup, has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that copies digits, in a folder of its own."""
    return copy_task(tmp_path / "corpus")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that copies digits, for tests that leave its folder as it is."""
    return copy_task(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Starts commands as processes that have imported torch already, and what the module's IMPORTS names."""
    from tests.forked import Forks  # which needs `environment` from here

    commands = Forks(tmp_path_factory.mktemp("commands"), *getattr(request.module, "IMPORTS", ()))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def copy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned to copy digits, trained once for all tests, through the command."""
    folder = tmp_path_factory.mktemp("copy")
    recipe = copy_task(folder / "corpus", train=3000)
    done = encdec(
        *("train", recipe, "--output", folder / "run", "train.steps=500", "train.tokens=512", "train.rate=5e-3"),
        *("train.validate_every=100", "train.save_every=100", "train.schedule=cosine", "train.label_smoothing=0.0"),
        *("model.dropout=0.0", "model.d_model=64", "model.positions=sinusoidal"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


Runner = Callable[..., "subprocess.CompletedProcess[str]"]
