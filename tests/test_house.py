"""The structure of the package is a fact: layers, circles, sizes, and nothing that happens at import."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "encdec_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_NESTING, MAX_BRANCHES, MAX_PARAMETERS = 400, 60, 4, 12, 7

# Each layer may import itself and what its row names. A module of the top level is a layer by its own name.
LAYERS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "registry": set(),
    "atomic": set(),
    "allocator": set(),
    "config": set(),
    "text": {"atomic"},
    "corpora": {"atomic", "config", "text"},
    "tasks": {"text"},
    "recipe": {"config"},
    "data": {"atomic", "recipe", "text", "corpora", "tasks"},
    "kernels": {"atomic"},
    "models": {"kernels"},
    "decoding": {"kernels", "models.model", "text.vocabulary"},
    "testing": {"models", "decoding", "text.vocabulary"},
    "bundle": {"atomic", "recipe", "text", "tasks", "models", "decoding", "data"},
    "generation": {"allocator", "kernels", "text", "tasks", "data", "models", "decoding", "bundle"},
    "evaluation": {"text", "data", "bundle", "generation", "models.model", "decoding"},
    "reranking": {"config", "text", "bundle", "generation", "evaluation"},
    "training": {
        *("atomic", "kernels", "config", "recipe", "text", "corpora", "tasks", "data", "models", "decoding"),
        *("bundle", "generation", "evaluation", "reranking"),
    },
}
BELOW_ALL = {"__init__", "errors", "registry"}
TORCH_FREE = {"atomic", "config", "recipe", "text", "corpora", "tasks", "cli"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path, runtime_only: bool = False) -> list[str]:
    """The modules of the package that a file imports anywhere, relative to the package."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if runtime_only:
        for node in ast.walk(tree):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if guarded or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                skipped.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "encdec_cli":
            found.append(node.module.partition(".")[2] or "__init__")
        elif isinstance(node, ast.Import):
            found += [
                a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "encdec_cli"
            ]
    return found


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_imports_point_down():
    wrong = []
    for path in FILES:
        name = name_of(path)
        layer = name.split(".")[0]
        if layer in ("cli", "__main__"):
            continue
        allowed = LAYERS[layer]
        for target in imports(path):
            top = target.split(".")[0]
            if top != layer and top not in allowed and target not in allowed and top not in BELOW_ALL:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_circles():
    graph = {name_of(path): set(imports(path, runtime_only=True)) for path in FILES}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"circle: {' -> '.join([*trail, node])}"
        if node in done or node not in graph:
            return
        for target in graph[node]:
            visit(target, (*trail, node))
        done.add(node)

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_importing_does_nothing(path):
    """At module level: definitions, constants, imports; no bare calls, no loops, no conditions but two."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}: a call at import time"
        if isinstance(node, ast.If):
            assert re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)), f"line {node.lineno}"
        assert not isinstance(node, (ast.For, ast.While, ast.With, ast.Try)), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_only_where_it_is_needed(path):
    if name_of(path).split(".")[0] not in TORCH_FREE:
        return
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not [n for n in names if n.split(".")[0] in ("torch", "ctranslate2", "transformers")]


def nesting(node: ast.AST, depth: int = 0) -> int:
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            continue
        inner = depth + isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        # An elif is written as deep as its if.
        if isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]:
            inner = depth
        deepest = max(deepest, nesting(child, inner))
    return deepest


def branches(function: ast.FunctionDef) -> int:
    kinds = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension)
    return 1 + sum(
        isinstance(node, kinds) + (len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0)
        for node in ast.walk(function)
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE, f"{lines} lines"
    for function in functions(path):
        where = f"{path.name}:{function.lineno} {function.name}"
        parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        count = len([p for p in parameters if p not in ("self", "cls")])
        assert (function.end_lineno or 0) - function.lineno + 1 <= MAX_FUNCTION, where
        assert nesting(function) <= MAX_NESTING, f"{where}: nesting"
        # A command's parameters are its flags.
        is_command = path.parent.name == "cli"
        assert count <= MAX_PARAMETERS or is_command, f"{where}: {count} parameters"
        assert branches(function) <= MAX_BRANCHES, f"{where}: {branches(function)} branches"


def test_typical_sizes():
    assert statistics.median(path.read_text().count("\n") for path in FILES) <= 150
    lengths = [(f.end_lineno or 0) - f.lineno + 1 for path in FILES for f in functions(path)]
    assert statistics.median(lengths) <= 10


FORBIDDEN = {
    r"\bgetattr\([^()]*,[^()]*,": "getattr with a default",
    r"\b(import|from) (pickle|marshal|shelve|dill)\b": "something that unpickles",
    r"(?<!safetensors\.)\btorch\.(load|save)\(": "torch.load or torch.save",
    r"\byaml\.(load|full_load|unsafe_load)\(": "an unsafe YAML loader",
    r"(?<!\.)\b(eval|exec)\(": "eval or exec",
    r"shell=True": "a shell",
    r"\.splitlines\(": "splitlines, which also splits at U+2028",
    r"\bcodecs\.open\(": "codecs.open, which also splits at U+2028",
    r"allow_pickle=True": "something that unpickles",
}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_forbidden(path):
    text = path.read_text()
    for pattern, what in FORBIDDEN.items():
        hits = list(re.finditer(pattern, text))
        assert not hits, f"{what}, line {text[: hits[0].start()].count(chr(10)) + 1}"
    assert path.stem not in ("utils", "helpers", "common", "base"), "a drawer"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_print_only_in_the_command_line_layer(path):
    if name_of(path).split(".")[0] == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_inheritance_is_shallow():
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases]

    def depth(name: str) -> int:
        return 1 + max((depth(b) for b in bases[name] if b in bases), default=-1) if name in bases else 0

    assert {name: depth(name) for name in bases if depth(name) > 2} == {}
