"""Components by name: built in, from a plugin file, from an installed package; and what is said when one fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from encdec_cli import registry
from encdec_cli.errors import UsageError
from encdec_cli.registry import Origin, Registry, load_plugin, load_plugins


@pytest.fixture
def kinds():
    return Registry("encdec.tests.none", "model", {"path": "pathlib:Path", "broken": "encdec_cli.no_such:Thing"})


class Gru:
    """A component."""


class Other:
    """Another component."""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages: a good one and one that fails at import."""
    for name, code in {"goodnet": "class Net: pass\n", "badnet": "raise RuntimeError('no such chip')\n"}.items():
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / f"{name}_dist-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[encdec.tests.packages]\n{name} = {name}:Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Registry("encdec.tests.packages", "model", {"path": "pathlib:Path"})


def test_a_built_in_is_imported_when_it_is_asked_for(kinds):
    assert kinds.names() == ["path", "broken"]  # listing has imported neither
    assert kinds.get("path") is Path


def test_a_decorated_class_is_found(kinds):
    assert kinds.register("gru")(Gru) is Gru
    assert kinds.get("gru") is Gru
    assert Origin("gru", f"{__name__}.Gru") in kinds.origins()


def test_a_taken_name_tells_by_whom(kinds):
    kinds.register("gru")(Gru)
    kinds.register("gru")(Gru)  # the same class again is harmless
    with pytest.raises(UsageError, match=rf"model 'gru' \({__name__}.Other\): already registered by {__name__}.Gru"):
        kinds.register("gru")(Other)
    with pytest.raises(UsageError, match=rf"model 'path' \({__name__}.Gru\): the name is built in; choose another"):
        kinds.register("path")(Gru)


def test_an_unknown_name_draws_the_known_ones_and_the_nearest(kinds):
    with pytest.raises(UsageError) as caught:
        kinds.get("brokn")
    assert str(caught.value) == (
        "no model 'brokn' among path, broken (did you mean 'broken'?); a component of your own needs --plugin FILE."
    )
    with pytest.raises(UsageError, match="among path, broken; a component"):
        kinds.get("xyz")


def test_an_installed_package_brings_a_component(packages):
    assert packages.names()[0] == "path"
    assert set(packages.names()) == {"path", "goodnet", "badnet"}
    assert packages.get("goodnet").__name__ == "Net"


def test_a_broken_package_is_named_and_harms_no_other(packages):
    reason = (
        "model 'badnet' of the installed package badnet-dist does not load: RuntimeError: no such chip; "
        "update or remove that package."
    )
    with pytest.raises(UsageError) as caught:
        packages.get("badnet")
    assert str(caught.value) == reason
    assert set(packages.origins()) == {
        Origin("path", "built in"),
        Origin("goodnet", "goodnet-dist"),
        Origin("badnet", "badnet-dist", reason),
    }


PLUGIN = """
from encdec_cli.registry import metrics

@metrics.register("registry_test_length")
class Length:
    pass
"""


def test_a_plugin_file_registers_once_however_often_it_is_loaded(tmp_path):
    path = tmp_path / "length.py"
    path.write_text(PLUGIN)
    first = load_plugin(path)
    assert registry.metrics.get("registry_test_length").__name__ == "Length"
    assert load_plugin(path) == first
    assert len(first.sha256) == 64
    assert first.path == path


FAULTS = {
    "1 / 0\n": "ZeroDivisionError: division by zero.",
    "import no_such_module_of_ours\n": "ModuleNotFoundError: No module named 'no_such_module_of_ours'.",
    "def f(:\n": "SyntaxError: invalid syntax",
}


@pytest.mark.parametrize(("code", "reason"), FAULTS.items())
def test_a_plugin_that_fails_is_named_with_the_reason(tmp_path, code, reason):
    path = tmp_path / "bad.py"
    path.write_text(code)
    for _ in range(2):  # a failed plugin is not half there the second time
        with pytest.raises(UsageError) as caught:
            load_plugin(path)
        assert str(caught.value).startswith(f"plugin {path}: {reason}")


def test_a_plugin_that_takes_a_built_in_name_is_refused(tmp_path):
    path = tmp_path / "bleu.py"
    path.write_text(PLUGIN.replace("registry_test_length", "bleu"))
    with pytest.raises(UsageError, match=r"metric 'bleu' .*the name is built in"):
        load_plugin(path)


def test_a_missing_plugin_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_plugin(tmp_path / "none.py")
    assert str(caught.value) == (
        f"plugin {tmp_path / 'none.py'}: No such file or directory; give the path of a Python file."
    )


def test_plugins_of_the_environment(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n")
    monkeypatch.setenv("ENCDEC_PLUGINS", f"{tmp_path / 'one.py'}:{tmp_path / 'two.py'}")
    assert [plugin.path.name for plugin in load_plugins([])] == ["one.py", "two.py"]
    monkeypatch.delenv("ENCDEC_PLUGINS")
    assert load_plugins([]) == []


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_built_in_of_the_table_exists(kind):
    for origin in registry.KINDS[kind].origins():
        if origin.source == "built in":
            assert isinstance(registry.KINDS[kind].get(origin.name), type)


def test_listing_names_imports_nothing():
    code = (
        "import sys; from encdec_cli.registry import KINDS\n"
        "assert all(kind.names() for kind in KINDS.values())\n"
        "ours = {name for name in sys.modules if name.startswith('encdec_cli')}\n"
        "assert ours == {'encdec_cli', 'encdec_cli.errors', 'encdec_cli.registry'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
