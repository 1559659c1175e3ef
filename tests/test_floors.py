"""The house stands: imports go down the floors only, and heavy libraries stay on theirs."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prunezero"
FLOORS = "errors files formula scoring models pruning searching testing report cli".split()
# A library may be used on these floors only.
HOMES = {
    "torch": {"files", "scoring", "models", "pruning", "searching", "testing", "report", "cli"},
    "transformers": {"models", "report"},
    "datasets": {"models"},
    "sympy": {"formula", "searching"},
    "optuna": {"searching", "report"},
    "triton": {"scoring"},
    "mlflow": {"report"},
    "matplotlib": {"report"},
    "pyarrow": {"models", "report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"pruning", "report"},
    "pydantic": {"pruning", "searching", "report"},
    "scipy": {"pruning", "searching"},
    "ray": {"searching"},
    "peft": {"pruning"},
}
# Libraries that are imported inside functions, so that `import prunezero` stays quick.
LAZY = {"transformers", "datasets", "optuna", "triton", "mlflow", "matplotlib", "pyarrow"}
LAZY |= {"scipy", "ray", "peft"}
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(*nodes: ast.AST) -> list[str]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` is an import of the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()]
            found += modules or [node.module]
    return found


@functools.cache
def all_imports(path: Path) -> list[str]:
    return imports(*ast.walk(tree_of(path)))


def test_there_are_files_on_every_floor() -> None:
    assert {floor_of(path) for path in FILES} >= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_floor_and_those_below(path: Path) -> None:
    floor = floor_of(path)
    if floor not in FLOORS:
        assert path.parent == PACKAGE and path.stem in ("__init__", "__main__")
        return
    for module in all_imports(path):
        parts = module.split(".")
        if parts[0] == "prunezero" and len(parts) > 1:
            assert FLOORS.index(parts[1]) <= FLOORS.index(floor), module
        if parts[0] in HOMES:
            assert floor in HOMES[parts[0]], f"{parts[0]} does not belong on floor {floor}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    is_template = path.name == "pruner_template.py"
    heavy = {module.split(".")[0] for module in imports(*tree_of(path).body)} & LAZY
    assert not heavy or is_template


def test_no_file_imports_itself_through_others() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = {module for module in all_imports(path) if module.startswith("prunezero.")}
        edges[name] = found - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_importing_prunezero_loads_no_heavy_library() -> None:
    program = "import sys, prunezero; print(*sorted(m for m in sys.modules if '.' not in m))"
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(printed) & {*LAZY, "torch", "sympy", "pydantic"}


def test_files_and_functions_keep_their_size() -> None:
    for path in FILES:
        # One idea a file, whatever its length; beyond this it was never one.
        assert len(path.read_text().splitlines()) <= 500, path
        for node in ast.walk(tree_of(path)):
            # A command's signature is its options, and its docstring is its help.
            if isinstance(node, ast.FunctionDef) and floor_of(path) != "cli":
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_the_map_in_the_readme_names_paths_that_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"`((?:prunezero|baselines|search_spaces|tests|docs)/[\w./]*)`", text))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
