"""How is a page put together: a template with some parts exchanged, by the syntax tree?"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from prunezero.errors import OutputError

PARTS = [Path(__file__).with_name(f"{name}.py") for name in ("page_parts", "expert_parts")]


def exchange(source: str, new: Mapping[str, Any], docstring: str) -> str:
    """The source with constants, function bodies and the module docstring replaced by name."""
    lines = source.splitlines()
    # From the end, so that earlier line numbers stay true.
    for node in reversed(ast.parse(source).body):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if isinstance(node, ast.Expr):
            lines[first:last] = [f'"""{docstring}', '"""']
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) in new:
            head, _, _ = lines[first].partition(" = ")
            _, _, comment = lines[first].partition("  # ")
            lines[first] = _marked(f"{head} = {new[_target(node)]}  # {comment}", 100)
        elif isinstance(node, ast.FunctionDef) and node.name in new:
            body = new[node.name]
            # The first statement of every function of the template is its docstring.
            start = node.body[0].end_lineno or 0
            written = [indent(_marked(line, 96), "    ") for line in body]
            # Never two empty lines in a function.
            pairs = zip(written, ["", *written], strict=False)
            lines[start:last] = [line for line, before in pairs if line or before]
    return "\n".join(lines) + "\n"


def _marked(line: str, longest: int) -> str:
    """The line, with a word to linters if it is longer."""
    return line if len(line) <= longest else f"{line}  # noqa: E501"


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    """The name that a line of constants gives its value to."""
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def check_page(page: str) -> None:
    """Refuse a page that does not compile or still needs prunezero: a fault of the template."""
    tree = ast.parse(page)
    compile(tree, "<exported page>", "exec")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "prunezero" for name in names):
            raise OutputError("the exported page imports prunezero; this is a fault of prunezero")
