"""Names to components: one class for every kind, one visible table for what is built in.

A component arrives from the built-in table (a string, imported when it is used), from a decorator in a
one-file plugin, or from an entry point of an installed package. Nothing is imported to list names.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from encdec_cli.errors import UsageError

T = TypeVar("T", bound=type[Any])


@dataclass(frozen=True)
class Origin:
    """One row of `encdec list`: a name, where it comes from, and why it failed to load, if it did."""

    name: str
    source: str
    error: str | None = None
    needs: str | None = None
    """The command that installs what it needs, if that is missing."""


@dataclass(frozen=True)
class Plugin:
    """A plugin file that this process has run: its path and the SHA-256 of its bytes."""

    path: Path
    sha256: str


def nearest(word: str, known: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    # 0.75: at difflib's own 0.6 an unknown `warmup` draws `amp`.
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" (did you mean '{match[0]}'?)" if match else ""


class Registry(Generic[T]):
    """The components of one kind, by name.

    Args:
        group: the entry-point group that installed packages use, such as `encdec.models`.
        kind: the word for one of them in messages, such as `model`.
        built_in: name -> `module:Class`.
        extras: name -> the module it needs, and the extra of this package that installs it.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        built_in: Mapping[str, str],
        extras: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        self.group = group
        self.kind = kind
        self._built_in = dict(built_in)
        self._extras = dict(extras)
        self._registered: dict[str, tuple[T, str]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class to make it known as `name`. A taken name is an error that tells by whom."""

        def add(component: T) -> T:
            where = f"{component.__module__}.{component.__qualname__}"
            if name in self._built_in:
                raise UsageError(f"{self.kind} '{name}' ({where}): the name is built in; choose another.")
            if name in self._registered and self._registered[name][1] != where:
                raise UsageError(f"{self.kind} '{name}' ({where}): already registered by {self._registered[name][1]}.")
            self._registered[name] = (component, where)
            return component

        return add

    def get(self, name: str) -> T:
        """Return the component called `name`; raise UsageError with the known names if there is none."""
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            component: T = getattr(importlib.import_module(module), attribute)
            return component
        if name in self._registered:
            return self._registered[name][0]
        for point in self._entry_points():
            if point.name == name:
                return self._load(point)
        raise UsageError(
            f"no {self.kind} '{name}' among {', '.join(self.names())}{nearest(name, self.names())}; "
            "a component of your own needs --plugin FILE."
        )

    def names(self) -> list[str]:
        """Return every known name, without importing anything."""
        return list(dict.fromkeys([*self._built_in, *self._registered, *(p.name for p in self._entry_points())]))

    def origins(self) -> list[Origin]:
        """Return every component with its source, trying to load those of installed packages."""
        rows = [Origin(name, "built in", needs=self._missing(name)) for name in self._built_in]
        rows += [Origin(name, where) for name, (_, where) in self._registered.items()]
        for point in self._entry_points():
            if any(row.name == point.name for row in rows):
                continue
            distribution = point.dist.name if point.dist else "unknown distribution"
            try:
                self._load(point)
            except UsageError as error:
                rows.append(Origin(point.name, distribution, str(error)))
            else:
                rows.append(Origin(point.name, distribution))
        return rows

    def _missing(self, name: str) -> str | None:
        """Return the command that installs what a built-in component lacks; nothing is imported to find out."""
        module, extra = self._extras.get(name, (None, None))
        present = module is None or importlib.util.find_spec(module) is not None
        return None if present else f"pip install 'encdec-cli[{extra}]'"

    def _entry_points(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _load(self, point: EntryPoint) -> T:
        distribution = point.dist.name if point.dist else "unknown distribution"
        try:
            component: T = point.load()
        except (Exception, SystemExit) as error:
            # Whatever a stranger's package raises at import must not take the command down unexplained.
            raise UsageError(
                f"{self.kind} '{point.name}' of the installed package {distribution} does not load: "
                f"{type(error).__name__}: {error}; update or remove that package."
            ) from error
        return component


models: Registry[type[Any]] = Registry(
    "encdec.models", "model", {"transformer": "encdec_cli.models.transformer:Transformer"}
)
tasks: Registry[type[Any]] = Registry(
    "encdec.tasks",
    "task",
    {
        "translation": "encdec_cli.tasks.translation:Translation",
        "summarization": "encdec_cli.tasks.summarization:Summarization",
        "dialogue": "encdec_cli.tasks.dialogue:Dialogue",
    },
)
strategies: Registry[type[Any]] = Registry(
    "encdec.strategies",
    "strategy",
    {
        "beam": "encdec_cli.decoding.beam:Beam",
        "diverse": "encdec_cli.decoding.diverse:Diverse",
        "siblings": "encdec_cli.decoding.siblings:Siblings",
        "constrained": "encdec_cli.decoding.constrained:Constrained",
        "contrastive": "encdec_cli.decoding.contrastive:Contrastive",
        "speculative": "encdec_cli.decoding.speculative:Speculative",
        "sampling": "encdec_cli.decoding.sampling:Sampling",
    },
)
corpora: Registry[type[Any]] = Registry(
    "encdec.corpora",
    "corpus",
    {
        "files": "encdec_cli.corpora.files:Files",
        "cldr": "encdec_cli.corpora.cldr:Cldr",
        "docstrings": "encdec_cli.corpora.docstrings:Docstrings",
        "chatterbot": "encdec_cli.corpora.chatterbot:Chatterbot",
        "distilled": "encdec_cli.corpora.distilled:Distilled",
        "backtranslation": "encdec_cli.corpora.backtranslation:Backtranslation",
    },
    {"cldr": ("babel", "corpora"), "chatterbot": ("chatterbot_corpus", "corpora")},
)
metrics: Registry[type[Any]] = Registry(
    "encdec.metrics",
    "metric",
    {
        "bleu": "encdec_cli.evaluation.sacre:Bleu",
        "chrf": "encdec_cli.evaluation.sacre:Chrf",
        "ter": "encdec_cli.evaluation.sacre:Ter",
        "rouge": "encdec_cli.evaluation.rouge:Rouge",
        "exact": "encdec_cli.evaluation.overlap:Exact",
        "f1": "encdec_cli.evaluation.overlap:TokenF1",
        "distinct": "encdec_cli.evaluation.overlap:Distinct",
        "perplexity": "encdec_cli.evaluation.perplexity:Perplexity",
    },
)
rerankers: Registry[type[Any]] = Registry(
    "encdec.rerankers",
    "reranker",
    {
        "mbr": "encdec_cli.reranking.mbr:MinimumBayesRisk",
        "noisy_channel": "encdec_cli.reranking.noisy_channel:NoisyChannel",
        "oracle": "encdec_cli.reranking.oracle:Oracle",
    },
)
exporters: Registry[type[Any]] = Registry(
    "encdec.exporters",
    "export target",
    {"ctranslate2": "encdec_cli.bundle.ctranslate2:CTranslate2"},
    {"ctranslate2": ("ctranslate2", "ctranslate2")},
)

KINDS: dict[str, Registry[type[Any]]] = {
    "corpora": corpora,
    "models": models,
    "tasks": tasks,
    "strategies": strategies,
    "metrics": metrics,
    "rerankers": rerankers,
    "export targets": exporters,
}
"""Every registry by the plural of its kind, in the order in which `encdec list` shows them."""


class _PluginLoader(SourceLoader):
    """Runs the very bytes whose hash is recorded: no compiled copy of an older file is read, none is written."""

    def __init__(self, name: str, path: Path, source: bytes) -> None:
        self._name, self._path, self._source = name, path, source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: bytes | str) -> bytes:
        if str(path) != str(self._path):
            raise OSError(f"{path!s}: only the plugin itself is loaded")
        return self._source


def load_plugin(path: Path) -> Plugin:
    """Run a one-file plugin, so that its decorators register what it defines.

    Running the same file twice is harmless. Raises UsageError if the file is missing or fails.
    """
    path = path.resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"plugin {path}: {error.strerror}; give the path of a Python file.") from error
    digest = hashlib.sha256(source).hexdigest()
    name = f"encdec_plugin_{path.stem}_{digest[:12]}"
    if name not in sys.modules:
        loader = _PluginLoader(name, path, source)
        module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
        module.__file__ = str(path)
        sys.modules[name] = module  # dataclasses look their module up by name
        try:
            loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"plugin {path}: {type(error).__name__}: {error}.") from error
    return Plugin(path, digest)


def environment_plugins() -> list[Path]:
    """Return the plugin files that ENCDEC_PLUGINS names, separated as PATH is."""
    return [Path(name) for name in os.environ.get("ENCDEC_PLUGINS", "").split(os.pathsep) if name]


def load_plugins(named: Sequence[Path]) -> list[Plugin]:
    """Run the plugin files of ENCDEC_PLUGINS, then those that the command line names."""
    return [load_plugin(path) for path in [*environment_plugins(), *named]]
