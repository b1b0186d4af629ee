"""Run the tests of docs/reliability.md in full, or a share of their cases, and print a table of what they found.

`python -m tests.reliability`, `python -m tests.reliability T1 T5`, `python -m tests.reliability --share 0.1`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from encdec_cli.cli.console import table
from tests.reliability import crashes, damage, figures, folders, processes
from tests.reliability.bench import Bench

TESTS = {
    "T1": crashes.random_kills,
    "T2": crashes.kill_at_every_call,
    "T3": crashes.signals,
    "T4": crashes.full_disk,
    "T5": damage.damaged_files,
    "T6": damage.simultaneous_starts,
    "T7": folders.unusable_folders,
    "T8": folders.changed_things,
    "T9": damage.finished_run,
    "T10": crashes.kill_in_every_deletion,
    "T16": figures.order,
    "T23": figures.non_finite,
    "T24": figures.memory,
    "T25": figures.golden,
    "T26": processes.lost_processes,
    "T27": processes.uneven_data,
    "T28": processes.other_numbers,
}
NEED_STRACE = ("T2", "T4", "T10")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"of {', '.join(TESTS)}; all if none is named")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each test, evenly spread")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and places that chance chooses")
    chosen = parser.parse_args()
    unknown = set(chosen.tests) - TESTS.keys()
    if unknown:
        parser.error(f"no test {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell in the background has it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = Path(tempfile.mkdtemp(prefix="encdec-reliability-"))
    rows, failed = [["TEST", "WHAT", "CASES", "WRONG", "SLOWEST", "SECONDS"]], 0
    bench = Bench(folder, chosen.seed, chosen.share)
    try:
        for name in chosen.tests or TESTS:
            what = (TESTS[name].__doc__ or "").split("\n")[0].partition(": ")[2].rstrip(".")
            if name in NEED_STRACE and not shutil.which("strace"):
                rows.append([name, f"{what} (left out: no strace here)", "0", "", "", ""])
                continue
            began, cases, wrong, bench.slowest = time.monotonic(), 0, 0, None
            for case, problem in TESTS[name](bench):
                cases += 1
                late = bench.late()
                if said := problem or late:
                    wrong += 1
                    print(f"{name}: {case}: {said}", file=sys.stderr, flush=True)
            slowest = "" if bench.slowest is None else f"{bench.slowest:.2f} s"
            rows.append([name, what, str(cases), str(wrong), slowest, f"{time.monotonic() - began:.0f}"])
            print(table(rows[-1:]), file=sys.stderr, flush=True)
            failed += wrong
    finally:
        bench.forks.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.pop("ENCDEC_PLUGINS", None)
    sys.exit(main())
