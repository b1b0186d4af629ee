"""What models write for a run's corpus before its data are prepared: in parts, each of which outlives a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from encdec_cli import atomic
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.run import recover
from encdec_cli.config import parse_component
from encdec_cli.corpora.synthetic import Synthetic
from encdec_cli.decoding.hypothesis import Strategy
from encdec_cli.generation.flags import flags
from encdec_cli.generation.lines import Generated, Options, first_text
from encdec_cli.models.packed import pack
from encdec_cli.recipe import Recipe
from encdec_cli.registry import strategies
from encdec_cli.reranking.reranker import decode
from encdec_cli.text.windows import full_windows
from encdec_cli.training import resume
from encdec_cli.training.machine import decoding_workers

FOLDER = "synthetic"
"""Below a run: what models have written for it."""
_STATE = "state.json"
_SAY_EVERY = 30.0


def write_outputs(
    corpus: Synthetic, folder: Path, device: str, say: Callable[[str], None], wanted: Sequence[str] = ("", "")
) -> None:
    """Let the models of a corpus write what it asks for into a folder, and tell the corpus where it lies.

    What another process has written of the same is kept, and the rest is written after it; the outputs of other
    models, or for other lines, are deleted. Call it where no other process can be writing the folder. `say` is given
    sentences for the user, one of them for a model that is known not to translate the `wanted` way, see `languages`.
    """
    atomic.recover(folder)
    recover(folder)
    state, mark = folder / _STATE, corpus.mark()
    found: Any = atomic.read_json(state) if state.is_file() else None
    if not (isinstance(found, dict) and found.get("mark") == mark):
        atomic.remove_folder(folder)
        found = {"mark": mark, "models": corpus.identities(), "complete": False}
        atomic.write_file(state, atomic.json_bytes(found))
    if not found["complete"]:
        _write_rest(corpus, wanted[::-1] if corpus.writes_sources else wanted, folder, device, say)
        atomic.write_file(state, atomic.json_bytes({**found, "complete": True}))
    corpus.written = folder


def check_writers(recipe: Recipe, run: Path) -> None:
    """Raise UsageError if a run has learned from what other models wrote, or from no such corpus.

    Call it before `write_outputs`, which may take hours: the run would be refused after it.
    """
    learned, state = checkpoint.newest_facts(run / "checkpoints"), run / FOLDER / _STATE
    if learned is None:
        return
    old, new = learned["recipe"]["data"], recipe.data.plain()
    changed = [key for key in ("name", "strategy", "rerank") if old.get(key) != new[key]]
    verdicts = [f"data.{key} was {old.get(key)!r}, is {new[key]!r}" for key in changed]
    found: Any = atomic.read_json(state) if state.is_file() else {}
    if found.get("models", recipe.data.config.identities()) != recipe.data.config.identities():
        verdicts.append("the models that write its training pairs (data.models) have changed")
    if verdicts:
        raise resume.refusal(run, verdicts)


def languages(recipe: Recipe) -> list[str]:
    """Return the codes of the languages read and written, empty where a recipe, or its task, names none."""
    keys = recipe.task.plain()
    return [keys.get("source_language", ""), keys.get("target_language", "")]


def _write_rest(
    corpus: Synthetic, wanted: Sequence[str], folder: Path, device: str, say: Callable[[str], None]
) -> None:
    bundles = [Bundle.load(path, device) for path in corpus.models]
    for path, bundle in zip(corpus.models, bundles, strict=True):
        known = languages(bundle.recipe)
        if any(a and b and a != b for a, b in zip(known, wanted, strict=True)):
            say(f"note: {path}: translates {' to '.join(known)}, where {' to '.join(wanted)} is wanted")
        pack(bundle.model)
    strategy: Strategy = bundles[0].recipe.decoding.config
    if corpus.strategy:
        strategy = parse_component(corpus.strategy, strategies, "data.strategy", bundles[0].recipe.decoding)
    options = Options(strategy, workers=decoding_workers(device))
    done = len(list(folder.glob("*.jsonl")))
    say(f"{', '.join(map(str, corpus.models))} writing in {folder}{f', after {done} parts' if done else ''}")
    windows = full_windows(islice(corpus.asked(), done * options.window, None), options.window)
    began = last = time.monotonic()
    lines = 0
    with closing(decode(bundles, windows, options, corpus.rerank)) as results:
        for number, part in enumerate(full_windows(results, options.window), start=done):
            content = "".join(_line(bundles[0], result) for result in part)
            atomic.write_file(folder / f"part-{number:06d}.jsonl", content.encode())
            lines, now = lines + len(part), time.monotonic()
            if now - last >= _SAY_EVERY:
                last = now
                say(f"{number * options.window + len(part):,} lines written, {lines / (now - began):.0f} a second")


def _line(bundle: Bundle, result: Generated) -> str:
    """Return what `Synthetic.read` reads, in ASCII: whatever was in a text, a line is a line."""
    example = result.example
    read = {"source": example.source, "target": example.target, "record": example.record}
    troubles = [*result.troubles, *flags(bundle, result)]
    return json.dumps({**read, "output": first_text(result), "troubles": troubles}) + "\n"
