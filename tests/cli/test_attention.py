"""Commands that remove something from weights refuse recipes that do not, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunezero.cli import search_setup
from prunezero.errors import RecipeError
from prunezero.models.loading import load as loading
from tests.cli.conftest import Run, flat

WEIGHTS = "nothing is removed from the weights"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prune --recipe snapkv --sparsity 0.5 --model nowhere --output out", WEIGHTS),
        ("prune --recipe quest --sparsity 0.5 --model nowhere --memory-limit 1GiB", WEIGHTS),
        ("compare --recipes wanda,snapkv --sparsity 0.5 --model nowhere", WEIGHTS),
        ("transfer snapkv --sparsity 0.5 --models nowhere", WEIGHTS),
        ("export --recipe snapkv --kernel kernel.py", WEIGHTS),
        (
            "prune --recipe flap --unit kv_column --sparsity 0.5 --model nowhere",
            "feature W says nothing of query x key",
        ),
        (
            "search --sparsity 0.5 --budget 5 --name x --model nowhere --start-from snapkv",
            "start from a recipe of those",
        ),
    ],
)
def test_what_keeps_keys_is_no_pruning(
    command: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr(loading, "load_model", never)
    monkeypatch.setattr(search_setup, "loaded", never)
    result = run(command)
    assert result.exit_code == 1 and isinstance(result.exception, RecipeError)
    assert said in str(result.exception)
    assert not list(Path().glob("*.py"))


def test_lists_say_what_such_recipes_look_at(run: Run) -> None:
    recipes = flat(run("list recipes").output)
    assert "snapkv" in recipes and "full map" in recipes and "unit kv_column" in recipes
    choices = flat(run("list choices").output)
    assert "kv_column" in choices and "safeguard" in choices
    features = flat(run("list features").output)
    assert "ATT_W" in features and "EXPECTED" in features
