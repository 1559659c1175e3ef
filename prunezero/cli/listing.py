"""`prunezero list`: what there is to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli.options import JsonFile, RunsDir, check_json, write_json
from prunezero.errors import PruneZeroError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from prunezero.formula.operators import Operator
    from prunezero.pruning.recipes.staged import AnyRecipe, ShareWord
    from prunezero.pruning.recipes.word_row import Word
    from prunezero.pruning.unit_kind import UnitKind

Rows = list[dict[str, Any]]


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="recipes, choices, spaces, strategies, features, operators or runs; or all."
        ),
    ] = "",
    runs_dir: RunsDir = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """List recipes, search spaces, strategies, features, operators and runs.

    Examples:

        prunezero list recipes

        prunezero list operators

        prunezero list runs --json runs.json
    """
    from prunezero.cli.fitting import Table
    from prunezero.cli.tables import console

    if what and what not in LISTS:
        near = did_you_mean(what, LISTS) or "."
        raise RecipeError(f"there is no list of '{what}'{near} Lists: {', '.join(LISTS)}.")
    check_json(json_file)
    lists = {name: LISTS[name](runs_dir) for name in LISTS if what in ("", name)}
    for name, rows in lists.items():
        table = Table(title=f"{name} ({len(rows)})")
        # Sources are long, and stand in the files and in --json.
        columns = [column for column in (rows[0] if rows else ()) if column != "source"]
        for column in columns:
            is_long = column in ("formula", "terminals", "meaning", "numbers", "around it")
            table.add_column(column, overflow="fold", no_wrap=not is_long)
        for row in rows:
            table.add_row(*(str(row[column]) for column in columns))
        console.print(table)
    write_json(lists, json_file)


def _recipes(runs_dir: Path) -> Rows:
    from prunezero.pruning.recipes.recipe import published_recipes
    from prunezero.pruning.recipes.staged import load_recipe

    return [
        {
            "name": recipe.name,
            "formula": recipe.text,
            "compare": recipe.compare,
            "around it": ", ".join(_around(recipe)),
            "needs": recipe.signal,
            "source": recipe.source,
        }
        for recipe in map(load_recipe, published_recipes())
    ]


def _around(recipe: AnyRecipe) -> list[str]:
    """What a recipe chooses beside its formula and group, where it is not the usual."""
    from prunezero.pruning.recipes.staged import recipes_of

    stages = recipes_of(recipe)
    walk = ["sequential"] if any(one.statistics == "sequential" for one in stages) else []
    unit = [] if recipe.unit.is_usual else [f"unit {recipe.unit.text}"]
    return [*unit, *(choice.text for one in stages for choice in one.extras), *walk]


def _choices(runs_dir: Path) -> Rows:
    from prunezero.pruning.kinds import UNITS
    from prunezero.pruning.recipes.staged import SHARES
    from prunezero.pruning.recipes.words import PLAIN_WORDS, WORDS

    plain = [
        {"key": key, "word": word, "meaning": meaning, "numbers": ""}
        for key, words in PLAIN_WORDS.items()
        for word, meaning in words.items()
    ]
    return [
        *(_choice("unit", word, kind) for word, kind in UNITS.items()),
        *plain,
        *(_choice(key, word, row) for key, words in WORDS.items() for word, row in words.items()),
        # Of a stage, beside its recipe.
        *(_choice("share", word, share) for word, share in SHARES.items()),
    ]


def _choice(key: str, word: str, row: UnitKind | Word | ShareWord) -> dict[str, Any]:
    numbers = "\n".join(row.options.described())
    return {"key": key, "word": word, "meaning": row.meaning, "numbers": numbers}


def _spaces(runs_dir: Path) -> Rows:
    from prunezero.searching.spaces.space import SearchSpace, search_spaces

    spaces = [SearchSpace.load(name) for name in search_spaces()]
    return [
        {
            "name": space.name,
            "terminals": " ".join(terminal.text.replace(" ", "") for terminal in space.terminals),
            "operators": len(space.operators),
            "largest": space.max_complexity,
            "source": space.source,
        }
        for space in spaces
    ]


def _strategies(runs_dir: Path) -> Rows:
    from prunezero.searching.strategies.catalogue import find_strategy, strategy_words

    return [{"name": word, "meaning": find_strategy(word).note} for word in strategy_words()]


def _features(runs_dir: Path) -> Rows:
    from prunezero.formula import FEATURES

    return [
        {
            "name": row.name,
            "meaning": row.meaning,
            "shape": row.shape,
            "unit": row.unit,
            "of": " or ".join(row.domains),
            "needs": row.cost,
        }
        for row in FEATURES.values()
    ]


def _operators(runs_dir: Path) -> Rows:
    from prunezero.formula import OPERATORS

    rows = [_operator(row, row.meaning) for row in OPERATORS.own.values()]
    for point, found in OPERATORS.others().items():
        if isinstance(found, PruneZeroError):
            unusable = f"cannot be used: {found}"
            rows.append({"name": point.name, "usage": "", "meaning": unusable, "sign": ""})
        else:
            rows.append(_operator(found, f"{found.meaning}; from {point.value}"))
    return rows


def _operator(row: Operator, meaning: str) -> dict[str, Any]:
    return {"name": row.name, "usage": row.usage, "meaning": meaning, "sign": row.sign}


def _runs(runs_dir: Path) -> Rows:
    from prunezero.report.runs.folder import list_runs

    return list_runs(runs_dir)


LISTS: dict[str, Callable[[Path], Rows]] = {
    "recipes": _recipes,
    "choices": _choices,
    "spaces": _spaces,
    "strategies": _strategies,
    "features": _features,
    "operators": _operators,
    "runs": _runs,
}
