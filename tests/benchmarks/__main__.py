"""Training and beam search against plain PyTorch, one after the other: `python -m tests.benchmarks`.

The first table of training.py, of the small model against nn.Transformer as a user would train it and with our batches,
and that of speed.py. Give the words of either to these themselves; this takes none but `--data`.
"""

import argparse
import subprocess
import sys

PLAIN = ["--size", "small", "--without", "transformers,JoeyNMT", "--cores", "2", "--accumulate", "2"]


def main() -> None:
    """Run both as commands of their own, so that neither feels the other's threads and memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--data", help="folder made by `encdec preprocess`; default: synthetic pairs")
    options = parser.parse_args()
    data = ["--data", options.data] if options.data else []
    for words in (["tests.benchmarks.training", *PLAIN, *data], ["tests.benchmarks.speed", *data]):
        subprocess.run([sys.executable, "-m", *words], check=True)


if __name__ == "__main__":
    main()
