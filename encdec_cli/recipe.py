"""The sections of a recipe, and the ways in and out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from encdec_cli.config import Chosen, Component, Unchecked, component_of, loader
from encdec_cli.config import explain as explained
from encdec_cli.config.mistakes import Mistakes
from encdec_cli.config.schema import plain_value
from encdec_cli.config.tree import Node, Place, from_plain
from encdec_cli.errors import UsageError
from encdec_cli.registry import Plugin, corpora, load_plugin, load_plugins, metrics, models, strategies, tasks


@dataclass
class Text:
    """How text becomes tokens, and what becomes of examples that are too long."""

    tokenizer: Literal["sentencepiece", "word", "character"] = "sentencepiece"
    """What a token is: a piece of a word learned from the data, a word between spaces, or a character."""
    algorithm: Literal["unigram", "bpe"] = "unigram"
    """How SentencePiece learns its pieces."""
    vocabulary: int = 8000
    """Most tokens in a vocabulary, the four special ones included."""
    shared: bool = True
    """Whether source and target share one vocabulary."""
    max_source: int = 256
    """Most tokens of a source, its end token included."""
    max_target: int = 256
    """Most tokens of a target, its end token included."""
    too_long: Literal["skip", "truncate", "stop"] = "skip"
    """What becomes of a longer example in training: leave it out, cut it, or stop with an error."""

    def __post_init__(self) -> None:
        _at_least(5, vocabulary=self.vocabulary)
        _at_least(2, max_source=self.max_source, max_target=self.max_target)


@dataclass
class Train:
    """How the model learns, and how often its progress is judged and saved."""

    steps: int = 10_000
    """Updates of the weights in all."""
    tokens: int = 4096
    """Most padded tokens of the longer side in one micro-batch."""
    accumulate: int = 1
    """Micro-batches of one update; on a CPU as many as there are threads are computed, and kept, side by side."""
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """The optimizer; adamw decays weights apart from the gradient, muon is adamw with Muon for inner matrices."""
    rate: float = 1e-3
    """The highest learning rate, reached at the end of the warmup."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """The optimizer's decay rates of the gradient's mean and of its square."""
    weight_decay: float = 0.01
    """How strongly weights are pulled to zero."""
    warmup: int = 400
    """Updates in which the learning rate rises from zero."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """How the learning rate falls after the warmup."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.1
    """Probability that the loss takes from the right token and spreads over all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the forward and backward pass; auto takes bf16 where the machine is fast at it."""
    save_every: int = 500
    """Updates between two checkpoints."""
    keep: int = 1
    """Checkpoints kept for resuming, the newest ones."""
    validate_every: int = 500
    """Updates between two validations; 0 never validates."""
    valid_lines: int = 500
    """Most lines of the validation split that are decoded for a validation; 0 takes all."""
    metric: str = "bleu"
    """The metric on decoded validation lines that chooses the best model, with options as `--metric` takes them."""
    patience: int = 0
    """Validations without a better score after which training stops; 0 never stops early."""
    average: int = 0
    """Number of the last validated checkpoints whose weights are averaged at the end; 0 averages none."""
    log_every: int = 50
    """Updates between two lines of the log."""
    seed: int = 1
    """Seed of the first weights, of dropout and of the order of the examples."""
    threads: int = 0
    """CPU threads; 0 takes the cores that this process may use."""

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, tokens=self.tokens, accumulate=self.accumulate)
        _at_least(1, save_every=self.save_every, keep=self.keep, log_every=self.log_every)
        _at_least(0, warmup=self.warmup, validate_every=self.validate_every, valid_lines=self.valid_lines)
        _at_least(0, patience=self.patience, average=self.average, seed=self.seed, threads=self.threads)
        _at_least(0, weight_decay=self.weight_decay, clip=self.clip)
        if self.rate <= 0:
            raise ValueError(f"rate ({self.rate}) must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must be two numbers, each at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 1")


@dataclass
class Parallel:
    """How the processes that `torchrun` starts share the work; one process alone needs none of it."""

    shard: bool = False
    """Keep a share of weights, gradients and optimizer state in each process, for models that do not fit one device."""
    timeout: float = 20.0
    """Seconds after which a process that is dead, stopped or late is named and given up by the others."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"timeout ({self.timeout}) must be above 0")


def _at_least(least: int, **values: float) -> None:
    wrong = [f"{key} ({value})" for key, value in values.items() if value < least]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be at least {least}")


@dataclass(kw_only=True)
class Recipe:
    """All that a run is made from: what to learn, from what, with which model, how, and how to decode."""

    plugins: list[str] = field(default_factory=list)
    """Python files that register components of your own; paths are relative to the recipe."""
    task: Annotated[Component, Chosen(tasks, example="translation")]
    """What is learned: how a line becomes the text a model reads, and its output a line."""
    data: Annotated[Component, Chosen(corpora, example="cldr")]
    """Where the examples come from."""
    text: Text = field(default_factory=Text)
    """How text becomes tokens, and what becomes of examples that are too long."""
    model: Annotated[Component, Chosen(models, "transformer")]
    """The encoder and the decoder."""
    train: Train = field(default_factory=Train)
    """How the model learns, and how often its progress is judged and saved."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the processes that `torchrun` starts share the work; one process alone needs none of it."""
    decoding: Annotated[Component, Chosen(strategies, "beam")]
    """The search that is used for validation, and by `encdec generate` unless it is told another."""
    loaded: tuple[Plugin, ...] = field(default=(), metadata={"key": False})
    """The plugin files that were run for this recipe."""


SECTIONS = ("plugins", "task", "data", "text", "model", "train", "parallel", "decoding")
"""The top-level keys of a recipe, in the order in which it is read and written."""

DATA_SECTIONS = ("task", "data", "text")
"""Those that decide the prepared data."""


def load(
    path: Path,
    overrides: Sequence[str] = (),
    sections: Collection[str] | None = None,
    plugins: Sequence[Path] = (),
) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: words such as `train.steps=100`.
        sections: the sections that the command uses; the others stay unchecked, and nothing of theirs is
            imported. None checks all.
        plugins: plugin files of the command line, run before those that the recipe names (and after ENCDEC_PLUGINS).

    Raises:
        UsageError: naming every mistake as `file:line:column: key: what`.
    """
    mistakes = Mistakes()
    tree = loader.read(path, overrides, mistakes)
    loaded = load_plugins(plugins) + _load_named(tree, path.parent, mistakes)
    checked = None if sections is None else {"plugins", *sections}
    if checked is None or "train" in checked:
        _check_metric(tree, mistakes)
    return loader.build(tree, Recipe, mistakes, checked, {"loaded": tuple(dict.fromkeys(loaded))})


def _load_named(tree: Node, folder: Path, mistakes: Mistakes) -> list[Plugin]:
    section = tree.value.get("plugins") if isinstance(tree.value, dict) else None
    items = section.value if section and isinstance(section.value, list) else []
    loaded, failed = [], False
    for index, item in enumerate(items):
        if not isinstance(item.value, str):
            continue  # `build` says what is wrong with it
        try:
            loaded.append(load_plugin(folder / item.value))
        except UsageError as error:
            failed = True
            mistakes.add(item.place, f"plugins[{index}]", str(error).rstrip("."))
    if failed:
        mistakes.check()  # whatever else is wrong may come from the plugin that is not there
    return loaded


def _check_metric(tree: Node, mistakes: Mistakes) -> None:
    """Note what is wrong with `train.metric`; here, since a model in use needs the metric no more."""
    section = tree.value.get("train") if isinstance(tree.value, dict) else None
    metric = section.value.get("metric") if section and isinstance(section.value, dict) else None
    if metric and isinstance(metric.value, str):
        component_of(metric.value, metrics, metric.place, "train.metric", mistakes)


def from_resolved(value: Any, source: str = "recipe") -> Recipe:
    """Return the recipe that `resolved` wrote; plugins it names are not run: load them before.

    Raises UsageError naming `source`, the file it comes from, and every key that does not fit this version.
    """
    return loader.build(from_plain(value, Place(0, 0, source)), Recipe, Mistakes())


def resolved(recipe: Recipe, sections: Collection[str] = SECTIONS) -> dict[str, Any]:
    """Return sections of a recipe with all defaults filled, as plain JSON types."""
    result = {}
    for name in SECTIONS:
        if name in sections:
            section = vars(recipe)[name]
            if isinstance(section, Unchecked):
                raise TypeError(f"section '{name}' was not loaded")
            result[name] = section.plain() if isinstance(section, Component) else plain_value(section)
    return result


def fingerprint(recipe: Recipe, sections: Collection[str]) -> str:
    """Return the SHA-256 of the resolved sections, as hexadecimal."""
    text = json.dumps(resolved(recipe, sections), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def explain() -> str:
    """Return every key as a commented recipe of the defaults; imports every built-in."""
    return explained.recipe_text(Recipe)
