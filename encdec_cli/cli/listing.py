"""`encdec list`: what is registered, from where, and what is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.options import PluginOption

if TYPE_CHECKING:
    from encdec_cli.registry import Origin


def list_components(
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    plugin: PluginOption = None,
) -> None:
    """List every corpus, model, task, strategy, metric, reranker and export target, and from where it comes.

    A component whose extra is missing is listed with the command that installs it, a component or a plugin that does
    not load with the reason. If that is a plugin file that --plugin or ENCDEC_PLUGINS names, the exit code is 2.
    """
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import environment_plugins

    files = [*environment_plugins(), *(plugin or [])]
    plugins = list(_load(files))
    _show_json(plugins) if as_json else _show_table(plugins)
    broken = [row for row in plugins if row.error]
    if broken:
        raise UsageError("\n".join(row.error or "" for row in broken))


def _load(files: Sequence[Path]) -> Iterator[Origin]:
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import Origin, load_plugin

    for path in files:
        try:
            loaded = load_plugin(path)
        except UsageError as error:
            yield Origin(str(path), "", str(error))
        else:
            yield Origin(str(path), f"sha256 {loaded.sha256[:12]}")


def _show_table(plugins: Sequence[Origin]) -> None:
    from encdec_cli.cli.console import table
    from encdec_cli.registry import KINDS

    rows = [["KIND", "NAME", "FROM", "STATUS"]]
    for registry in KINDS.values():
        rows += [_row(registry.kind, origin) for origin in registry.origins()]
    rows += [_row("plugin", origin) for origin in plugins]
    print(table(rows))


def _row(kind: str, origin: Origin) -> list[str]:
    status = f"broken: {origin.error}" if origin.error else "ok"
    return [kind, origin.name, origin.source, f"extra missing: {origin.needs}" if origin.needs else status]


def _show_json(plugins: Sequence[Origin]) -> None:
    import json
    from dataclasses import asdict

    from encdec_cli.registry import KINDS

    result = {kind: [asdict(origin) for origin in registry.origins()] for kind, registry in KINDS.items()}
    print(json.dumps({**result, "plugins": [asdict(origin) for origin in plugins]}, ensure_ascii=False))
