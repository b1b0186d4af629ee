"""Options that several commands share, each with one name, one metavar and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", metavar="PATH", help="Bundle or run. [default: $ENCDEC_MODEL, else the newest run]"),
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME,KEY=VALUE,…",
        help="How to search, such as sampling,temperature=0.8,seed=1; keys alone change the recipe's strategy.",
    ),
]
RerankOption = Annotated[
    str | None,
    typer.Option(
        "--rerank", metavar="NAME,KEY=VALUE,…", help="How to order the outputs of a line anew, such as mbr,metric=chrf."
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="NAME,KEY=VALUE,…", help="Such as bleu,tokenize=zh; repeat for more."),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 …")]
RunOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run. [default: runs/<recipe name>]"),
]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A plugin file to load; repeat for more.")
]
OverridesArgument = Annotated[
    # Hidden, since the help would show its Python type; the text of the commands tells of it.
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change.", hidden=True),
]
