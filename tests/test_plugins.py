"""Components of a stranger: the very files of docs/plugins.md, through the commands, as files and as a package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from encdec_cli.bundle.bundle import Bundle, build_model, changed_plugins
from encdec_cli.config import parse_component
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.recipe import from_resolved
from encdec_cli.registry import Plugin, load_plugin, strategies
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.tokenizer import Word
from tests.conftest import copy_task, encdec, environment, save, write_lines

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
GRU, HAIKU, COIN = (EXAMPLES / f"{name}.py" for name in ("gru", "haiku", "coin"))
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
QUICK = ("train.steps=20", "train.validate_every=20", "train.save_every=20", "train.valid_lines=5")
GRU_MODEL = "model={name: gru, hidden: 32}"
LINES = "".join(f"{number} {number * 7 % 10} 4\n" for number in range(10))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(run: Path) -> list[tuple[str, str]]:
    description = json.loads((run / "bundle" / "bundle.json").read_text())
    return [(plugin["name"], plugin["sha256"]) for plugin in description["plugins"]]


def poems(folder: Path) -> Path:
    """A corpus of digits and poems of three lines about them; returns a recipe without `task` and `decoding`."""
    recipe = copy_task(folder)
    for split, count in (("train", 300), ("valid", 10), ("test", 10)):
        digits = [str(number % 10) for number in range(count)]
        write_lines(folder / f"{split}.src", digits)
        write_lines(folder / f"{split}.tgt", [f"{digit} 1 / {digit} 2 / {digit} 3" for digit in digits])
    kept = [line for line in recipe.read_text().splitlines() if not line.startswith(("task:", "decoding:"))]
    recipe.write_text("\n".join(kept) + "\n")
    return recipe


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_page_shows_each_example_whole(path):
    assert path.read_text(encoding="utf-8") in blocks("python"), f"copy {path.name} into docs/plugins.md again"
    code = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(code) <= 50


def test_the_page_names_every_kind_and_group():
    from encdec_cli.registry import KINDS

    for registry in KINDS.values():
        assert f"`{registry.group}`" in PAGE


# --- a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gru_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gru")
    run = folder / "run"
    done = encdec("train", copy_task(folder / "corpus"), "--plugin", GRU, GRU_MODEL, *QUICK, "--output", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def gru_lines(gru_run) -> list[str]:
    """What the model of the plugin writes with the recipe's beam search."""
    done = encdec("generate", "--model", gru_run, "--plugin", GRU, stdin=LINES)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_model_of_a_plugin_is_trained_and_used(gru_run, gru_lines):
    assert recorded(gru_run) == [("gru.py", sha256(GRU))]
    assert len(gru_lines) == len(LINES.splitlines())
    assert set("".join(gru_lines)) <= set("0123456789 ")
    assert any(gru_lines)


def test_a_model_named_in_the_plugins_of_a_recipe(tmp_path):
    recipe = copy_task(tmp_path / "corpus")
    recipe.write_text(f"plugins: ['{GRU}']\n" + recipe.read_text())
    done = encdec("train", recipe, GRU_MODEL, "--dry-run", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "the recipe is good" in done.stderr


def test_a_bundle_runs_no_code_and_tells_which_plugin_it_needs(gru_run):
    done = encdec("generate", "--model", gru_run, stdin=LINES)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("encdec: error: ")
    assert done.stderr.endswith(
        "model.name: no model 'gru' among transformer; the model was made with gru.py "
        f"(sha256 {sha256(GRU)[:12]}), pass --plugin gru.py\n"
    )
    assert done.stderr.count("\n") == 1


def test_a_changed_plugin_draws_a_warning_with_both_hashes(gru_run, gru_lines, tmp_path):
    changed = tmp_path / "gru.py"
    changed.write_text(GRU.read_text() + "# not as it was\n")
    done = encdec("generate", "--model", gru_run, "--plugin", changed, stdin=LINES)
    assert done.returncode == 0
    assert done.stdout.splitlines() == gru_lines
    assert done.stderr == (
        f"encdec: warning: plugin {changed} is not the gru.py that {gru_run} was made with "
        f"(sha256 {sha256(GRU)[:12]} then, {sha256(changed)[:12]} now); outputs may differ\n"
    )


# --- a strategy --------------------------------------------------------------------------------------------------


def test_a_strategy_of_a_plugin_searches_with_a_model_of_another(gru_run, gru_lines):
    words = ("generate", "--model", gru_run, "--plugin", COIN, "--strategy", "coin,bias=0.3")
    done = encdec(*words, stdin=LINES, ENCDEC_PLUGINS=str(GRU))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(gru_lines)
    assert done.stdout.splitlines() != gru_lines


def test_the_keys_of_a_plugin_are_checked_like_those_of_a_built_in():
    load_plugin(COIN)
    assert parse_component("coin,bias=0.3", strategies, "--strategy").bias == 0.3
    with pytest.raises(UsageError, match=r"bais: unknown key \(did you mean 'bias'\?\)"):
        parse_component("coin,bais=0.3", strategies, "--strategy")


# --- a task, all through a recipe --------------------------------------------------------------------------------


def test_a_recipe_brings_a_task_and_a_strategy(tmp_path):
    recipe = poems(tmp_path / "corpus")
    (section,) = blocks("yaml")
    recipe.write_text(section + recipe.read_text())
    for path in (HAIKU, COIN):
        shutil.copy(path, recipe.parent)
    run = tmp_path / "run"
    words = ("train.steps=150", "train.validate_every=150", "train.rate=5e-3", "model.dropout=0.0")
    done = encdec("train", recipe, *words, "--plugin", COIN, "--output", run, ENCDEC_PLUGINS=str(GRU))
    assert done.returncode == 0, done.stderr
    # Those of the environment too, each content once.
    assert recorded(run) == [(path.name, sha256(path)) for path in (GRU, COIN, HAIKU)]
    chosen = json.loads((run / "bundle" / "bundle.json").read_text())["recipe"]
    assert (chosen["task"], chosen["decoding"]["bias"]) == ({"name": "haiku", "lines": 2}, 0.9)

    record = json.dumps({"theme": "7", "poet": "anonymous"})
    words = ("generate", "--json", "--model", run, "--plugin", HAIKU, "--plugin", COIN)
    done = encdec(*words, stdin=f"{record}\n" + "".join(f"{digit}\n" for digit in range(10)))
    assert (done.returncode, done.stderr) == (0, "")
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert outputs[0]["poet"] == "anonymous"
    texts = [output["text"] for output in outputs]
    assert len(texts) == 11
    # The model has learned three lines, `lines: 2` keeps two; the coin now and then spoils one.
    assert all(text.count(" / ") <= 1 and "<line>" not in text for text in texts)
    assert sum(bool(re.fullmatch(r"\d 1 / \d 2", text)) for text in texts) >= 3


# --- an installed package ----------------------------------------------------------------------------------------


def install(folder: Path, distribution: str, entry_points: str) -> None:
    information = folder / f"{distribution}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a command where the package of the page is installed, and a broken one."""
    folder = tmp_path / "site"
    (section,) = blocks("toml")
    # What a build makes of the page's pyproject.toml.
    section = re.sub(r'^\[project\.entry-points\."(.+)"\]$', r"[\1]", section, flags=re.MULTILINE)
    install(folder, "poets", re.sub(r'"(.+:.+)"', r"\1", section))
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").write_text("")
    for path in (GRU, HAIKU, COIN):
        shutil.copy(path, folder / "mine")
    groups = "".join(f"[encdec.{kind}]\nwreck = wreck:Thing\n" for kind in ("models", "tasks", "strategies"))
    install(folder, "wrecks", groups)
    (folder / "wreck.py").write_text("raise OSError('no such chip')\n")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def test_an_installed_package_needs_no_flag_and_a_broken_one_harms_nothing(tmp_path, installed):
    recipe, run = poems(tmp_path / "corpus"), tmp_path / "run"
    chosen = (GRU_MODEL, "task={name: haiku, lines: 2}", "decoding={name: coin, bias: 0.9}")
    done = encdec("train", recipe, *chosen, *QUICK, "--output", run, **installed)
    assert done.returncode == 0, done.stderr
    assert recorded(run) == []
    done = encdec("generate", "--model", run, "--strategy", "coin,bias=0.5", stdin="1\n2\n", **installed)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 2)

    done = encdec("list", **installed)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines()]
    for kind, name in (("model", "gru"), ("task", "haiku"), ("strategy", "coin")):
        assert [kind, name, "poets", "ok"] in rows
        reason = f"broken: {kind} 'wreck' of the installed package wrecks does not load: OSError: no such chip; "
        assert [kind, "wreck", "wrecks", reason + "update or remove that package."] in rows


# --- the laws ----------------------------------------------------------------------------------------------------


def test_the_tests_of_the_page_pass(tmp_path):
    (tests,) = [block for block in blocks("python") if "def test_" in block]
    (tmp_path / "test_mine.py").write_text(tests)
    for path in (GRU, COIN):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


# --- what a bundle says of plugins -------------------------------------------------------------------------------


def make_bundle(plugins: list[Plugin]) -> Bundle:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "heads": 2, "feed_forward": 8}
    recipe = from_resolved(
        {
            "task": {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "model": {"name": "transformer", **sizes},
        }
    )
    tokenizer = Word.train(["a b c"], TokenizerOptions(size=10))
    model = build_model(recipe, len(tokenizer.vocabulary), len(tokenizer.vocabulary))
    return Bundle(recipe, model, tokenizer, tokenizer, plugins=plugins)


def test_a_bundle_that_is_loaded_and_saved_still_names_its_plugins(tmp_path):
    given = [Plugin(Path("/somewhere/a.py"), "a" * 64), Plugin(Path("/else/a.py"), "a" * 64)]
    save(make_bundle([*given, Plugin(Path("b.py"), "b" * 64)]), tmp_path / "one")
    loaded = Bundle.load(tmp_path / "one")  # a plugin that the recipe does not need is not asked for
    assert loaded.plugins == [Plugin(Path("a.py"), "a" * 64), Plugin(Path("b.py"), "b" * 64)]
    save(loaded, tmp_path / "two")
    assert (tmp_path / "one" / "bundle.json").read_bytes() == (tmp_path / "two" / "bundle.json").read_bytes()


def test_only_a_file_of_the_same_name_and_other_bytes_is_a_changed_plugin(tmp_path):
    same, other = Plugin(Path("/x/a.py"), "a" * 64), Plugin(Path("/x/c.py"), "c" * 64)
    changed = Plugin(Path("/x/b.py"), "c" * 64)
    save(make_bundle([Plugin(Path("a.py"), "a" * 64), Plugin(Path("b.py"), "b" * 64)]), tmp_path / "model")
    assert changed_plugins(tmp_path / "model", [same, other]) == []
    (sentence,) = changed_plugins(tmp_path / "model", [same, other, changed])
    assert sentence.startswith(f"plugin /x/b.py is not the b.py that {tmp_path / 'model'} was made with")
    assert "bbbbbbbbbbbb then, cccccccccccc now" in sentence


@pytest.mark.parametrize("plugins", [[{"name": "a.py"}], [7], 7, [{"name": 7, "sha256": "a"}], [{"name": "a"}]])
def test_damaged_records_of_plugins_are_told(tmp_path, plugins):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "plugins": plugins}))
    with pytest.raises(BundleError, match=r"bundle.json: 'plugins' lacks name or sha256"):
        changed_plugins(tmp_path, [])
