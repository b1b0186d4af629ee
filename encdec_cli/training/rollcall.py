"""Who of several processes is there: beats in a store, and the name of the one that is dead, stopped or late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from encdec_cli.errors import EncdecError, ResourceError

_LAST_WORDS = 3.0
"""Seconds for which the process that holds the store stays, so that others hear why it leaves."""


@dataclass(frozen=True)
class Beat:
    """What a process last said of itself."""

    number: int
    """Counts the beats."""
    point: tuple[int, int]
    """Counts the places where processes wait for each other, and the steps there; the same in all at the same place."""
    where: str
    """Words for that place."""

    @classmethod
    def read(cls, text: str) -> Beat:
        """Return what a store holds."""
        number, point, step, where = text.split("|", 3)
        return cls(int(number), (int(point), int(step)), where)


FIRST = "0|0|0|the start"
"""The beat with which a process comes."""


class RollCall:
    """Writes this process's beat to the store from a thread, and reads the others' after a long wait for them.

    A process is lost if its beat stands still (killed, stopped, or its machine is gone) or, where all must come in
    time, if it has not come after `timeout` seconds, though it lives. A library that holds the interpreter holds the
    beat, too.

    Args:
        store: where the processes meet; each has set its `FIRST` beat.
        own: another connection to it for the thread: one that waits for an answer would hold up the other.
        rank: the number of this process.
        world: how many there are.
        timeout: in seconds.
    """

    def __init__(self, store: Store, own: Store, rank: int, world: int, timeout: float) -> None:
        self.store = store
        self._own = own
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self._interval = min(1.0, timeout / 10)
        self._point, self._step, self._where = 0, 0, "the start"
        self._since: float | None = None
        self._patient = False
        self._whom: Sequence[int] = range(world)
        self._asked: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def called(self, leave: Callable[[EncdecError], NoReturn], serving: bool) -> Iterator[None]:
        """Beat inside the block. An error that leaves it is told to the others.

        leave: ends the process; called from the thread. serving: whether the store ends with this process.
        """
        threads = [threading.Thread(target=work, args=(leave,), daemon=True) for work in (self._beat, self._guard)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException as error:
            words = str(error) if isinstance(error, EncdecError) else f"{type(error).__name__}: {error}"
            self._try_set("lost", f"process {self.rank} left at {self._where}: {words}")
            raise
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(2 * self._interval)
            self._try_set(f"bye/{self.rank}", "")
            if serving:
                self._stay()

    def arrive(self, where: str) -> None:
        """Note that this process is at a place where others wait, or are waited for."""
        self._point, self._step, self._where = self._point + 1, 0, where

    def step(self) -> None:
        """Note that this process has come to the next place of several inside `waiting`, and waits anew."""
        if self._since is not None:
            self._since = time.monotonic()  # first: else the new step would be taken for one waited for as long
            self._step += 1

    @contextmanager
    def waiting(
        self, where: str, patient: bool = False, whom: Sequence[int] | None = None, works: bool = False
    ) -> Iterator[None]:
        """Wait for others inside the block: for `whom`, or all.

        An error of the communication becomes a ResourceError that names the lost process.

        Args:
            where: words for the place.
            patient: whether it waits for as long as they live.
            whom: None: for all.
            works: whether the block does other work, too, whose errors are its own.
        """
        self.arrive(where)
        self._patient, self._whom = patient, range(self.world) if whom is None else whom
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            lost = self._broken()
            if lost is None and works and not _is_communication(error):
                raise
            raise lost or self._leaving(_first_line(error)) from error
        finally:
            self._since = None

    def check_lost(self, unless: Sequence[str] = ()) -> None:
        """Raise ResourceError if another process has said that it leaves, unless all these keys had been written."""
        if self.store.check(["lost"]) and not (unless and self.store.check(list(unless))):
            raise self._leaving_after(self.store.get("lost"))

    def _beat(self, leave: Callable[[EncdecError], NoReturn]) -> None:
        count = 0
        heard: dict[int, tuple[int, float]] = {}
        try:
            while not self._ended.wait(self._interval):
                count += 1
                self._asked = time.monotonic()
                self._own.set(f"at/{self.rank}", f"{count}|{self._point}|{self._step}|{self._where}")
                since = self._since
                waited = self._asked - since if since is not None else 0.0
                if waited < self.timeout / 3:
                    heard = {}
                elif (lost := self._missed(waited, heard)) is not None and self._since == since:
                    leave(lost)
                self._asked = None
        except RuntimeError as error:
            if not self._ended.is_set():
                leave(self._broken() or self._leaving(_first_line(error)))

    def _missed(self, waited: float, heard: dict[int, tuple[int, float]]) -> ResourceError | None:
        """Return who is missed after a wait; `heard` says which beat was heard last of whom, and when first."""
        if self._own.check(["lost"]):
            return self._leaving_after(self._own.get("lost"))
        whom, now, beats = list(self._whom), time.monotonic(), self._look()
        for rank, beat in beats.items():
            if rank not in heard or heard[rank][0] != beat.number:
                heard[rank] = beat.number, now
        silent = [rank for rank in whom if rank in heard and now - heard[rank][1] >= self.timeout * 2 / 3]
        if silent or self._patient or waited < self.timeout + 3 * self._interval:
            return self._named(silent, beats, "gives no sign of life")
        late = [rank for rank in beats if beats[rank].point < (self._point, self._step)]
        return self._named(late, beats, f"lives, but did not come within {self.timeout:g} s")

    def _guard(self, leave: Callable[[EncdecError], NoReturn]) -> None:
        """Watch the thread that asks the store: who waits for the answer of a stopped process waits for ever."""
        while not self._ended.wait(self._interval):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self.timeout / 2:
                leave(self._leaving("process 0, or torchrun on its machine, which holds the store, does not answer"))

    def _look(self) -> dict[int, Beat]:
        """Return the beats of those who are waited for, in one request: there may be a thousand."""
        whom = [rank for rank in self._whom if rank != self.rank]
        values = self._own.multi_get([f"at/{rank}" for rank in whom]) if whom else []
        return {rank: Beat.read(value.decode()) for rank, value in zip(whom, values, strict=True)}

    def _named(self, ranks: Sequence[int], beats: Mapping[int, Beat], what: str) -> ResourceError | None:
        if not ranks:
            return None
        return self._leaving("; ".join(f"process {rank}, last at {beats[rank].where}, {what}" for rank in ranks))

    def _leaving_after(self, words: bytes) -> ResourceError:
        return ResourceError(f"process {self.rank} leaves at {self._where}: {words.decode()}")

    def _leaving(self, why: str) -> ResourceError:
        return ResourceError(
            f"process {self.rank} leaves at {self._where}: {why}; the last checkpoint is good: start all processes "
            "again, with a greater parallel.timeout if one was only slow."
        )

    def _broken(self) -> ResourceError | None:
        """Return who was lost when a connection broke: who has said that it leaves, or is silent."""
        try:
            self.check_lost()
            early = self._look()
            time.sleep(3 * self._interval)
            self.check_lost()
            late = self._look()
            silent = [rank for rank, beat in early.items() if late[rank].number == beat.number]
            return self._named(silent, late, "gives no sign of life")
        except ResourceError as error:
            return error
        except RuntimeError as error:
            return self._leaving(
                f"process 0, or torchrun on its machine, which holds the store, is gone ({_first_line(error)})"
            )

    def _try_set(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except RuntimeError:
            return  # the store is gone: nobody is there to hear it

    def _stay(self) -> None:
        keys = [f"bye/{rank}" for rank in range(self.world)]
        deadline = time.monotonic() + _LAST_WORDS
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(self._interval / 10)


def _is_communication(error: RuntimeError) -> bool:
    return isinstance(error, DistError) or "gloo" in str(error)


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n")[0].rstrip(".")
