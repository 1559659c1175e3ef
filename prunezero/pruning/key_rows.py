"""Rows of recipes of run time, side by side: the same model, prompts and share of keys for all.

A row has the columns of one that is pruned where they say the same (recipe, formula, sparsity,
signal, removed), and a measure of each text under its name: `text_kl`, `recall_kl` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prunezero.errors import RecipeError, SelectionError
from prunezero.models.attending.continuing import Continuations, dense_measures
from prunezero.models.attending.installing import Known
from prunezero.models.attending.policy import Policy
from prunezero.pruning.attention import kept_row, policy_of
from prunezero.pruning.prompts import TEXTS, PromptSizes, coming_queries, known_of, texts_of
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import AnyRecipe
from prunezero.pruning.testbed import Testbed, beginning

Row = dict[str, Any]


def kept_share(sparsity: float | None) -> float:
    """The share of a prompt's keys, or of links, that stays, from the share that goes.

    Raises:
        SelectionError: none is named, or nothing goes.
    """
    if sparsity is None or not 0 < sparsity < 1:
        raise SelectionError(
            "say which share of a prompt's keys goes, above 0 and below 1, for example "
            "--sparsity 0.75"
        )
    # As it was typed: 1 - 0.9 has sixteen digits.
    return round(1 - sparsity, 12)


def key_rows(
    testbed: Testbed,
    recipes: Sequence[Recipe],
    sparsity: float | None,
    *,
    split: str = "validation",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Row]:
    """A row of the model as it is, then one of each recipe, on all of `TEXTS`.

    Raises:
        PruneZeroError: a recipe is not of run time or cannot be installed, the share of keys is
            missing, or windows are too short; raised before anything is measured.
    """
    kept = kept_share(sparsity)
    policies = [policy_of(recipe, kept) for recipe in recipes]
    prompt = PromptSizes.of(testbed.settings.sequence_length).prompt
    for policy in policies:
        if isinstance(policy, Policy):
            policy.counts(prompt, 1)
    looks = {name for policy in policies for name in policy.features}
    coming: Known = coming_queries(testbed) if "EXPECTED" in looks else {}
    known = [known_of(testbed, policy, coming) for policy in policies]
    dense: Row = {}
    rows: list[Row] = [{"seconds": 0.0} for _ in recipes]
    done = 0
    # Text after text, since what the dense model saw of one is much.
    for name in TEXTS:
        texts = texts_of(testbed, split, (name,))
        dense |= dense_row(testbed, texts)
        for row, recipe, own in zip(rows, recipes, known, strict=True):
            found = kept_row(testbed.language_model, recipe, kept, texts, own) if texts else {}
            seconds = row["seconds"] + found.get("seconds", 0.0)
            row |= _whole(name, found) | {"seconds": seconds}
            done += 1
            progress("recipes", done, len(TEXTS) * len(recipes))
    yield dense
    for row, recipe in zip(rows, recipes, strict=True):
        yield described_row(testbed, recipe, row)


def _whole(name: str, found: Row) -> Row:
    """What is told of one text; bytes and links are those of text that goes on."""
    if name == "text":
        return found
    return {key: value for key, value in found.items() if key.startswith(f"{name}_")}


def dense_row(testbed: Testbed, texts: Mapping[str, Continuations]) -> Row:
    """The row of a model that keeps all keys."""
    row: Row = {"recipe": "dense", "sparsity": 0.0, "removed": 0.0, "formula": "", "signal": None}
    for name, text in texts.items():
        found = dense_measures(testbed.language_model, text)
        row |= {f"{name}_{key}": value for key, value in found.items()}
        row |= {"kv_bytes": text.dense_bytes / text.prompt}
    return row | _circumstances(testbed)


def described_row(testbed: Testbed, recipe: Recipe, measured: Mapping[str, Any]) -> Row:
    """What `kept_row` measured of a recipe, in the columns of a comparison.

    Bytes of keys and values are for each token of a prompt, as elsewhere in tables.
    """
    prompt = PromptSizes.of(testbed.settings.sequence_length).prompt
    gone = round(1 - measured["kept"], 12)
    return {
        "recipe": recipe.name,
        "sparsity": gone,
        "unit": recipe.unit.word,
        "removed": gone,
        "removed_of": recipe.unit.several,
        "formula": recipe.criterion.text,
        "complexity": recipe.criterion.complexity,
        "compare": recipe.compare,
        **{key: value for key, value in measured.items() if key not in ("recipe", "kept")},
        "kv_bytes": measured["kv_bytes"] / prompt,
        "choices": {key: one for key, one in recipe.effect.items() if key != "criterion"},
        **_circumstances(testbed),
    }


def _circumstances(testbed: Testbed) -> Row:
    settings = testbed.settings
    return {
        "pattern": "free",
        "allocate": "uniform",
        "statistics": "none",
        "seed": settings.seed,
        "calibration_tokens": settings.calibration_tokens,
        "evaluation_tokens": settings.evaluation_tokens,
        "sequence_length": settings.sequence_length,
        **beginning([testbed.begin_with]),
    }


def of_run_time(recipes: Sequence[AnyRecipe]) -> list[Recipe]:
    """The recipes, if all leave weights as they are and are installed while a model runs; or none.

    Raises:
        RecipeError: some do and some do not.
    """
    which = [one for one in recipes if isinstance(one, Recipe) and one.unit.row.domain.is_run_time]
    if which and len(which) < len(recipes):
        other = next(one for one in recipes if one not in which)
        raise RecipeError(
            f"recipe {which[0].name} keeps {which[0].unit.several} while a model runs: nothing is "
            f"removed from the weights, as {other.name} does it, so they have no column in common; "
            f"compare them apart, or prune by {other.name} first and compare "
            f"{which[0].name} on the folder that it leaves"
        )
    return which
