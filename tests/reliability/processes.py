"""Several processes: one is lost, the data are uneven, or another number of them goes on."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import test_distributed as distributed
from tests.conftest import copy_task
from tests.reliability.bench import Bench
from tests.reliability.crashes import Result

LIMIT = 30
"""Seconds within which the others leave."""


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except AssertionError as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        return f"{line.line}: {error}"[:500]
    return None


def lost_processes(bench: Bench) -> Iterator[Result]:
    """T26: one of two processes is killed, stopped, asleep, raises or has no memory: the other names it and leaves."""
    corpus = copy_task(bench.folder / "shared")
    alone = bench.new()
    distributed.trained(bench.forks, 1, corpus, *distributed.TWO, "--output", alone)
    for rank, place, harm in bench.some(distributed.START + distributed.CASES):
        folder = bench.new()
        folder.mkdir()
        recipe = distributed.faulty(corpus, folder)
        options = (recipe, *distributed.TWO, "parallel.timeout=2", "--output", folder / "run")

        def check(folder: Path = folder, options: tuple = options, fault: str = f"{rank}:{place}:{harm}") -> None:
            bench.took(distributed.lose(bench.forks, options, fault), LIMIT)
            distributed.trained(bench.forks, 2, *options, FAULT=distributed.NO_FAULT)
            distributed.assert_same(folder / "run", alone)

        yield f"process {rank}, {place}, {harm}", _problem(check)
        shutil.rmtree(folder)


def uneven_data(bench: Bench) -> Iterator[Result]:
    """T27: 1 to 50 examples for 1 to 4 processes: each example once an epoch, and no process without work.

    The order of each case is computed; some are trained by as many processes, and by one, which has the same losses.
    """
    for count, world in bench.some([(1, 2), (2, 3), (3, 2), (5, 4), (7, 3), (50, 4)]):
        corpus = copy_task(bench.new(), train=count)
        runs = bench.new(), bench.new()

        def check(corpus: Path = corpus, world: int = world, runs: tuple[Path, Path] = runs) -> None:
            for processes, run in zip((1, world), runs, strict=True):
                options = (*distributed.SMALL, "train.accumulate=4", "train.log_every=1", "--output", run)
                distributed.trained(bench.forks, processes, corpus, *options)
            assert distributed.losses(runs[1]) == pytest.approx(distributed.losses(runs[0]), rel=1e-4)

        yield f"{count} examples, {world} processes that train", _problem(check)
    whole = distributed.test_uneven_data_every_example_once_an_epoch_and_no_process_without_work
    for count, world in bench.some(distributed.UNEVEN):
        yield f"{count} examples, {world} processes", _problem(lambda c=count, w=world: whole(c, w))


def other_numbers(bench: Bench) -> Iterator[Result]:
    """T28: a run goes on with another number of processes, twice: noted, and the losses those of one process."""
    corpus = copy_task(bench.folder / "numbers")
    options = (*distributed.SMALL, "train.accumulate=4", "train.log_every=1")
    alone = bench.new()
    distributed.trained(bench.forks, 1, corpus, *options, "--output", alone)
    wanted = pytest.approx(distributed.losses(alone), rel=1e-4)
    for worlds in ((1, 2, 1), (2, 1, 2), (1, 4, 2), (4, 1, 4), (3, 2, 4)):
        run = bench.new()

        def check(worlds: tuple[int, ...] = worlds, run: Path = run) -> None:
            for was, world, steps in zip((0, *worlds), worlds, (7, 13, 24), strict=False):
                told = distributed.trained(
                    bench.forks, world, corpus, *options, f"train.steps={steps}", "--output", run
                )
                assert not was or f"processes was {was}, is now {world}" in told[0].stderr, told[0].stderr
            assert distributed.losses(run) == wanted

        yield "processes " + ", ".join(map(str, worlds)), _problem(check)
        shutil.rmtree(run)
