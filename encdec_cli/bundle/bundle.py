"""A model folder: weights, recipe, tokenizers; everything needed to use a model, and nothing to train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encdec_cli import __version__, atomic
from encdec_cli.bundle import tensors
from encdec_cli.bundle.run import SPENT
from encdec_cli.errors import BundleError, EncdecError, UsageError
from encdec_cli.models.model import Model
from encdec_cli.recipe import Recipe, from_resolved, resolved
from encdec_cli.registry import Plugin
from encdec_cli.tasks.task import Task
from encdec_cli.text.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
_DESCRIPTION, _WEIGHTS, _SOURCE, _TARGET = "bundle.json", "model.safetensors", "source.tokenizer", "target.tokenizer"


def build_model(recipe: Recipe, source_vocab: int, target_vocab: int) -> Model:
    """Return a new model of the recipe's kind. Raises UsageError where sizes contradict each other."""
    try:
        model: Model = recipe.model.build(source_vocab, target_vocab)
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    return model


def model_keys(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe's model that decide what its weights mean: all but those of dropout."""
    return {f"model.{key}": value for key, value in recipe.model.plain().items() if "dropout" not in key}


@dataclass
class Bundle:
    """A model with the text side it was trained with."""

    recipe: Recipe
    model: Model
    source: Tokenizer
    target: Tokenizer
    facts: dict[str, Any] = field(default_factory=dict)
    """How the model came about: update, scores, averaged checkpoints, usual ratios of target to source length."""
    plugins: Sequence[Plugin] = ()
    """The plugin files that the model was made with; of a loaded bundle, their names without folders."""
    spent: dict[str, float] = field(default_factory=dict)
    """Time, energy and money of the run so far; of a loaded bundle nothing."""

    @property
    def task(self) -> Task:
        """The task that reads and writes this model's lines."""
        task: Task = self.recipe.task.config
        return task

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._some_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self._some_weight.dtype

    @property
    def _some_weight(self) -> Tensor:
        # Once packed, which is done on a CPU alone, a model may have no parameter left.
        return next(self.model.parameters(), torch.empty(0))

    @property
    def longest_source(self) -> int:
        """Most tokens of a source that the model reads, without EOS; longer ones are cut."""
        return self._at_most(self.recipe.text.max_source)

    @property
    def longest_target(self) -> int:
        """Most tokens of a target that the model can judge, without EOS: none of its training was longer."""
        return self._at_most(self.recipe.text.max_target)

    def _at_most(self, tokens: int) -> int:
        limits = [tokens, self.model.max_positions]
        return min(limit for limit in limits if limit is not None) - 1

    @classmethod
    def load(cls, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
        """Load a bundle, or the bundle of a run folder, after checking every file against its manifest.

        Raises BundleError that names the file, or the plugin that the model needs.
        """
        folder = find_bundle(path)
        try:
            atomic.verify(folder)
        except BundleError as error:
            raise BundleError(
                f"{str(error).rstrip('.')}; `encdec train` with the run's recipe writes a lost model anew, or copy it "
                "again from where it is whole."
            ) from error
        description = _description(folder)
        plugins = _plugins(folder, description)
        recipe = _recipe(folder, description, plugins)
        source = _tokenizer(folder, _SOURCE, description["source"])
        target = source if description["shared"] else _tokenizer(folder, _TARGET, description["target"])
        model = build_model(recipe, len(source.vocabulary), len(target.vocabulary))
        weights = folder / _WEIGHTS
        tensors.load_weights(model, tensors.read_tensors(weights), weights)
        model.to(device=device, dtype=dtype).eval()
        return cls(recipe, model, source, target, description["facts"], plugins)

    def save_weights(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the bundle with these weights (the model's own, or an average's) as `folder`, all of it or nothing."""
        shared = self.source is self.target
        # One file may have been given by two paths.
        made_with = dict.fromkeys((plugin.path.name, plugin.sha256) for plugin in self.plugins)
        description = {
            "format": FORMAT,
            "encdec": __version__,
            "recipe": resolved(self.recipe),
            "shared": shared,
            "source": {"kind": self.source.kind, "tokens": len(self.source.vocabulary)},
            "target": {"kind": self.target.kind, "tokens": len(self.target.vocabulary)},
            "facts": self.facts,
            "plugins": [{"name": name, "sha256": sha256} for name, sha256 in made_with],
        }
        with atomic.new_folder(folder, [SPENT]) as temporary:
            tensors.container(weights).write(temporary / _WEIGHTS)
            (temporary / _SOURCE).write_bytes(self.source.to_bytes())
            if not shared:
                (temporary / _TARGET).write_bytes(self.target.to_bytes())
            (temporary / _DESCRIPTION).write_bytes(atomic.json_bytes(description))
            if self.spent:
                (temporary / SPENT).write_bytes(atomic.json_bytes(self.spent))


def find_bundle(path: Path) -> Path:
    """Return the bundle folder that `path` is or, for a run folder, holds. Raises BundleError."""
    for folder in (path, path / "bundle"):
        if (folder / _DESCRIPTION).is_file():
            return folder
    if not path.exists():
        raise BundleError(f"{path}: no such model folder; give a bundle or the folder of a run.")
    if (path / "lock").is_file() or (path / "log.jsonl").is_file():
        raise BundleError(f"{path}: this run has no model yet; it appears with the first validation.")
    raise BundleError(f"{path}: neither a bundle ({_DESCRIPTION} is missing) nor the folder of a run.")


def changed_plugins(path: Path, loaded: Sequence[Plugin]) -> list[str]:
    """Return a sentence for each loaded plugin whose name is that of one the model was made with, but not its bytes.

    `path` is a bundle or the folder of a run. Only its description is read; no file of it is checked.
    """
    folder = find_bundle(path)
    made_with: dict[str, list[str]] = {}
    for plugin in _plugins(folder, _description(folder)):
        made_with.setdefault(plugin.path.name, []).append(plugin.sha256)
    return [
        f"plugin {plugin.path} is not the {plugin.path.name} that {path} was made with "
        f"(sha256 {hashes[0][:12]} then, {plugin.sha256[:12]} now); outputs may differ"
        for plugin in loaded
        if (hashes := made_with.get(plugin.path.name)) and plugin.sha256 not in hashes
    ]


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a bundle, or of a run's; no file is checked. Raises BundleError if they cannot be read."""
    return dict(_description(find_bundle(path))["facts"])


def identity(path: Path) -> str:
    """Return what changes with the files of a bundle, or of a run's: the SHA-256 of its manifest."""
    return atomic.sha256(find_bundle(path) / atomic.MANIFEST)


def load_alike(what: str, path: Path, bundle: Bundle, dtype: torch.dtype | None = None) -> Bundle:
    """Load a bundle that reads and writes the same ids as `bundle`, and as many of them, for its device.

    In its dtype, or in another one that is given.

    Raises BundleError, which begins with `what`, where the vocabularies are others or positions are lacking.
    """
    try:
        found = Bundle.load(path, str(bundle.device), dtype or bundle.dtype)
    except BundleError as error:
        raise BundleError(f"{what} {error}") from error
    for side, ours, theirs in (("source", bundle.source, found.source), ("target", bundle.target, found.target)):
        if ours.vocabulary.sha256 != theirs.vocabulary.sha256:
            raise BundleError(
                f"{what} {path}: its {side} vocabulary is another than the model's ({len(theirs.vocabulary)} and "
                f"{len(ours.vocabulary)} tokens); train both on the same prepared data."
            )
    most, least = found.model.max_positions, bundle.model.max_positions
    if most is not None and (least is None or most < least):
        raise BundleError(
            f"{what} {path}: reads {most} positions at most, fewer than the model it is to help; train it with "
            "`positions: sinusoidal` or `rotary`, or with as many positions."
        )
    return found


def _description(folder: Path) -> dict[str, Any]:
    description = atomic.read_json(folder / _DESCRIPTION)
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise BundleError(
            f"{folder / _DESCRIPTION}: bundle format {found}, this version reads {FORMAT}; use a newer encdec."
        )
    return dict(description)


def _plugins(folder: Path, description: dict[str, Any]) -> list[Plugin]:
    """Return what the bundle says of its plugins; nothing is run, and of a path only the name counts."""
    try:
        return [Plugin(Path(Path(one["name"]).name), one["sha256"][:64]) for one in description["plugins"]]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{folder / _DESCRIPTION}: 'plugins' lacks name or sha256; the file is damaged.") from error


def _recipe(folder: Path, description: dict[str, Any], plugins: Sequence[Plugin]) -> Recipe:
    try:
        return from_resolved(description["recipe"], str(folder / _DESCRIPTION))
    except EncdecError as error:
        flags = " ".join(f"--plugin {plugin.path}" for plugin in plugins)
        hint = f"; the model was made with {_files(plugins)}, pass {flags}" if plugins else ""
        raise BundleError(f"{error}{hint}") from error


def _files(plugins: Sequence[Plugin]) -> str:
    return ", ".join(f"{plugin.path} (sha256 {plugin.sha256[:12]})" for plugin in plugins)


def _tokenizer(folder: Path, name: str, facts: dict[str, Any]) -> Tokenizer:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder / name}: {error.strerror}.") from error
    tokenizer = load_tokenizer(facts["kind"], content)
    if len(tokenizer.vocabulary) != facts["tokens"]:
        raise BundleError(f"{folder / name}: {len(tokenizer.vocabulary)} tokens, expected {facts['tokens']}.")
    return tokenizer
