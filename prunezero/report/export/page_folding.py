"""How does one program for all recipes become the page of one of them? What it never does goes.

Tests of constants alone are settled beforehand: of their branches the one that is taken stays.
Functions, classes, constants and imports that nothing then names are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from textwrap import dedent, indent
from typing import Any

# What a page is there for, beside its program.
_ENTRY = "prune_"
_WITH_BODY = (ast.FunctionDef, ast.ClassDef)


def folded(source: str, known: Mapping[str, Any]) -> str:
    """The source without branches that constants of these values rule out."""
    while found := list(_settled(ast.parse(source), known)):
        lines = source.splitlines()
        # From the end, so that earlier line numbers stay true.
        for node, is_true in reversed(found):
            lines[node.lineno - 1 : node.end_lineno] = _branch(lines, node, is_true=is_true)
        source = "\n".join(lines) + "\n"
    return source


def needed(source: str, others: Iterable[str]) -> str:
    """The source with the functions and classes of others before its program, without idle ones.

    Imports stand at the top, of those names alone that are used.
    """
    texts = [source, *others]
    places = [(text, node) for text in texts for node in ast.parse(text).body]
    defined = {node.name: (text, node) for text, node in places if isinstance(node, _WITH_BODY)}
    assigned = {_target(node): (text, node) for text, node in places if _target(node)}
    program = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    names, waiting = set[str](), [*_names(program), _ENTRY]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            for table in (defined, assigned):
                waiting += _names(table[name][1]) if name in table else ()
    docstring = _segment(source, ast.parse(source).body[0])
    constants = [_segment(*place) for name, place in assigned.items() if name in names]
    # Classes first, since functions name them in their signatures.
    rows = sorted(defined.items(), key=lambda row: not isinstance(row[1][1], ast.ClassDef))
    bodies = [_segment(*place) for name, place in rows if name in names]
    begin = [docstring, "", *_imports(texts, names), *([""] if constants else []), *constants]
    head = "\n".join(begin)
    return "\n\n\n".join([head, *bodies, _segment(source, program)]) + "\n"


def constants_of(source: str) -> dict[str, Any]:
    """The literal values that a module assigns, by name."""
    return {
        _target(node): ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
    }


def _settled(node: ast.AST, known: Mapping[str, Any]) -> Iterator[tuple[ast.If, bool]]:
    """The outermost branchings of which constants alone decide, in order, and what they say."""
    for inner in ast.iter_child_nodes(node):
        names = set(_names(inner.test)) if isinstance(inner, ast.If) else set()
        if isinstance(inner, ast.If) and names and names <= known.keys():
            code = compile(ast.Expression(inner.test), "<page>", "eval")
            yield inner, bool(eval(code, {"__builtins__": {}}, dict(known)))
        elif isinstance(inner, ast.stmt):
            yield from _settled(inner, known)


def _branch(lines: list[str], node: ast.If, *, is_true: bool) -> list[str]:
    """The lines of the branch that is taken, as far to the left as the branching stood."""
    before = " " * node.col_offset
    if is_true:
        first, last = node.test.end_lineno or 0, node.body[-1].end_lineno
    elif not node.orelse:
        return []
    else:
        first, last = node.body[-1].end_lineno or 0, node.end_lineno
        while not lines[first].strip().startswith(("elif ", "else:")):
            first += 1
        if lines[first].strip().startswith("elif "):
            return [lines[first].replace("elif", "if", 1), *lines[first + 1 : last]]
        first += 1
    return indent(dedent("\n".join(lines[first:last])), before).split("\n")


def _imports(texts: Iterable[str], names: set[str]) -> list[str]:
    """Import lines of some modules, as far as names are used; those of Python itself first."""
    plain: set[str] = set()
    parts: dict[str, set[str]] = {}
    for text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                plain |= {one.name for one in node.names if one.name in names}
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("prunezero."):
                used = {one.name for one in node.names if one.name in names}
                parts.setdefault(str(node.module), set()).update(used)
    lines = [f"import {name}" for name in sorted(plain)]
    used_parts = {name: sorted(used) for name, used in sorted(parts.items()) if used}
    lines += [f"from {name} import {', '.join(used)}" for name, used in used_parts.items()]
    ours = [line for line in lines if line.split()[1] == "torch"]
    return [*(line for line in lines if line not in ours), "", *ours]


def _names(node: ast.AST) -> list[str]:
    """The names that a statement reads and does not give a value to itself."""
    inside = list(ast.walk(node))
    names = [one for one in inside if isinstance(one, ast.Name)]
    own = {one.id for one in names if isinstance(one.ctx, ast.Store)}
    own |= {one.arg for one in inside if isinstance(one, ast.arg)}
    return [one.id for one in names if one.id not in own]


def _target(node: ast.stmt) -> str:
    """The name that a line gives its value to; nothing of other lines."""
    if isinstance(node, ast.Assign):
        first = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        first = node.target
    else:
        return ""
    return first.id if isinstance(first, ast.Name) else ""


def _segment(text: str, node: ast.stmt) -> str:
    """The lines of a statement, with its decorators and the comment behind it."""
    decorators = node.decorator_list if isinstance(node, _WITH_BODY) else []
    first = min([node.lineno, *(one.lineno for one in decorators)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
