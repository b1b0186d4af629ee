"""The machine a command runs on: its cores and its devices."""

from __future__ import annotations

import os

import torch

from encdec_cli.errors import UsageError


def use_threads(threads: int, processes: int = 1) -> int:
    """Let torch use `threads` threads, or with 0 one for each core this process may use; return the number.

    processes: how many share these cores equally.
    """
    threads = threads or max(1, available_cores() // processes)
    torch.set_num_threads(threads)
    return threads


def available_cores() -> int:
    """Return the number of cores that this process is allowed to run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def decoding_workers(device: str) -> int:
    """Return how many processes decode fastest: one for each core on a CPU, else this one alone."""
    return available_cores() if device == "cpu" else 1


def check_device(device: str) -> None:
    """Raise UsageError unless torch can compute on `device`."""
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise UsageError(f"--device {device}: torch cannot use it ({reason}); try --device cpu.") from error


def processor(device: str) -> str:
    """Return what computes on a device, as far as it decides how sums are rounded: a GPU's name, a CPU's registers."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} with {torch.backends.cpu.get_cpu_capability()}"


def add_in_order(device: str) -> None:
    """Let a GPU add its sums in one order, so that the same work gives the same bits, as on a CPU. Call it early."""
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - its module has no types
