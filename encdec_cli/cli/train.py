"""`encdec train`: from a recipe to a bundle."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.options import DeviceOption, OverridesArgument, PluginOption, RunOption

if TYPE_CHECKING:
    from encdec_cli.recipe import Recipe
    from encdec_cli.training.trainer import Trainer


class OnNan(str, Enum):
    """What becomes of an update whose loss or gradient is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
    ] = None,
    overrides: OverridesArgument = None,
    output: RunOption = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", metavar="PATH", help="Start from the weights of this bundle or run.")
    ] = None,
    device: DeviceOption = "cpu",
    explain: Annotated[bool, typer.Option("--explain", help="Print every key of a recipe with its meaning.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the recipe, prepare the data, try the largest batch; train nothing."),
    ] = False,
    on_nan: Annotated[
        OnNan | None,
        typer.Option("--on-nan", metavar="|".join(OnNan), help="What a loss that is not finite does: train.on_nan."),
    ] = None,
    prove_resume: Annotated[
        int | None,
        typer.Option(
            "--prove-resume",
            metavar="N",
            min=1,
            help="Train a short copy of the run, and again with N kills -9; compare all bytes. The run is left alone.",
        ),
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Train a model: prepare the data if need be, learn, validate, keep the best.

    KEY=VALUE changes a key of the recipe, such as train.steps=100; --explain shows every key. Started again, it goes
    on where it was interrupted, or says that nothing is left to do. The model lies in the run's folder and is what
    `encdec generate` uses next.
    """
    if explain:
        from encdec_cli.recipe import explain as explain_recipe

        typer.echo(explain_recipe(), nl=False)
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe such as recipes/mt.yaml", param_hint="RECIPE")
    from encdec_cli.bundle.run import default_run
    from encdec_cli.recipe import load

    overrides = [*(overrides or []), *([f"train.on_nan={on_nan.value}"] if on_nan else [])]
    loaded = load(recipe, overrides, plugins=plugin or [])
    if prove_resume is not None:
        own = [f"--init-from={init_from}"] if init_from else []
        own += [f"--plugin={path}" for path in plugin or []]
        _prove([str(recipe), *overrides, f"--device={device}", *own], prove_resume, loaded.train.seed)
        return
    train_run(loaded, output or default_run(recipe), device, init_from, dry_run)


def train_run(recipe: Recipe, run: Path, device: str, init_from: Path | None = None, dry_run: bool = False) -> None:
    """Train in the folder of a run, from the start or from where it was stopped."""
    from encdec_cli.allocator import keep_freed
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.bundle.run import locked, need_access
    from encdec_cli.cli import console
    from encdec_cli.training.beforehand import check
    from encdec_cli.training.budget import settle
    from encdec_cli.training.data import shared_data
    from encdec_cli.training.distributed import joined, shared_cores
    from encdec_cli.training.initial import check_fits
    from encdec_cli.training.machine import add_in_order, check_device, use_threads
    from encdec_cli.training.signals import watched
    from encdec_cli.training.trainer import Setting, Trainer

    check_device(device)
    add_in_order(device)
    use_threads(recipe.train.threads, shared_cores())
    keep_freed()
    start = Bundle.load(init_from) if init_from else None
    if start:
        check_fits(recipe, start)
    with joined(device, recipe.parallel, console.leave) as (ranks, own_device), watched() as stop:
        ranks.heed(stop)
        say = console.say if ranks.first else _say_nothing
        say_own = console.say if ranks.world == 1 else _named(ranks.rank)
        with locked(run) if ranks.first else _quiet():
            if ranks.first:
                need_access(run)
            check(recipe, run, start is not None, ranks, say)
            data = shared_data(recipe, run, say, ranks, own_device)
            setting = Setting(recipe, data, run, own_device, stop, say, recipe.loaded, start, ranks, say_own)
            trainer = Trainer(settle(setting))
            if dry_run:
                say(_dry_run(trainer))
            else:
                _run(trainer, recipe.train.steps)


def _run(trainer: Trainer, steps: int) -> None:
    from encdec_cli.cli import console
    from encdec_cli.cli.progress import TrainingProgress

    setting, step = trainer.setting, trainer.progress.step
    if trainer.progress.finished:
        what, key = (_early(trainer), "patience") if trainer.is_early else (f"has finished its {step} updates", "steps")
        setting.say(
            f"nothing to do: {setting.run} {what}; raise train.{key} to go on, or choose another --output to start anew"
        )
        return
    _tell_memory(trainer)
    gc.collect()
    gc.freeze()  # what is there by now stays: searches for garbage need not look at it, 2 % of an update
    if not setting.ranks.first:
        trainer.run(lambda *_: None)
        return
    with console.progress("training", steps, step) as bar:
        cost = partial(trainer.account.brief, trainer.progress)
        trainer.run(TrainingProgress(bar, steps, step, cost).progress)
    if trainer.is_early:
        setting.say(_early(trainer))
    setting.say(trainer.account.sentence(trainer.progress))
    setting.say(f"model: {setting.run}")


def _early(trainer: Trainer) -> str:
    progress, train = trainer.progress, trainer.train
    return f"stopped early, at update {progress.step}: {progress.stale} validation(s) without a better {train.metric}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave without words for what all processes know: the first one says it."""
    from encdec_cli.errors import NonFiniteError, StoppedError, UsageError

    try:
        yield
    except (NonFiniteError, StoppedError, UsageError) as error:
        raise typer.Exit(error.code) from error


def _say_nothing(_sentence: str) -> None:
    """Stand in for `say` in all processes but the first."""


def _named(rank: int) -> Callable[[str], None]:
    """Return what says that a sentence is of this process."""
    from encdec_cli.cli import console

    return lambda sentence: console.say(f"process {rank}: {sentence}")


def _prove(words: Sequence[str], kills: int, seed: int) -> None:
    import tempfile

    from encdec_cli.cli import console
    from encdec_cli.errors import CheckError, UsageError
    from encdec_cli.training.prove import prove
    from encdec_cli.training.signals import watched

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--prove-resume: proves runs of one process; leave torchrun out.")
    folder = Path(tempfile.mkdtemp(prefix="encdec-prove-"))
    keep = False
    try:
        with watched():  # so that a signal ends the process that trains, too
            proof = prove(words, kills, seed, folder, console.say)
        keep = bool(proof.differences)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if proof.differences:
        raise CheckError(f"not exact: {'; '.join(proof.differences[:5])}; both runs are kept in {folder}.")
    print(
        f"exact: {proof.kills} kills -9 in {proof.runs} run(s) of {proof.updates} updates, {proof.seconds:.0f} s; "
        "weights, moments, log and order of the examples are those of the unbroken run, byte for byte"
    )


def _tell_memory(trainer: Trainer) -> None:
    import torch

    from encdec_cli.training.largest import need
    from encdec_cli.training.memory import available

    wanted, free = need(trainer), available(torch.device(trainer.setting.device))
    trainer.setting.say(f"memory: {_size(wanted.total)} at most")
    if 0 < free < wanted.growth:
        trainer.say_own(
            f"encdec: warning: {_size(free)} are free, and the run will need {_size(wanted.growth)} more than it has "
            "now; lower train.tokens, or set train.checkpointing=true"
        )


def _dry_run(trainer: Trainer) -> str:
    from encdec_cli.cli.console import table
    from encdec_cli.training.largest import need, try_largest

    wanted = need(trainer)
    parameters, learning, batches = try_largest(trainer)
    some = f", of which {learning:,} learn," if learning < parameters else ""
    rows = [[name, _size(value)] for name, value in {**vars(wanted), "total": wanted.total}.items() if value]
    return (
        f"memory of the largest update, predicted:\n{table(rows)}\n"
        f"dry run: the recipe is good; {parameters:,} parameters{some} in {trainer.precision}, {batches:,} "
        "micro-batches an epoch; the largest one and a validation batch fit; nothing was trained"
    )


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
