"""The processes of one run: what each computes of an update, sums over all, and what the first does for all.

Nothing here starts processes: `torchrun` does, and tells each its number by RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from encdec_cli.errors import EncdecError, ResourceError, UsageError
from encdec_cli.recipe import Parallel
from encdec_cli.training.rollcall import FIRST, RollCall
from encdec_cli.training.signals import Stop

T = TypeVar("T")

BUCKET = 1 << 24
"""Numbers that are summed in one message: 64 MB of fp32."""
_START = 6
"""How many times as long as later a process is waited for at first: some import from slow disks."""
_LIMIT = 3
"""How many times as long a collective is waited for. The roll call gives up first: it can say who is missing."""
_STOP = "stop"
"""The key in the store by which a process says that a signal has asked it to stop."""
_POLL, _LONGEST_POLL = 0.01, 0.5
"""Seconds between two looks for what another process is to write: at first, and after a while, for a thousand ask."""


class Ranks:
    """The processes of a run; alone, one process is the first, gets all of an update, and its sums are its own.

    Every process calls the same methods in the same order. While one waits for others its roll call watches them:
    who is dead, stopped or late is named, and this process leaves.

    Args:
        rank: the number of this process.
        world: how many there are.
        roll: who is there; None for one process alone.
        tensor: how many neighbours share each layer of the model, and so the micro-batches, too; `world` is a multiple.
    """

    def __init__(self, rank: int = 0, world: int = 1, roll: RollCall | None = None, tensor: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.tensor = tensor
        self._roll = roll
        self._told = 0
        self._work = ""
        self._stop: Stop | None = None
        self.mates: dist.ProcessGroup | None = None
        """Those who share the layers with this process; see `divide`."""
        self.peers: dist.ProcessGroup | None = None
        """Those who have the same part of the layers, and so of every update other micro-batches; None: all."""

    @property
    def data(self) -> int:
        """How many processes, or groups of mates, share the micro-batches of an update."""
        return self.world // self.tensor

    @property
    def place(self) -> int:
        """The number of this process among its mates."""
        return self.rank % self.tensor

    def divide(self) -> None:
        """Meet the mates and the peers; before that, peers are all."""
        if self._roll is None:
            return
        limit, first = timedelta(seconds=_LIMIT * self._roll.timeout), self.rank - self.place
        with self._roll.waiting("the start"):
            self.mates, self.peers = (
                dist.new_group(list(members), limit, use_local_synchronization=True)
                for members in (range(first, first + self.tensor), range(self.place, self.world, self.tensor))
            )

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares, validates, writes and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the micro-batches of an update, which is that of its mates.

        That is every `data`-th, from the number of its group on.
        """
        return items[self.rank // self.tensor :: self.data]

    def heed(self, stop: Stop) -> None:
        """Let a signal to this process reach the first one, too, which alone can break off what the others wait for."""
        self._stop = stop
        if self._roll is not None and self.first:
            stop.elsewhere = partial(_is_told, self._roll.store)

    def begin(self, what: str) -> str:
        """Note the work that what is computed from now on is part of; return it."""
        self._work = what
        return what

    def sum(self, what: str, tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Replace each tensor by its sum over all processes, or a group; all of one type and device, in buckets.

        The order of the addends depends on the number of processes alone. One process alone, in all or in its group,
        does not even ask for the tensors.
        """
        if self._roll is None or (group is not None and group.size() == 1):
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._roll.waiting(what):
                dist.all_reduce(flat, group=group)
                _settle()
            for tensor, total in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def exchange(self, what: str, parts: Tensor) -> Tensor:
        """Give process i parts[i], and return what each gave this one, in their order: [world, ...], contiguous."""
        if self._roll is None:
            return parts
        came = torch.empty_like(parts)
        with self._roll.waiting(what):
            dist.all_to_all_single(came, parts)
            _settle()
        return came

    def total(self, what: str, value: float, group: dist.ProcessGroup | None = None) -> float:
        """Return the sum of a number over all processes, or a group."""
        if self._roll is None:
            return value
        number = torch.tensor([value], dtype=torch.float64)  # on the CPU, so by gloo
        self.sum(what, [number], group)
        return float(number)

    def most(self, what: str, values: Sequence[float]) -> list[float]:
        """Return for each of some numbers the greatest that a process has."""
        numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU, so by gloo
        if self._roll is not None:
            with self._roll.waiting(what):
                dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def least(self, what: str, value: float) -> float:
        """Return the smallest of a number that all processes have."""
        return -self.most(what, [-value])[0]

    def first_does(self, what: str, work: Callable[[], T], silently: bool = False) -> T:
        """Let the first process alone do `work`, however long it takes; return its result, plain JSON, to all.

        The others wait at the store, not in a collective, for as long as the first shows that it lives, or with
        `silently` for ever: some libraries hold the interpreter for minutes, and with it the beat.
        """
        if self._roll is None:
            return work()
        self._told += 1
        key = f"told/{self._told}"
        if self.first:
            self._roll.arrive(what)
            result = work()
            self._roll.store.set(key, json.dumps(result))
            return result
        self._await(self._roll, what, [key], () if silently else (0,))
        told: T = json.loads(self._roll.store.get(key))
        return told

    @contextmanager
    def computing(self, what: str, patient: bool = True) -> Iterator[None]:
        """Compute inside the block what has the processes wait for each other on the way.

        patient: for as long as they live; else each must come to every `step` in time.
        """
        if self._roll is None:
            yield
            return
        where = f"{what} of {self._work}" if self._work else what
        with self._roll.waiting(where, patient=patient, works=True):
            yield
            _settle()

    def step(self, *_: object) -> None:
        """Note, inside `computing`, that this process is about to wait; whatever a hook gives does not matter."""
        if self._roll is not None:
            self._roll.step()

    def meet(self, what: str) -> None:
        """Wait until every process has come here, however long each takes."""
        if self._roll is None:
            return
        self._told += 1
        self._roll.store.set(f"met/{self._told}/{self.rank}", "")
        self._await(self._roll, what, [f"met/{self._told}/{rank}" for rank in range(self.world)])

    def _await(self, roll: RollCall, what: str, keys: list[str], whom: Sequence[int] | None = None) -> None:
        pause, told = _POLL, self._stop is None or self.first
        with roll.waiting(what, patient=True, whom=whom):
            while not roll.store.check(keys):
                roll.check_lost(keys)
                if not told and self._stop:
                    roll.store.set(_STOP, "")
                    told = True
                time.sleep(pause)
                pause = min(1.2 * pause, _LONGEST_POLL)


def _is_told(store: Store) -> bool:
    try:
        return store.check([_STOP])
    except RuntimeError:  # the store is gone: whoever waits next says so
        return False


def _settle() -> None:
    """Wait for what a GPU has been asked to do: a collective there returns before it is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def joined(device: str, parallel: Parallel, leave: Callable[[EncdecError], NoReturn]) -> Iterator[tuple[Ranks, str]]:
    """Meet the other processes that `torchrun` has started; give the ranks, and the device of this process.

    Without `torchrun` this process is alone.

    Args:
        device: `cuda` becomes `cuda:<number of this process on its machine>`.
        parallel: after how many seconds a process that is dead, stopped or late is given up, and who shares what.
        leave: ends this process with an error, from a thread: the main one may hang in a call of a library.

    Raises:
        ResourceError: naming the processes that did not come, or are lost.
    """
    world, timeout = _number("WORLD_SIZE", 1), parallel.timeout
    if world == 1:
        yield Ranks(), device
        return
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    with _roll_call(rank, world, timeout, leave) as roll:
        ranks = Ranks(rank, world, roll, parallel.tensor)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        limit = timedelta(seconds=_LIMIT * timeout)
        group = PrefixStore("group", roll.store)
        with roll.waiting("the start"):
            dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=limit)
        yield ranks, device
        # Not in the case of an error: to leave a group in order, others would have to take part.
        ranks.meet("the end")
        dist.destroy_process_group()


@contextmanager
def _roll_call(rank: int, world: int, timeout: float, leave: Callable[[EncdecError], NoReturn]) -> Iterator[RollCall]:
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 0)
    # torchrun keeps the store itself, unless it is told not to.
    serving = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        first, second = (
            TCPStore(host, port, None, serves, timedelta(seconds=timeout), wait_for_workers=False)
            for serves in (serving, False)
        )
        name = _agreed(PrefixStore("encdec", first), rank, world, _START * timeout)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ResourceError(
            f"process {rank}: no meeting at {host}:{port}, MASTER_ADDR and MASTER_PORT ({reason}); start all by "
            "torchrun, with an address that every machine can reach."
        ) from error
    own, other = (PrefixStore(name, PrefixStore("encdec", store)) for store in (first, second))
    roll = RollCall(own, other, rank, world, timeout)
    with roll.called(leave, serving):
        yield roll


def _agreed(store: Store, rank: int, world: int, timeout: float) -> str:
    """Return a name that the processes of this start have just agreed on, since the store may be full of another's.

    torchrun starts processes again beside the same store, and its count of restarts differs between machines.
    """
    own = os.urandom(8).hex()
    others = range(1, world)
    missing = list(others) if rank == 0 else [0]
    if rank:
        store.set(f"hello/{rank}", own)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [store.get(f"hello/{r}").decode() if store.check([f"hello/{r}"]) else "" for r in others]
            store.set("welcome", " ".join([own, *hellos]))
            missing = [r for r in others if not store.check([f"{own}/at/{r}"])]
            if not missing:
                store.set(f"{own}/at/0", FIRST)
                return own
        elif store.check(["welcome"]):
            name, *hellos = store.get("welcome").decode().split(" ")
            if own in hellos:  # process 0 answers this start
                store.set(f"{name}/at/{rank}", FIRST)
                return name
        time.sleep(_POLL)
    listed = ", ".join(map(str, missing))
    raise ResourceError(f"process {rank} leaves: of {world}, process {listed} did not come within {timeout:g} s.")


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, str(otherwise))
    if not value.isdecimal():
        raise UsageError(f"{name}={value}: expected a number, as torchrun sets it.")
    return int(value)


def shared_cores() -> int:
    """Return how many processes share the cores of this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))
