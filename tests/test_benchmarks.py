"""The recipes for public data reach what they state: `pytest -m benchmark`, an hour or more on two cores.

ENCDEC_BENCHMARKS names a folder that holds one folder of data for each, as the recipes describe them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import encdec

ROOT = Path(__file__).parent.parent
DATA = os.environ.get("ENCDEC_BENCHMARKS", "")


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("recipe", "folder", "metric", "least"),
    [
        ("scan", "scan", "exact", 99.0),
        ("cmudict", "cmudict-g2p", "exact", 65.0),
        ("multi30k", "multi30k-en-de", "bleu", 38.0),
        ("synopsis", "debian-synopsis", "rouge", 29.0),
        ("sgd", "sgd-dialogue", "bleu", 7.5),
    ],
)
def test_a_recipe_reaches_its_score(tmp_path, recipe, folder, metric, least):
    data = Path(DATA) / folder
    if not DATA or not data.is_dir():
        pytest.skip(f"set ENCDEC_BENCHMARKS to a folder that holds {folder}")
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    if command := re.search(r"^#   paste (?:.*\n#)*? .*awk .*$", text, re.MULTILINE):  # it is prepared as its page says
        shutil.copytree(data, data := tmp_path / "data", copy_function=shutil.copyfile)
        data.chmod(0o755)
        words = re.sub(r"^# +", "", command[0], flags=re.MULTILINE)
        subprocess.run(["bash", "-c", words], cwd=data, check=True)
    run = tmp_path / "run"
    done = encdec("train", ROOT / "recipes" / f"{recipe}.yaml", f"data.root={data}", "--output", run, timeout=7200)
    assert done.returncode == 0, done.stderr
    judged = encdec("evaluate", "--model", run, "--metric", metric, "--score-only", timeout=600)
    assert judged.returncode == 0, judged.stderr
    assert float(judged.stdout.split()[0]) >= least
