"""Worker processes of one thread each, which share the models that were loaded before they were made.

Two processes with a thread each decode 1.15 to 1.3 times as fast as one with two threads: a step of decoding is many
small operations, and threads wait for each other at the end of each.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue

import torch

from encdec_cli import kernels
from encdec_cli.allocator import keep_freed
from encdec_cli.decoding.hypothesis import Hypothesis
from encdec_cli.errors import BundleError, DataError, EncdecError, ResourceError, UsageError
from encdec_cli.generation.search import Job

Decode = Callable[[Sequence[Job]], list[list[Hypothesis]]]
TOLD: dict[str, type[EncdecError]] = {
    kind.__name__: kind for kind in (UsageError, DataError, BundleError, ResourceError)
}
"""Errors that a worker passes on as what they are."""
AHEAD = 2
"""Groups given to a worker at a time, so that it never waits for the next."""


class Workers:
    """Processes that decode groups of sentences; call `close` in the end.

    What goes through the pipes is JSON. A worker ends when its pipe does, so none outlives this process.

    Args:
        decode: what each of them calls, as it is now: they are forked from this process.
        count: how many.
    """

    def __init__(self, decode: Decode, count: int) -> None:
        kernels.library()  # compiled once, not by each of them
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            process = context.Process(target=_serve, args=(decode, theirs, list(self._pipes)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def map(self, groups: Iterable[Sequence[Job]]) -> Iterator[tuple[int, list[list[Hypothesis]]]]:
        """Yield the number of each group and its hypotheses, in the order in which they are done."""
        waiting = enumerate(groups)
        under_way: dict[Connection, list[int]] = {pipe: [] for pipe in self._pipes}
        for _ in range(AHEAD):
            for pipe in self._pipes:
                self._give(pipe, waiting, under_way)
        while busy := [pipe for pipe, numbers in under_way.items() if numbers]:
            done = set(wait(busy))
            for pipe in busy:
                if pipe in done:
                    number, found = under_way[pipe].pop(0), self._take(pipe)
                    self._give(pipe, waiting, under_way)  # first, for what is done with the results may take long
                    yield number, found

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def _give(
        self, pipe: Connection, waiting: Iterator[tuple[int, Sequence[Job]]], under_way: dict[Connection, list[int]]
    ) -> None:
        for number, group in waiting:
            under_way[pipe].append(number)
            with suppress(BrokenPipeError):  # `_take` tells of its death
                pipe.send_bytes(json.dumps([vars(job) for job in group]).encode())
            return

    def _take(self, pipe: Connection) -> list[list[Hypothesis]]:
        try:
            answer = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes[self._pipes.index(pipe)]
            process.join()
            raise ResourceError(
                f"a worker process has ended (exit code {process.exitcode}), perhaps for lack of memory; use a "
                "smaller --batch, or --workers 1."
            ) from None
        if "refused" in answer:
            raise TOLD[answer["kind"]](answer["refused"])
        if "error" in answer:
            raise RuntimeError(f"in a worker process: {answer['error']}")
        return [[Hypothesis(**one) for one in hypotheses] for hypotheses in answer["found"]]


def _serve(decode: Decode, pipe: Connection, others: Sequence[Connection]) -> None:
    """Decode what comes through the pipe until it ends. others: the parent's ends, which came with the fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    # What was loaded stays: a search for garbage need not look at it, nor copy its pages into this process.
    gc.freeze()
    torch.set_num_threads(1)
    keep_freed()
    groups: SimpleQueue[bytes] = SimpleQueue()
    # It ends the process whatever the other thread is at.
    threading.Thread(target=_receive, args=(pipe, groups), daemon=True).start()
    while True:
        jobs = [Job(**job) for job in json.loads(groups.get())]
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send_bytes(json.dumps(_answer(decode, jobs)).encode())


def _receive(pipe: Connection, groups: SimpleQueue[bytes]) -> None:
    with suppress(EOFError, ConnectionResetError):
        while True:
            groups.put(pipe.recv_bytes())
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def _answer(decode: Decode, jobs: Sequence[Job]) -> dict[str, object]:
    try:
        return {"found": [[vars(one) for one in hypotheses] for hypotheses in decode(jobs)]}
    except tuple(TOLD.values()) as error:
        return {"refused": str(error), "kind": type(error).__name__}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
