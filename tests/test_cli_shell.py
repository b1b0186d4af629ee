"""The manners of the command line: help, exit codes, one sentence for each error, and nothing else on stdout."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encdec_cli import __version__, cli
from encdec_cli.cli import console
from encdec_cli.errors import DataError, ExitCode, UsageError
from encdec_cli.registry import KINDS

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "encdec_cli"]


def encdec(*arguments, **settings):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ENCDEC_")}
    environment |= {"PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        text=True,
        encoding="utf-8",
        capture_output=True,
        check=False,
        **settings,
    )


# Not pydantic: newer versions of Typer use it themselves to read the words of a command line.
HEAVY = {"torch", "numpy", "yaml", "rich", "sacrebleu", "sentencepiece", "safetensors", "babel"}


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join
)
def test_help_and_version_import_nothing_heavy(words):
    code = (
        "import sys, encdec_cli.cli as cli\n"
        "assert 'pydantic' not in sys.modules\n"
        f"code = cli.run({words!r})\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
        "assert not found, found\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    if words == ["--version"]:
        assert done.stdout == f"encdec {__version__}\n"
    elif words == ["--help"]:
        assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
        assert "Exit codes: 0 good" in done.stdout
    else:
        assert done.stdout.startswith(f"Usage: encdec {words[0]} ")
        for type_of_python in ("list[", "<str>", "<int", "<float"):
            assert type_of_python not in done.stdout


def test_no_command_shows_the_help_as_an_error():
    done = encdec()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: encdec ")


WRONG = {
    ("lst",): "encdec: error: No such command 'lst'. Did you mean 'list'? see 'encdec --help'.\n",
    ("list", "--jsn"): "see 'encdec list --help'.\n",
    ("list", "extra"): "see 'encdec list --help'.\n",
    ("list", "--plugin"): " --help'.\n",  # Click does not always tell of which command the option is
}


@pytest.mark.parametrize(("words", "end"), WRONG.items())
def test_a_wrong_command_line_is_one_sentence_and_exit_2(words, end):
    done = encdec(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(end)
    assert done.stderr.startswith("encdec: error: ")
    assert done.stderr.count("\n") == 1


# `encdec list`.


def test_list_shows_every_component_in_aligned_columns():
    done = encdec("list")
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    column = header.index("NAME")
    for registry in KINDS.values():
        for name in (origin.name for origin in registry.origins() if origin.source == "built in"):
            assert any(row.startswith(registry.kind) and row[column:].split()[0] == name for row in rows)


def test_list_does_not_import_torch():
    code = "import sys, encdec_cli.cli as cli; cli.run(['list']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


GOOD = """
from dataclasses import dataclass
from encdec_cli.registry import tasks

@tasks.register("shell_haiku")
@dataclass
class Haiku:
    lines: int = 3
"""


def test_list_shows_plugins_and_the_reason_of_a_broken_one(tmp_path):
    (tmp_path / "haiku.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("raise RuntimeError('no luck\\x1b[31m')\n")
    done = encdec("list", "--plugin", "haiku.py", "--plugin", "broken.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "shell_haiku" in done.stdout
    assert f"broken: plugin {tmp_path / 'broken.py'}: RuntimeError: no luck\\x1b[31m." in done.stdout
    assert done.stderr == f"encdec: error: plugin {tmp_path / 'broken.py'}: RuntimeError: no luck\\x1b[31m.\n"


def test_list_tells_which_extra_is_missing_and_imports_nothing_for_it(tmp_path):
    missing = ("ctranslate2", "babel", "chatterbot_corpus")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n")
    bare = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = encdec("list", env=bare)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row.split("built in")[0].split()[-1]: row for row in done.stdout.splitlines() if "built in" in row}
    assert rows["ctranslate2"].endswith("extra missing: pip install 'encdec-cli[ctranslate2]'")
    for name in ("cldr", "chatterbot"):
        assert rows[name].endswith("extra missing: pip install 'encdec-cli[corpora]'")
    assert rows["files"].endswith("ok")
    (target,) = json.loads(encdec("list", "--json", env=bare).stdout)["export targets"]
    assert target["needs"] == "pip install 'encdec-cli[ctranslate2]'"
    code = (
        "import sys, encdec_cli.cli as cli; cli.run(['list']); "
        f"sys.exit(any(name in sys.modules for name in {missing}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_list_as_json(tmp_path):
    (tmp_path / "haiku.py").write_text(GOOD)
    done = encdec("list", "--json", cwd=tmp_path, env={"ENCDEC_PLUGINS": "haiku.py"})
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert set(result) == {*KINDS, "plugins"}
    assert [row["name"] for row in result["plugins"]] == ["haiku.py"]
    haiku = next(row for row in result["tasks"] if row["name"] == "shell_haiku")
    assert haiku["error"] is None
    assert haiku["source"].endswith(".Haiku")


def test_list_shows_installed_packages_good_and_broken(tmp_path):
    (tmp_path / "goodnet.py").write_text("class Net: pass\n")
    folder = tmp_path / "nets-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: nets\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[encdec.models]\ngood = goodnet:Net\nbad = badnet:Net\n")
    done = encdec("list", env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
    rows = {row.split()[1]: row for row in done.stdout.splitlines() if row.startswith("model ")}
    assert done.returncode == 0  # a package of others that is broken is no error of this command line
    assert rows["good"].split()[2:] == ["nets", "ok"]
    assert "broken: model 'bad' of the installed package nets does not load: ModuleNotFoundError" in rows["bad"]


# Errors.


def run(error, monkeypatch, capsys, debug=False):
    """Run a command that raises `error`; return its exit code and what was said."""

    def failing():
        """Fail."""
        raise error

    monkeypatch.setitem(cli.COMMANDS, "failing", failing)
    code = cli.run(["failing"], debug)
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


ERRORS = [
    (DataError("in.txt:3: bad."), 4, "encdec: error: in.txt:3: bad.\n"),
    (UsageError("a:1:1: x\na:2:1: y"), 2, "encdec: error: 2 mistakes\na:1:1: x\na:2:1: y\n"),
    (DataError("evil\x1b]0;title\x07 \u202e name"), 4, "encdec: error: evil\\x1b]0;title\\x07 \\u202e name\n"),
    (MemoryError(), 6, "encdec: error: out of memory; use a smaller batch or model, or a larger machine.\n"),
    (
        OSError(errno.ENOSPC, "No space left on device", "out.txt"),
        6,
        "encdec: error: out.txt: No space left on device; make room and run the command again.\n",
    ),
    (
        ValueError("oops"),
        1,
        "encdec: error: a failure of ours (ValueError: oops); run again with --debug and report what it shows.\n",
    ),
    (
        AssertionError(),
        1,
        "encdec: error: a failure of ours (AssertionError); run again with --debug and report what it shows.\n",
    ),
    (KeyboardInterrupt(), 130, ""),
    (SystemExit(3), 3, ""),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_is_one_sentence_and_one_exit_code(error, code, sentence, monkeypatch, capsys):
    assert run(error, monkeypatch, capsys) == (code, sentence)


def test_a_worker_that_died_is_not_taken_for_a_reader_that_left(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_stdout_is_broken", lambda: False)
    code, said = run(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch, capsys)
    assert code == ExitCode.FAILURE
    assert "BrokenPipeError" in said


def test_debug_shows_the_traceback_and_the_sentence(monkeypatch, capsys):
    code, said = run(DataError("in.txt:3: bad."), monkeypatch, capsys, debug=True)
    assert code == 4
    assert said.startswith("Traceback ")
    assert said.endswith("\nencdec: error: in.txt:3: bad.\n")


@pytest.mark.parametrize("words", [("--debug", "list", "--plugin", "x.py"), ("list", "--plugin", "x.py", "--debug")])
def test_debug_may_stand_anywhere(words, tmp_path):
    assert "Traceback" in encdec(*words, cwd=tmp_path).stderr
    plain = [word for word in words if word != "--debug"]
    assert "Traceback" not in encdec(*plain, cwd=tmp_path).stderr
    assert "Traceback" in encdec(*plain, cwd=tmp_path, env={"ENCDEC_DEBUG": "1"}).stderr


def test_a_file_called_debug_is_left_alone():
    assert cli._take_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


# Pipes and disks.


def test_a_reader_that_leaves_ends_us_by_sigpipe_without_a_word():
    process = subprocess.Popen([*COMMAND, "list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (-signal.SIGPIPE, b"")


def test_a_stdout_that_is_closed_is_no_failure():
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'encdec_cli', 'list'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_behind_stdout_is_exit_6():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "list"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "encdec: error: the output: No space left on device; make room and run the command again.\n"


def test_a_stderr_that_is_gone_does_not_stop_the_work():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "list", "--plugin", "none.py"], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, check=False
    )
    os.close(writing)
    assert done.returncode == 2
    assert done.stdout.startswith(b"KIND")


# The console.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch):
    def shown(stream, **environment):
        monkeypatch.setattr(sys, "stderr", stream)
        for key, value in {"TERM": "xterm", **environment}.items():
            monkeypatch.setenv(key, value)
        with console.progress("training", total=10, done=3) as bar:
            bar.update(5, "loss 2.5")
        return stream.getvalue()

    assert shown(io.StringIO()) == ""
    assert shown(Terminal(), TERM="dumb") == ""
    assert "loss 2.5" in shown(Terminal())
    # With NO_COLOR the cursor may move, but no colour is set: an SGR sequence with a number from 30 to 49.
    plain = shown(Terminal(), NO_COLOR="1")
    assert "5/10" in plain
    assert not any(f"\x1b[{number}" in plain for number in (*range(30, 50), "38;"))


def test_words_for_people_go_to_stderr(capsys):
    console.say("reading")
    console.warn("line 3 is odd\x1b[2J")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "reading\nencdec: warning: line 3 is odd\\x1b[2J\n")


def test_columns_are_aligned_by_what_is_seen():
    text = console.table([["名前", "x"], ["e\u0301", "y"], ["abcd", ""]])
    assert text == "名前  x\ne\u0301     y\nabcd"


# The generated pages.


@pytest.fixture(scope="module")
def pages():
    # In a process of its own: plugins that other tests registered are no part of the documentation.
    code = "import json, reference; print(json.dumps(reference.pages()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, check=True)
    return json.loads(done.stdout)


def test_the_committed_pages_are_current(pages):
    for name, text in pages.items():
        page = ROOT / "docs" / name
        assert page.is_file(), f"{name} is missing: run python docs/reference.py"
        assert page.read_text(encoding="utf-8") == text, f"{name}: run python docs/reference.py"


def test_a_page_holds_every_option_with_its_meaning(pages):
    page = pages["commands/list.md"]
    assert "```\nencdec list [OPTIONS]\n```" in page
    assert "| `--json` | Write one JSON object. |  |" in page
    assert "| `--plugin` `FILE` | A plugin file to load; repeat for more. |  |" in page


def test_the_page_of_exit_codes_holds_each(pages):
    for code in ExitCode:
        assert f"| {code.value} | " in pages["exit-codes.md"]
