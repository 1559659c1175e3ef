"""`prunezero export --kernel`: for every published recipe, alone or beside the pruner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunezero.errors import OutputError
from prunezero.pruning.recipes.recipe import Recipe, published_of
from tests.cli.conftest import Run


def test_every_published_recipe_has_a_kernel(run: Run) -> None:
    names = [recipe.name for recipe in published_of("weight")]
    assert len(names) > 10
    for name in names:
        result = run(f"export --recipe {name} --kernel {name}.py")
        assert result.exit_code == 0, result.output
        assert f"wrote {name}.py: " in result.output
        assert f"criterion `{Recipe.load(name).criterion.text}`" in Path(f"{name}.py").read_text()
    assert sorted(os.listdir()) == sorted(f"{name}.py" for name in names)


def test_pruner_and_kernel_are_written_side_by_side_or_not_at_all(run: Run) -> None:
    result = run("export --recipe magnitude --output a.py --kernel b.py")
    assert result.exit_code == 0, result.output
    assert "def prune_" in Path("a.py").read_text() and "@triton.jit" in Path("b.py").read_text()
    refused = run("export --recipe sparsegpt --output c.py --kernel d.py")
    assert isinstance(refused.exception, OutputError) and "cannot follow" in str(refused.exception)
    assert sorted(os.listdir()) == ["a.py", "b.py"]


def test_without_a_file_named_the_pruner_alone_is_written(run: Run) -> None:
    assert run("export --recipe magnitude").exit_code == 0
    assert os.listdir() == ["pruner.py"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--kernel full", "--kernel full is a folder; name a file such as full/kernel.py"),
        ("--output full", "--output full is a folder; name a file such as full/pruner.py"),
        ("--output a.py --kernel ./a.py", "both name a.py"),
        ("--kernel no/where.py", "no/where.py cannot be written"),
    ],
)
def test_a_file_that_cannot_be_is_one_sentence(options: str, sentence: str, run: Run) -> None:
    Path("full").mkdir()
    result = run(f"export --recipe magnitude {options}")
    assert isinstance(result.exception, OutputError) and sentence in str(result.exception)
