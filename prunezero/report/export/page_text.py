"""How is a page put together: a template with some parts exchanged, by the syntax tree?"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from prunezero.errors import OutputError
from prunezero.formula.features import FEATURES
from prunezero.report.export.page_lines import HELPERS

PARTS = Path(__file__).with_name("page_parts.py")
# What the parts and some formulas import beside the template, by its line that stands there.
_IMPORTS = {
    "import re": ["import re", "import signal", "import threading"],
    "from torch import Tensor": ["from torch import Tensor, nn"],
}


def parts(features: Sequence[str]) -> list[str]:
    """The lines of the functions of `page_parts.py`, but for those that no feature needs."""
    source = PARTS.read_text(encoding="utf-8")
    read = {made for name in features for made in FEATURES[name].inputs}
    needed = {part for made in read for part in HELPERS.get(made, ())}
    idle = {part for parts in HELPERS.values() for part in parts} - needed
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in idle:
            found += [*source.splitlines()[node.lineno - 1 : node.end_lineno], "", ""]
    return found


def exchange(source: str, new: Mapping[str, Any], docstring: str, added: list[str]) -> str:
    """The source with constants, function bodies and the module docstring replaced by name.

    Lines of its other parts come before the program.
    """
    lines = source.splitlines()
    # From the end, so that earlier line numbers stay true.
    for node in reversed(ast.parse(source).body):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if isinstance(node, ast.If):
            lines[first:first] = added
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("prunezero."):
            # What it names is among the parts.
            del lines[first : last + 1]
        elif lines[first] in _IMPORTS:
            lines[first:last] = _IMPORTS[lines[first]]
        elif isinstance(node, ast.Expr):
            lines[first:last] = [f'"""{docstring}', '"""']
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) in new:
            head, _, _ = lines[first].partition(" = ")
            _, _, comment = lines[first].partition("  # ")
            lines[first] = _marked(f"{head} = {new[_target(node)]}  # {comment}", 100)
        elif isinstance(node, ast.FunctionDef) and node.name in new:
            body = new[node.name]
            # The first statement of every function of the template is its docstring.
            start = node.body[0].end_lineno or 0
            lines[start:last] = [indent(_marked(line, 96), "    ") for line in body]
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
