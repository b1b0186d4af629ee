"""What can be told of a run before any data is read: what its recipe asks for in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from encdec_cli.bundle.bundle import build_model, identity
from encdec_cli.config import parse_component
from encdec_cli.errors import DataError, UsageError
from encdec_cli.evaluation.metrics import Metric, try_out
from encdec_cli.models.parts import Part, check_can_divide, divide
from encdec_cli.recipe import Recipe
from encdec_cli.registry import metrics
from encdec_cli.text.resampling import check_sampling
from encdec_cli.training.compiling import compiles
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.guide import chosen_head
from encdec_cli.training.learning import freeze
from encdec_cli.training.lora import adapt, check_start

_VOCABULARY = 8
"""Tokens of a model that is built to be looked at."""
_MASTERS = {"lora": "rank", "guide": "weight", "risk": "metric", "teacher": "model"}
"""The key without which the others of a section do nothing."""


def check(recipe: Recipe, run: Path, starts: bool, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Raise EncdecError for what cannot be done, and note what does nothing.

    Args:
        recipe: all of its sections.
        run: the folder of the run, which may not exist.
        starts: whether it begins with the weights of another model.
        ranks: the processes that are to train.
        say: is given sentences for the user.
    """
    _check_metrics(recipe)
    _check_model(recipe)
    has_learned = starts or any((run / "checkpoints").glob("step_*"))
    check_start(recipe.lora, has_learned)
    _check_teaching(recipe)
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("train.tensorboard: needs pip install 'encdec-cli[tensorboard]'; or set it to false.")
    _check_processes(recipe, ranks, say)
    if recipe.risk.metric and not has_learned:
        say("note: risk.metric: the outputs of a model that has learned nothing are noise; begin with --init-from")
    for key, why in _idle(recipe):
        say(f"note: {key} does nothing {why}")
    train = recipe.train
    if train.warmup > train.steps:
        say(f"note: train.warmup: {train.warmup} of {train.steps} updates, so train.rate is never reached")


def _check_teaching(recipe: Recipe) -> None:
    if recipe.teacher.model:
        identity(recipe.teacher.model)
        if recipe.regularize.rdrop:
            raise UsageError(
                "regularize.rdrop: a run with a teacher has no R-Drop; set it to 0, or teacher.model to null."
            )
    if recipe.regularize.subword_sampling:
        check_sampling(recipe.text.tokenizer, recipe.text.algorithm, recipe.regularize.subword_sampling)
    links = recipe.guide.alignments
    if recipe.guide.weight and links and links != "-" and not Path(links).exists():
        raise DataError(f"guide.alignments: {links}: there is no such file.")


def _check_metrics(recipe: Recipe) -> None:
    for key, name in (("train.metric", recipe.train.metric), ("risk.metric", recipe.risk.metric)):
        if not name:
            continue
        metric: Metric = parse_component(name, metrics, key)
        if key == "risk.metric" and metric.needs_model:
            raise UsageError(f"{key}: {name} judges no outputs; choose one that does, such as bleu or chrf.")
        try_out(metric)


def _check_model(recipe: Recipe) -> None:
    kind = recipe.model.cls
    if recipe.train.checkpointing and not kind.can_checkpoint:
        raise UsageError(
            f"train.checkpointing: this model ({kind.__name__}) cannot compute its layers again; set it to false."
        )
    if recipe.guide.weight or recipe.lora.rank or recipe.train.freeze or recipe.train.compile is True:
        model = build_model(recipe, _VOCABULARY, _VOCABULARY)
        compiles(recipe, model, "cpu")
        if recipe.guide.weight:
            chosen_head(model, recipe.guide)
        adapt(model, recipe.lora)
        freeze(model, recipe.train.freeze)


def _check_processes(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
    if recipe.parallel.shard and ranks.world > 1:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 takes seconds

        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise UsageError(
                f"parallel.shard: torch {torch.__version__} cannot sum as it must; install torch 2.9 or newer."
            )
    _check_tensor(recipe, ranks.world)
    _check_update(recipe, ranks, say)


def _check_update(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
    parts = recipe.train.accumulate
    data, what = ranks.data, "processes" if ranks.tensor == 1 else f"groups of {ranks.tensor} processes"
    if parts < data or (parts % data and (recipe.parallel.shard or ranks.tensor > 1)):
        raise UsageError(
            f"train.accumulate: {data} {what} cannot share an update in {parts} part(s); it must be a multiple "
            f"of {data}, with a smaller train.tokens if the update is to stay as large as it was."
        )
    if parts % data:
        say(f"note: {parts} micro-batches an update, {data} processes: some wait for the others")


def _check_tensor(recipe: Recipe, world: int) -> None:
    tensor = recipe.parallel.tensor
    if tensor == 1:
        return
    if world % tensor:
        raise UsageError(
            f"parallel.tensor: {world} process(es) cannot form groups of {tensor}; start a multiple of {tensor} with "
            "torchrun, or set it to 1."
        )
    other = recipe.train.optimizer if recipe.train.optimizer in ("muon", "adafactor") else ""
    parts = {
        f"train.optimizer={other}": other,
        "lora.rank": recipe.lora.rank,
        "guide.weight": recipe.guide.weight,
    }
    if asked := [key for key, value in parts.items() if value]:
        raise UsageError(f"parallel.tensor: {', '.join(asked)} cannot do with parts of weights; leave out one of them.")
    check_can_divide(recipe.model.cls)
    with torch.device("meta"):
        divide(build_model(recipe, _VOCABULARY, _VOCABULARY), Part(0, tensor, id))


def _idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each key that was set and does nothing, and why."""
    for name, master in _MASTERS.items():
        section = vars(recipe)[name]
        if not vars(section)[master]:
            usual = vars(type(section)())
            changed = [key for key, value in vars(section).items() if value != usual[key]]
            yield from ((f"{name}.{key}", f"without {name}.{master}") for key in changed)
    train, regularize = recipe.train, recipe.regularize
    dropouts = [value for key, value in vars(recipe.model.config).items() if "dropout" in key]
    hiding = regularize.word_dropout_source or regularize.word_dropout_target
    all_risk = bool(recipe.risk.metric) and recipe.risk.weight == 1
    taught = recipe.teacher.model and recipe.teacher.weight
    validated, unigram = train.validate_every, regularize.smoothing_prior == "unigram"
    needs = (
        ("train.average", train.average, validated, "without train.validate_every"),
        ("train.patience", train.patience, validated, "without train.validate_every"),
        ("train.average_of", train.average_of != "last", train.average, "without train.average"),
        ("regularize.rdrop", regularize.rdrop, any(dropouts) or not dropouts, "without dropout: its two passes agree"),
        ("regularize.smoothing_prior", unigram, train.label_smoothing, "without train.label_smoothing"),
        ("regularize.rdrop", regularize.rdrop, not all_risk, "with risk.weight=1"),
        ("regularize.smoothing_prior", unigram, not all_risk, "with risk.weight=1"),
        ("teacher.model", recipe.teacher.model, taught, "with teacher.weight=0"),
        ("teacher.model", taught, not all_risk, "with risk.weight=1"),
        ("regularize.word_dropout_warmup", regularize.word_dropout_warmup, hiding, "without word dropout"),
    )
    yield from ((key, why) for key, asked, needed, why in needs if asked and not needed)
