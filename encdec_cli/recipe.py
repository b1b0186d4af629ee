"""The sections of a recipe, and the ways in and out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from encdec_cli.config import Chosen, Component, Unchecked, component_of, loader
from encdec_cli.config import explain as explained
from encdec_cli.config.checks import about
from encdec_cli.config.mistakes import Mistakes
from encdec_cli.config.schema import plain_value
from encdec_cli.config.tree import Node, Place, from_plain
from encdec_cli.errors import UsageError
from encdec_cli.registry import Plugin, corpora, load_plugin, load_plugins, metrics, models, strategies, tasks

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]


@dataclass
class Text:
    """How text becomes tokens, and what becomes of examples that are too long."""

    tokenizer: Literal["sentencepiece", "word", "character"] = "sentencepiece"
    """What a token is: a piece of a word learned from the data, a word between spaces, or a character."""
    algorithm: Literal["unigram", "bpe"] = "unigram"
    """How SentencePiece learns its pieces."""
    vocabulary: Annotated[int, Ge(5)] = 8000
    """Most tokens in a vocabulary, the four special ones included."""
    shared: bool = True
    """Whether source and target share one vocabulary."""
    max_source: Annotated[int, Ge(2)] = 256
    """Most tokens of a source, its end token included."""
    max_target: Annotated[int, Ge(2)] = 256
    """Most tokens of a target, its end token included."""
    too_long: Literal["skip", "truncate", "stop"] = "skip"
    """What becomes of a longer example in training: leave it out, cut it, or stop with an error."""


@dataclass
class Train:
    """How the model learns, and how often its progress is judged and saved."""

    steps: Positive = 10_000
    """Updates of the weights in all."""
    tokens: Positive | Literal["auto"] = 4096
    """Most padded tokens of the longer side in one micro-batch; auto takes what fits the memory when the run begins."""
    checkpointing: bool = False
    """Whether layers are computed a second time in the backward pass, which takes time and saves their activations."""
    compile: bool | Literal["auto"] = "auto"
    """Whether layers and loss go through torch's compiler; auto: on a GPU, in runs of 1,000 updates or more, without
    parallel.shard and parallel.tensor."""
    accumulate: Positive = 1
    """Micro-batches of one update; on a CPU as many as there are threads are computed, and kept, side by side."""
    optimizer: Literal["adam", "adamw", "muon", "adafactor"] = "adamw"
    """The optimizer; adamw decays weights apart from the gradient, muon is adamw with Muon for inner matrices,
    adafactor keeps next to nothing in memory."""
    rate: Annotated[float, Gt(0)] = 1e-3
    """The highest learning rate, reached at the end of the warmup."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """Adam's decay rates of the gradient's mean and of its square."""
    weight_decay: Amount = 0.01
    """How strongly weights are pulled to zero."""
    warmup: Count = 400
    """Updates in which the learning rate rises from zero."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """How the learning rate falls after the warmup."""
    clip: Amount = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: Share = 0.1
    """Probability that the loss takes from the right token and spreads over all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the forward and backward pass; auto takes bf16 where the machine is fast at it."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """After a loss or gradient that is not finite: stop, skip the update, or also roll back to the last checkpoint."""
    save_every: Positive = 500
    """Updates between two checkpoints."""
    keep: Positive = 2
    """Checkpoints kept for resuming, the newest ones."""
    validate_every: Count = 500
    """Updates between two validations; 0 never validates."""
    valid_lines: Count = 500
    """Most lines of the validation split that are decoded for a validation; 0 takes all."""
    metric: str = "bleu"
    """The metric on decoded validation lines that chooses the best model, with options as `--metric` takes them."""
    patience: Count = 0
    """Validations without a better score after which training stops; 0 never stops early."""
    ema: Share = 0.0
    """Share of a moving average of the weights that stays at an update, such as 0.999; the average is what is validated
    and kept as the model; 0 keeps none."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of the names of parameters that do not learn, such as `encoder.*`."""
    average: Count = 0
    """Number of validated checkpoints whose weights are averaged at the end; 0 averages none."""
    average_of: Literal["last", "best"] = "last"
    """Which validated checkpoints are averaged: the last ones, or those with the best scores."""
    log_every: Positive = 50
    """Updates between two lines of the log; the last update has one, too."""
    tensorboard: bool = False
    """Whether the numbers of the log are written for TensorBoard too, into the run's folder `tensorboard`."""
    seed: Count = 1
    """Seed of the first weights, of dropout and of the order of the examples."""
    threads: Count = 0
    """CPU threads; 0 takes the cores that this process may use."""


@dataclass
class Lora:
    """Low-rank adaptation (https://arxiv.org/abs/2106.09685) of the model of --init-from."""

    rank: Count = 0
    """Rank of the change that each linear layer learns while its own weights stay; 0 trains all weights themselves."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The change counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of the names of the linear layers that learn a change, such as `decoder.*.cross.*`."""
    whole: list[str] = field(default_factory=list)
    """Patterns of the names of parameters that learn all of their weights beside it, such as `*embedding*`."""


@dataclass
class Regularize:
    """What makes learning harder so that the model generalises better; all of it is off unless asked for."""

    rdrop: Amount = 0.0
    """Weight of R-Drop (https://arxiv.org/abs/2106.14448): each batch is read twice with different dropout, and the two
    distributions of every target token are pulled together; 5 is usual for translation. Updates take twice as long."""
    smoothing_prior: Literal["uniform", "unigram"] = "uniform"
    """How train.label_smoothing spreads: evenly, or by how often each token stands in the training targets."""
    subword_sampling: Amount = 0.0
    """Cut the training text into other subwords each time; SentencePiece's alpha. With text.algorithm bpe the
    probability of leaving out a merge (BPE-dropout, https://arxiv.org/abs/1910.13267; 0.1 is usual), with unigram the
    power of a segmentation's probability (https://arxiv.org/abs/1804.10959; 0.2 to 0.5, less is noisier)."""
    word_dropout_source: Share = 0.0
    """Probability with which a source token is hidden: read as `<unk>` (https://arxiv.org/abs/1512.05287)."""
    word_dropout_target: Share = 0.0
    """Likewise for target tokens that the decoder reads (https://arxiv.org/abs/1511.06349); it still writes them."""
    word_dropout_warmup: Count = 0
    """Updates in which both probabilities rise from zero."""


@dataclass
class Guide:
    """Guided alignment (https://arxiv.org/abs/1909.02074): one head of the decoder's attention learns to look where a
    word aligner says that a word comes from; `--alignments LAYER.HEAD` then reads it."""

    weight: Amount = 0.0
    """Weight of its loss beside that of the tokens; 0.05 is usual, 0 guides nothing."""
    layer: int = -1
    """Decoder layer of the head, from 0; -1 is the last, -2 the one before it."""
    head: Count = 0
    """The head, from 0."""
    alignments: str = ""
    """A file with the links `i-j` of the words of each training example, a line each, as fast_align writes it; empty:
    IBM Model 1 learns them from the training examples, if they are not too many."""


@dataclass
class Risk:
    """Minimum risk training on a metric (Shen et al. 2016, https://arxiv.org/abs/1512.02433), for a model that has
    learned already: with --init-from, and a tenth of its train.rate and train.tokens."""

    metric: str = ""
    """The metric that judges each output, with options as `--metric` takes them; empty: no such training."""
    samples: Positive = 5
    """Outputs drawn for each source; the risk is taken over those that differ and the reference."""
    sharpness: Annotated[float, Gt(0)] = 0.005
    """Power of an output's probability in the risk."""
    weight: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the risk in the loss; the rest is that of the reference's tokens."""


@dataclass
class Teacher:
    """A model whose distribution at every position a run learns too: token-level knowledge distillation."""

    model: Path | None = None
    """Bundle or run of the teacher, which must have the run's vocabularies; null for none."""
    weight: Annotated[float, Ge(0), Le(1)] = 0.5
    """What learning from the teacher counts, from 0 to 1; the real targets count the rest."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """What the logits of both are divided by; above 1 unlikely tokens count for more."""


@dataclass
class Cost:
    """What the machine costs, for the account of the run; what is 0 is left out of it."""

    price_per_hour: Amount = 0.0
    """Price of an hour of the machine, in any currency."""
    watts: Amount = 0.0
    """Power that the machine draws while it trains; 0 takes what it measures, else 12 for each busy core of a CPU."""
    carbon_intensity: Amount = 0.0
    """Grams of CO2 for a kilowatt hour."""


@dataclass
class Parallel:
    """How the processes that `torchrun` starts share the work; one process alone needs none of it."""

    shard: bool = False
    """Keep a share of weights, gradients and optimizer state in each process, for models that do not fit one device."""
    tensor: Positive = 1
    """How many processes share each layer: attention heads, and the inner width of the feed-forward."""
    timeout: Annotated[float, Gt(0)] = 20.0
    """Seconds after which a process that is dead, stopped or late is named and given up by the others."""


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
    lora: Lora = field(default_factory=Lora)
    """Low-rank adaptation: a change of the model of --init-from that is small to learn."""
    regularize: Regularize = field(default_factory=Regularize)
    """What makes learning harder so that the model generalises better; all of it is off unless asked for."""
    guide: Guide = field(default_factory=Guide)
    """Guided alignment: a head of attention that learns where words come from; off without a weight."""
    risk: Risk = field(default_factory=Risk)
    """Minimum risk training on a metric; off without one."""
    teacher: Teacher = field(default_factory=Teacher)
    """A model whose distribution at every position the run learns too: token-level knowledge distillation."""
    cost: Cost = field(default_factory=Cost)
    """What the machine costs, for the account of the run."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the processes that `torchrun` starts share the work; one process alone needs none of it."""
    decoding: Annotated[Component, Chosen(strategies, "beam")]
    """The search that is used for validation, and by `encdec generate` unless it is told another."""
    loaded: tuple[Plugin, ...] = field(default=(), metadata={"key": False})
    """The plugin files that were run for this recipe."""


SECTIONS = (
    *("plugins", "task", "data", "text", "model", "train", "lora", "regularize", "guide", "risk", "teacher"),
    *("parallel", "cost", "decoding"),
)
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
    for section in ("train", "risk"):
        if checked is None or section in checked:
            _check_metric(tree, section, mistakes)
    recipe = loader.build(tree, Recipe, mistakes, checked, {"loaded": tuple(dict.fromkeys(loaded))})
    if checked is None or "data" in checked:
        _check_corpus(recipe, tree, mistakes)
    return recipe


def _check_corpus(recipe: Recipe, tree: Node, mistakes: Mistakes) -> None:
    """Raise UsageError for what the corpus cannot read; here, since a model in use reads it no more."""
    section = tree.value["data"] if isinstance(tree.value, dict) else tree
    parts = section.value if isinstance(section.value, dict) else {}
    try:
        recipe.data.config.check()
    except UsageError as error:
        key, what = about(str(error), parts)
        mistakes.add(parts[key].place if key else section.key, f"data.{key}".rstrip("."), what)
        mistakes.check()


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


def _check_metric(tree: Node, name: str, mistakes: Mistakes) -> None:
    """Note what is wrong with the metric of a section; here, since a model in use needs it no more."""
    section = tree.value.get(name) if isinstance(tree.value, dict) else None
    metric = section.value.get("metric") if section and isinstance(section.value, dict) else None
    if metric and isinstance(metric.value, str) and (metric.value or name == "train"):  # no risk needs no metric
        component_of(metric.value, metrics, metric.place, f"{name}.metric", mistakes)


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
