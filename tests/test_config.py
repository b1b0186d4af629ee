"""Recipes: one wrong recipe per kind of mistake with its exact message, hostile files, overrides, ways in and out."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli import recipe
from encdec_cli.config import Chosen, Component, Unchecked, loader, parse_component
from encdec_cli.config import tree as yaml_tree
from encdec_cli.config.mistakes import Mistakes
from encdec_cli.config.schema import descriptions
from encdec_cli.config.tree import Place, PlacedError
from encdec_cli.errors import UsageError
from encdec_cli.registry import Registry


@dataclass
class Side:
    """Files of one split."""

    source: str | int
    """Path or column."""
    target: str = ""


@dataclass
class Pairs:
    """A corpus."""

    root: Path = Path()
    train: Side | None = None
    parts: list[Side] = field(default_factory=list)
    range: tuple[float, float] = (0.0, 1.0)
    copy: bool = False


class Net:
    """A component with weights."""

    @dataclass
    class Config:
        """Its keys."""

        d_model: int = 512
        """Width."""
        heads: int = 8
        encoder_layers: int = 6
        norm: Literal["pre", "post"] = "pre"

        def __post_init__(self):
            if not self.heads:
                raise ValueError("heads is 0; none is too few")
            if self.encoder_layers < 1:
                raise ValueError(f"encoder_layers: {self.encoder_layers} must be at least 1")
            if self.d_model % self.heads:
                raise ValueError(f"d_model ({self.d_model}) must be a multiple of heads ({self.heads})")

    def __init__(self, config, *sizes):
        self.config = config
        self.sizes = sizes


class Bare:
    """A component whose author forgot the Config."""


@dataclass
class Step:
    """Plain keys."""

    steps: int = 10
    warmup: int = 4
    rate: float = 1e-3
    shared: bool = True
    label: str = ""
    limit: int | None = None


kinds = Registry("encdec.tests.kinds", "model", {})
kinds.register("net")(Net)
kinds.register("pairs")(Pairs)
kinds.register("bare")(Bare)


@dataclass(kw_only=True)
class Plan:
    """A small recipe."""

    data: Annotated[Component, Chosen(kinds)]
    model: Annotated[Component, Chosen(kinds, "net")]
    train: Step = field(default_factory=Step)
    names: list[str] = field(default_factory=list)


def read_plan(path, overrides=(), sections=None):
    mistakes = Mistakes()
    return loader.build(loader.read(path, overrides, mistakes), Plan, mistakes, sections)


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_and_load(text, *overrides, sections=None):
        Path("r.yaml").write_text(text, encoding="utf-8")
        return read_plan(Path("r.yaml"), overrides, sections)

    return write_and_load


GOOD = "data: {name: pairs}\n"

WRONG = {
    "unknown key": (GOOD + "train: {warm_up: 3}", "r.yaml:2:9: train.warm_up: unknown key (did you mean 'warmup'?)"),
    "unknown key, nothing near": (
        GOOD + "train:\n  zzz: 3",
        "r.yaml:3:3: train.zzz: unknown key; expected steps, warmup, rate, shared, label, limit",
    ),
    "unknown section": (GOOD + "trian: {}", "r.yaml:2:1: trian: unknown key (did you mean 'train'?)"),
    "wrong type": (GOOD + "model:\n  heads: eight", "r.yaml:3:10: model.heads: expected int, found 'eight'"),
    "quoted number": (GOOD + "train: {steps: '5'}", "r.yaml:2:16: train.steps: expected int, found '5'"),
    "float for int": (GOOD + "train: {steps: 1.5}", "r.yaml:2:16: train.steps: expected int, found 1.5"),
    "bool for int": (GOOD + "train: {steps: true}", "r.yaml:2:16: train.steps: expected int, found true"),
    "word for float": (GOOD + "train: {rate: fast}", "r.yaml:2:15: train.rate: expected float, found 'fast'"),
    "infinite": (GOOD + "train: {rate: .inf}", "r.yaml:2:15: train.rate: expected a finite number, found inf"),
    "not a number": (GOOD + "train: {rate: .nan}", "r.yaml:2:15: train.rate: expected a finite number, found nan"),
    "yes is a word": (GOOD + "train: {shared: yes}", "r.yaml:2:17: train.shared: expected true or false, found 'yes'"),
    "number for word": (GOOD + "train: {label: 3}", "r.yaml:2:16: train.label: expected str, found 3"),
    "nothing for int": (GOOD + "train: {steps: }", "r.yaml:2:15: train.steps: expected int, found nothing"),
    "choice": (
        GOOD + "model: {norm: prae}",
        "r.yaml:2:15: model.norm: expected 'pre' or 'post', found 'prae' (did you mean 'pre'?)",
    ),
    "no section": (GOOD + "train: 5", "r.yaml:2:8: train: expected a section, found 5"),
    "no list": (GOOD + "names: x", "r.yaml:2:8: names: expected a list, found 'x'"),
    "item of a list": (GOOD + "names: [a, 2]", "r.yaml:2:12: names[1]: expected str, found 2"),
    "missing section": ("train: {}", "r.yaml:1:1: data.name: missing; choose among net, pairs, bare"),
    "empty file": ("", "r.yaml:1:1: data.name: missing; choose among net, pairs, bare"),
    "missing name": ("data: {root: x}", "r.yaml:1:7: data.name: missing; choose among net, pairs, bare"),
    "unknown name": (
        "data: {name: pair}",
        "r.yaml:1:14: data.name: no model 'pair' among net, pairs, bare (did you mean 'pairs'?)",
    ),
    "name is no word": ("data: {name: [1]}", "r.yaml:1:14: data.name: no model a list among net, pairs, bare"),
    "component is no section": (
        GOOD + "model: net",
        "r.yaml:2:8: model: expected a section such as {name: net}, found 'net'",
    ),
    "component without Config": (
        GOOD + "model: {name: bare}",
        "r.yaml:2:1: model: 'bare' cannot be configured: class Bare has no dataclass Config",
    ),
    "keys of another component": (
        GOOD + "model: {name: net, root: x}",
        "r.yaml:2:20: model.root: unknown key; expected d_model, heads, encoder_layers, norm",
    ),
    "contradiction of one key": (
        GOOD + "model: {encoder_layers: 0}",
        "r.yaml:2:25: model.encoder_layers: 0 must be at least 1",
    ),
    "contradictions of several keys, and none that a default makes": (
        GOOD + "model: {encoder_layers: 0, heads: 0, d_model: 9}",
        "r.yaml:2:25: model.encoder_layers: 0 must be at least 1\nr.yaml:2:35: model.heads: 0; none is too few",
    ),
    "contradictions of a key, and of several": (
        GOOD + "model: {encoder_layers: 0, heads: 7}",
        "r.yaml:2:25: model.encoder_layers: 0 must be at least 1",
    ),
    "contradiction": (
        GOOD + "model: {heads: 7}",
        "r.yaml:2:1: model: d_model (512) must be a multiple of heads (7)",
    ),
    "nested unknown": (
        "data: {name: pairs, train: {source: a, traget: b}}",
        "r.yaml:1:40: data.train.traget: unknown key (did you mean 'target'?)",
    ),
    "nested missing": ("data:\n  name: pairs\n  train:\n    target: b", "r.yaml:4:5: data.train.source: missing"),
    "nested in a list": (
        "data: {name: pairs, parts: [{source: a}, {source: 1, target: 2}]}",
        "r.yaml:1:62: data.parts[1].target: expected str, found 2",
    ),
    "union": (
        "data: {name: pairs, train: {source: [a]}}",
        "r.yaml:1:37: data.train.source: expected str or int, found a list",
    ),
    "tuple too short": (
        "data: {name: pairs, range: [1]}",
        "r.yaml:1:28: data.range[1]: missing",
    ),
    "a key of several lines": (
        GOOD + '"a\\nb.yaml:1:1: c": 2',
        "r.yaml:2:1: a\\nb.yaml:1:1: c: unknown key; expected data, model, train, names",
    ),
    "root is a list": ("- a", "r.yaml:1:1: expected sections such as 'train:', found a list"),
    "root is a word": ("hello", "r.yaml:1:1: expected sections such as 'train:', found 'hello'"),
    "duplicate key": (
        GOOD + "train: {steps: 1, steps: 2}",
        "r.yaml:2:19: duplicate key 'steps'; it stands already at r.yaml:2:9",
    ),
    "tab": (
        GOOD + "train:\n\tsteps: 1",
        "r.yaml:3:1: not valid YAML: found character '\\t' that cannot start any token",
    ),
    "unclosed": (GOOD + "train: {steps: 1", "r.yaml:2:17: not valid YAML: expected ',' or '}', but got '<stream end>'"),
    "python tag": (
        "data: !!python/object/apply:os.system [exit]",
        "r.yaml:1:7: tags (tag:yaml.org,2002:python/object/apply:os.system) are not allowed; write the plain value",
    ),
    "tag on a key": (
        "!!str data: {}",
        "r.yaml:1:1: tags (tag:yaml.org,2002:str) are not allowed; write the plain value",
    ),
    "anchor": ("data: &a [x]", "r.yaml:1:7: anchors (&a) are not allowed; write the value out where it is used"),
    "alias": ("data: [*a]", "r.yaml:1:8: aliases (*a) are not allowed; write the value out"),
    "second document": ("a: 1\n---\nb: 2", "r.yaml:2:1: a second document (---); a recipe is one document"),
    "key is a list": ("[a]: 1", "r.yaml:1:1: a key must be a word"),
    "NUL": ("data: a\0b", "r.yaml:1:8: a character that YAML does not allow in a file"),
    "control characters are shown, not sent": (
        GOOD + 'train: {label: 1, "a\\e[31m": 2}',
        "r.yaml:2:16: train.label: expected str, found 1\n"
        "r.yaml:2:19: train.a\\x1b[31m: unknown key; expected steps, warmup, rate, shared, label, limit",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_each_mistake_is_told_at_its_place(load, text, message):
    with pytest.raises(UsageError) as caught:
        load(text)
    assert str(caught.value) == message


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(load):
    text = "data:\n  name: pairs\n  parts: 3\nmodel: {name: nett}\ntrain: {steps: x, warm_up: 1}\nzzz: 1\n"
    with pytest.raises(UsageError) as caught:
        load(text, "train.rate=slow", "names=[1]")
    assert str(caught.value).split("\n") == [
        "r.yaml:3:10: data.parts: expected a list, found 3",
        "r.yaml:4:15: model.name: no model 'nett' among net, pairs, bare (did you mean 'net'?)",
        "r.yaml:5:16: train.steps: expected int, found 'x'",
        "r.yaml:5:19: train.warm_up: unknown key (did you mean 'warmup'?)",
        "r.yaml:6:1: zzz: unknown key; expected data, model, train, names",
        "names=[1]: names[0]: expected str, found 1",
        "train.rate=slow: expected float, found 'slow'",
    ]


def test_very_many_mistakes_are_cut(load):
    with pytest.raises(UsageError) as caught:
        load(GOOD + "train:\n" + "".join(f"  key{i}: 1\n" for i in range(80)))
    lines = str(caught.value).split("\n")
    assert len(lines) == 51
    assert lines[-1] == "and 30 more mistakes"


OVERRIDES = {
    "train.steps=x": "train.steps=x: expected int, found 'x'",
    "train.warm_up=3": "train.warm_up=3: unknown key (did you mean 'warmup'?)",
    "trian.steps=3": "trian.steps=3: trian: unknown key (did you mean 'train'?)",
    "model.name=nett": "model.name=nett: no model 'nett' among net, pairs, bare (did you mean 'net'?)",
    "train={warm_up: 1}": "train={warm_up: 1}: train.warm_up: unknown key (did you mean 'warmup'?)",
    "train.steps": "train.steps: expected an override such as train.steps=100",
    "=3": "=3: expected an override such as train.steps=100",
    "train..steps=3": "train..steps=3: expected an override such as train.steps=100",
    "data.name.x=3": "data.name.x=3: r.yaml:1:14 is not a section; it has no keys to override",
    "names=[a": "names=[a: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "names=[!!str a]": "names=[!!str a]: tags (tag:yaml.org,2002:str) are not allowed; write the plain value",
    "model.heads=0": "model.heads=0: 0; none is too few",
    "model.heads=7": "r.yaml:2:1: model: d_model (512) must be a multiple of heads (7)",
}


@pytest.mark.parametrize(("word", "message"), OVERRIDES.items())
def test_an_override_is_checked_as_the_file_is(load, word, message):
    with pytest.raises(UsageError) as caught:
        load(GOOD + "model: {name: net}\n", word)
    assert str(caught.value) == message


def test_another_name_over_the_keys_of_a_section_is_one_mistake_with_its_remedy(load):
    text = GOOD + "model: {heads: 2, d_model: 4, norm: post}\n"
    with pytest.raises(UsageError) as caught:
        load(text, "model.name=pairs")
    assert str(caught.value) == (
        "model.name=pairs: the section at r.yaml:2:1 has keys that pairs does not know (heads, d_model, norm); "
        "give it whole, such as 'model={name: pairs}'"
    )
    assert load(text, "model={name: pairs}").model.config == Pairs()
    assert load(text, "model={name: pairs}", "model.copy=true").model.config == Pairs(copy=True)


def test_what_a_recipe_means(load):
    plan = load(
        "data:\n  name: pairs\n  root: a/b\n  train: {source: 3, target: no}\n  range: [0, 1]\n  copy: true\n"
        "model: {d_model: 1_024}\ntrain: {rate: 5e-4, steps: 100_000, limit: null}\nnames: [no, 0o17, '1']\n".replace(
            "0o17", "x"
        )
    )
    assert plan.data.config == Pairs(Path("a/b"), Side(3, "no"), [], (0.0, 1.0), True)
    assert plan.data.build() is plan.data.config
    assert plan.model == Component("net", Net.Config(d_model=1024), Net)
    assert plan.model.build(5, 6).sizes == (5, 6)
    assert plan.train == Step(steps=100_000, rate=5e-4)
    assert plan.names == ["no", "x", "1"]


def test_an_int_is_good_for_a_float_and_becomes_one(load):
    rate = load(GOOD + "train: {rate: 1}").train.rate
    assert isinstance(rate, float)
    assert rate == 1.0


def test_empty_sections_and_absent_ones_have_their_defaults(load):
    assert load(GOOD + "train:\nmodel:\n") == load(GOOD)
    assert load(GOOD).model.config == Net.Config()


def test_overrides_win_and_make_sections(load):
    plan = load(GOOD + "train: {steps: 1}", "train.steps=2", "model.heads=4", "data.train.source=x", "names=[a, b]")
    assert (plan.train.steps, plan.model.config.heads) == (2, 4)
    assert plan.data.config.train == Side("x")
    assert plan.names == ["a", "b"]


def test_a_value_of_an_override_is_taken_as_it_stands(load):
    assert load(GOOD, "train.label=a: b #c, d = e ").train.label == "a: b #c, d = e "


def test_only_the_sections_in_use_are_checked_but_every_top_level_key(load):
    text = GOOD + "model: {name: nothing}\ntrain: {zzz: 1}\n"
    plan = load(text, sections={"data"})
    assert plan.train == Unchecked({"zzz": 1})
    assert plan.model == Unchecked({"name": "nothing"})
    with pytest.raises(UsageError, match=r"^r.yaml:4:1: zzz: unknown key; expected data, model, train, names$"):
        load(text + "zzz: 1", sections={"data"})


SCALARS = [
    ("no", "no"),
    ("on", "on"),
    ("True", True),
    ("FALSE", False),
    ("tRue", "tRue"),
    ("~", None),
    ("", None),
    ("Null", None),
    ("12", 12),
    ("-1_000", -1000),
    ("1__0", "1__0"),
    ("_1", "_1"),
    ("0o17", 15),
    ("0x1F", 31),
    ("010", 10),
    ("5e-4", 0.0005),
    ("1.", 1.0),
    (".5", 0.5),
    ("+1.5E+3", 1500.0),
    ("1_0.2_5", 10.25),
    ("12:30:45", "12:30:45"),
    ("2024-01-01", "2024-01-01"),
    ("1e", "1e"),
    ("-", "-"),
    ("9" * 500, "9" * 500),
    ("١٢", "١٢"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_yaml_1_2(text, value):
    found = yaml_tree.scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_scalars_stay_words():
    tree = yaml_tree.parse("""{a: '1', b: "true", c: 'no'}""", "x")
    assert yaml_tree.plain(tree) == {"a": "1", "b": "true", "c": "no"}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_endless_nesting_is_refused(opening):
    with pytest.raises(PlacedError, match="nested deeper than 50 levels"):
        yaml_tree.parse(opening * 20_000, "x")


def test_a_bomb_of_aliases_is_refused_at_once():
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    with pytest.raises(PlacedError, match="anchors"):
        yaml_tree.parse("\n".join(lines), "x")


def test_files_that_are_no_recipes(tmp_path):
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (yaml_tree.LIMIT + 1))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"data: x\ntask: caf\xe9\n")
    cases = {
        big: f"{big}: larger than 1048576 bytes; a recipe is a short text file.",
        latin: f"{latin}:2:10: not UTF-8; save the file as UTF-8 text",
        tmp_path: f"{tmp_path}: Is a directory; give the path of a recipe.",
        tmp_path / "none.yaml": f"{tmp_path / 'none.yaml'}: No such file or directory; give the path of a recipe.",
    }
    for path, message in cases.items():
        with pytest.raises(UsageError) as caught:
            read_plan(path)
        assert str(caught.value) == message


def test_a_byte_order_mark_is_no_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_plan(path).data.name == "pairs"


@given(st.text(max_size=200))
def test_any_text_is_a_tree_or_one_placed_mistake(text):
    mistakes = []
    try:
        yaml_tree.parse(text, "x")
    except PlacedError as error:
        mistakes.append(str(error.place))
    assert all(re.match(r"x:\d+:\d+$", place) for place in mistakes)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_what_is_written_reads_back(value):
    found = yaml_tree.plain(yaml_tree.parse(yaml_tree.write(value), "x"))
    assert found == value
    assert json.dumps(found) == json.dumps(value)


steps = st.builds(
    Step,
    steps=st.integers(),
    warmup=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    shared=st.booleans(),
    label=st.text(),
    limit=st.none() | st.integers(),
)


@settings(max_examples=30)
@given(steps)
def test_overrides_round_trip(wanted):
    tree = yaml_tree.parse(GOOD, "x")
    mistakes = Mistakes()
    for key, value in vars(wanted).items():
        loader.override(tree, f"train.{key}={yaml_tree.write(value)}")
    assert loader.build(tree, Plan, mistakes).train == wanted


COMPONENTS = {
    "nett": "--x nett: no model 'nett' among net, pairs, bare (did you mean 'net'?)",
    "": "--x : no model '' among net, pairs, bare",
    "net,zzz=3": "--x net,zzz=3: zzz: unknown key; expected d_model, heads, encoder_layers, norm",
    "net,head=3": "--x net,head=3: head: unknown key (did you mean 'heads'?)",
    "net,heads=x": "--x net,heads=x: heads: expected int, found 'x'",
    "net,heads": "--x net,heads: 'heads': expected key=value, each key once",
    "net,heads=1,heads=2": "--x net,heads=1,heads=2: 'heads=2': expected key=value, each key once",
    "net,name=pairs": "--x net,name=pairs: 'name=pairs': expected key=value, each key once",
    "net,heads=7": "--x net,heads=7: d_model (512) must be a multiple of heads (7)",
    "pairs,range=[1": "--x pairs,range=[1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "pairs,train={sourc: 1}": (
        "--x pairs,train={sourc: 1}: train.source: missing\n"
        "--x pairs,train={sourc: 1}: train.sourc: unknown key (did you mean 'source'?)"
    ),
}


@pytest.mark.parametrize(("text", "message"), COMPONENTS.items())
def test_a_component_of_the_command_line_is_checked(text, message):
    with pytest.raises(UsageError) as caught:
        parse_component(text, kinds, "--x")
    assert sorted(str(caught.value).split("\n")) == sorted(message.split("\n"))


def test_a_component_of_the_command_line():
    assert parse_component("net", kinds, "--x") == Net.Config()
    assert parse_component("net,heads=4,norm=post", kinds, "--x") == Net.Config(heads=4, norm="post")
    pairs = parse_component("pairs,range=[0.5, 1],root='a,b',train={source: 1, target: x}", kinds, "--x")
    assert pairs == Pairs(root=Path("a,b"), range=(0.5, 1.0), train=Side(1, "x"))


# The sections of a real recipe.


def test_the_sections_hold_exactly_the_keys_that_were_agreed():
    text = "tokenizer algorithm vocabulary shared max_source max_target too_long"
    train = (
        "steps tokens checkpointing compile accumulate optimizer rate betas weight_decay warmup schedule clip "
        "label_smoothing precision on_nan save_every keep validate_every valid_lines metric patience ema freeze "
        "average average_of log_every tensorboard seed threads"
    )
    assert " ".join(vars(recipe.Text())) == text
    assert " ".join(vars(recipe.Train())) == train
    assert " ".join(vars(recipe.Lora())) == "rank alpha targets whole"
    regularize = "rdrop smoothing_prior subword_sampling word_dropout_source word_dropout_target word_dropout_warmup"
    assert " ".join(vars(recipe.Regularize())) == regularize
    assert " ".join(vars(recipe.Risk())) == "metric samples sharpness weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "0", "expected at least 1, found 0"),
        ("tokens", "0", "expected at least 1 or 'auto', found 0"),
        ("rate", "0", "expected above 0, found 0"),
        ("label_smoothing", "1", "expected below 1, found 1"),
        ("ema", "1", "expected below 1, found 1"),
        ("threads", "-1", "expected at least 0, found -1"),
    ],
)
def test_impossible_training_is_refused(tmp_path, key, value, message):
    path = tmp_path / "r.yaml"
    path.write_text(f"train: {{{key}: {value}}}\n")
    with pytest.raises(UsageError) as caught:
        recipe.load(path, sections={"train"})
    assert str(caught.value) == f"{path}:1:{11 + len(key)}: train.{key}: {message}"


def test_all_mistakes_of_a_section_are_told_at_once_each_at_its_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train:\n  steps: 0\n  rate: fast\n  ema: 1.5\n  betas: [0.9]\nrisk: {weight: 0, samples: 0}\n")
    with pytest.raises(UsageError) as caught:
        recipe.load(path, sections={"train", "risk"})
    assert str(caught.value).split("\n") == [
        f"{path}:2:10: train.steps: expected at least 1, found 0",
        f"{path}:3:9: train.rate: expected float, found 'fast'",
        f"{path}:4:8: train.ema: expected below 1, found 1.5",
        f"{path}:5:10: train.betas[1]: missing",
        f"{path}:6:16: risk.weight: expected above 0, found 0",
        f"{path}:6:28: risk.samples: expected at least 1, found 0",
    ]


def test_mistakes_in_metric_length_and_columns_are_told_with_all_others(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: {name: translation}\n"
        "data:\n"
        "  name: files\n"
        "  train: {source: a, target: b, tsv: c}\n"
        "  valid: {tsv: a, jsonl: b}\n"
        "  test: {source: a}\n"
        "train:\n"
        "  metric: bleu,zzz=1\n"
        "  keep: no\n"
        "decoding: {max_length: 2y}\n"
    )
    with pytest.raises(UsageError) as caught:
        recipe.load(path)
    assert str(caught.value).split("\n") == [
        f"{path}:4:19: data.train.source: column 'a' is a name, so the TSV needs header: true; or use numbers",
        f"{path}:4:30: data.train.target: column 'b' is a name, so the TSV needs header: true; or use numbers",
        f"{path}:5:3: data.valid: a split has tsv or jsonl, not both",
        f"{path}:6:3: data.test: target is missing; without it nothing can be learned from a split or compared with it",
        f"{path}:8:11: train.metric.zzz: unknown key; expected tokenize, lowercase, smooth_method, smooth_value, "
        "max_ngram_order, effective_order",
        f"{path}:9:9: train.keep: expected int, found 'no'",
        f"{path}:10:24: decoding.max_length: expected a formula such as '2x+20', '1.5x' or '200', found '2y'",
    ]
    with pytest.raises(UsageError, match=r"^train.metric=blue: no metric 'blue' among .* \(did you mean 'bleu'\?\)$"):
        recipe.load(path, ["train={}", "train.metric=blue"], {"train"})


def test_a_model_in_use_does_not_need_its_metric():
    plain = recipe.resolved(recipe.load(Path(__file__).parent.parent / "recipes" / "mt.yaml"))
    plain["train"]["metric"] = "of_a_plugin"
    assert recipe.from_resolved(plain).train.metric == "of_a_plugin"


PLUGIN = '''
from dataclasses import dataclass
from encdec_cli.registry import tasks

@tasks.register("config_test_haiku")
@dataclass
class Haiku:
    """Three lines."""
    lines: int = 3
    """How many."""
'''


def test_a_recipe_brings_its_plugin_and_its_resolved_form_reads_back(tmp_path):
    (tmp_path / "haiku.py").write_text(PLUGIN)
    path = tmp_path / "r.yaml"
    path.write_text(
        "plugins: [haiku.py]\ntask: {name: config_test_haiku, lines: 5}\ndata: {name: cldr}\ntrain: {steps: 7}\n"
    )
    loaded = recipe.load(path, ["text.shared=false"])
    assert loaded.task.config.lines == 5
    assert [plugin.path for plugin in loaded.loaded] == [tmp_path / "haiku.py"]
    plain = json.loads(json.dumps(recipe.resolved(loaded)))
    assert plain["task"] == {"name": "config_test_haiku", "lines": 5}
    assert plain["train"]["betas"] == [0.9, 0.98]
    again = recipe.from_resolved(plain, "bundle.json")
    assert replace(again, loaded=loaded.loaded) == loaded
    with pytest.raises(UsageError, match=r"^bundle.json: text.next: unknown key"):
        recipe.from_resolved({**plain, "text": {"next": 1}}, "bundle.json")
    with pytest.raises(TypeError, match="section 'data' was not loaded"):
        recipe.resolved(recipe.load(path, sections={"task"}))


def test_a_plugin_that_fails_is_told_at_its_place_and_nothing_that_follows_from_it(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    path = tmp_path / "r.yaml"
    path.write_text("plugins:\n  - bad.py\n  - none.py\ntask: {name: of_the_plugin}\n")
    with pytest.raises(UsageError) as caught:
        recipe.load(path)
    assert str(caught.value).split("\n") == [
        f"{path}:2:5: plugins[0]: plugin {tmp_path / 'bad.py'}: ZeroDivisionError: division by zero",
        f"{path}:3:5: plugins[1]: plugin {tmp_path / 'none.py'}: No such file or directory; "
        "give the path of a Python file",
    ]


def test_the_fingerprint_sees_meaning_and_not_spelling(tmp_path):
    path = tmp_path / "r.yaml"

    def mark(text, sections=("text",)):
        path.write_text(text)
        return recipe.fingerprint(recipe.load(path, sections={"text", "train"}), sections)

    assert mark("text: {vocabulary: 8_000}") == mark("# nothing said") == mark("train: {steps: 3}")
    assert mark("text: {vocabulary: 9000}") != mark("")
    assert mark("", ("text", "train")) != mark("train: {seed: 2}", ("text", "train"))


def test_the_explained_recipe_loads_as_the_defaults(tmp_path):
    text = recipe.explain()
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    explained = recipe.load(path)
    path.write_text(f"task: {{name: {explained.task.name}}}\ndata: {{name: {explained.data.name}}}\n")
    assert recipe.load(path) == explained
    for section in (recipe.Text, recipe.Train):
        for key, meaning in descriptions(section).items():
            assert f"  {key}: " in text
            assert meaning.split()[0] in text


def test_the_commented_alternatives_are_recipes_too(tmp_path):
    blocks = re.findall(r"(?m)^(?:# (?:\w+:|  .*)\n)+", recipe.explain().replace("# task:\n", "\n# task:\n"))
    assert len(blocks) >= 3
    needed = {"models": "[anything]", "monolingual": "[anything]", "corpus": "{name: files}"}
    for block in blocks:
        text = re.sub(r"(?m)^# ", "", block)
        text = re.sub(
            r"(?m)^( *)# (\w+): \.\.\.  \(required\)$", lambda m: f"{m[1]}{m[2]}: {needed.get(m[2], 'anything')}", text
        )
        section = text.split(":")[0]
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        assert vars(recipe.load(path, sections={section}))[section].name in text


def test_the_data_part_of_a_recipe_needs_no_torch(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("task: {name: translation}\ndata: {name: files, train: {source: a, target: b}}\n")
    code = (
        "import sys; from pathlib import Path; from encdec_cli import recipe\n"
        "loaded = recipe.load(Path(sys.argv[1]), sections={'task', 'data', 'text'})\n"
        "assert loaded.data.config.train.target == 'b'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_places_are_written_as_editors_read_them():
    assert str(Place(3, 9, "recipes/mt.yaml")) == "recipes/mt.yaml:3:9"
    assert str(Place(0, 0, "train.steps=3")) == "train.steps=3"
