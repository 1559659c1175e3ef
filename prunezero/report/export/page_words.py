"""What the docstring of an exported page says of the recipe: its source, and what was measured."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.quoting import python_docstring
from prunezero.report.tracking.records import shown
from prunezero.searching.experiment.baselines import SAME_TERMS
from prunezero.searching.experiment.budgets import seeds_of, windows_of
from prunezero.searching.experiment.objectives import PERPLEXITY


def page_docstring(recipe: Recipe, what: str, *others: str) -> str:
    """The docstring, safe to stand between triple quotes.

    Args:
        what: the page does by the recipe's criterion, such as "prune a language model".
        others: its last paragraphs; indented ones stay as they are.
    """
    head = f"{recipe.name}: {what} with the criterion `{recipe.text}`."
    body = f"Source: {recipe.source}" if recipe.source else ""
    what_goes = "" if recipe.unit.is_usual else recipe.unit.several
    results = [_sentence(row, what_goes) for row in recipe.provenance.get("measured", [])]
    return paragraphs(head, body, *results, *others)


def _sentence(row: dict[str, Any], what_goes: str) -> str:
    """A measured result, for the docstring of a page.

    Args:
        what_goes: units that are removed; empty for single weights, whose pattern is told.
    """
    validation, test = (
        shown(PERPLEXITY, row.get(key)) for key in ("validation_perplexity", "test_perplexity")
    )
    mean = "geometric mean of " if row.get("regimes") else ""
    return (
        f"{_named(row)}: {mean}test perplexity {test}, validation {validation}, at sparsity "
        f"{row['sparsity']:g} ({what_goes or row['pattern']}), {windows_of(row)}, {seeds_of(row)}."
    )


def _named(row: dict[str, Any]) -> str:
    """What was measured; of a published formula on the terms of the recipe, that it was."""
    name = str(row["recipe"])
    is_on_same_terms = name.endswith(SAME_TERMS)
    return f"{name.removesuffix(SAME_TERMS)} with these choices" if is_on_same_terms else name


def paragraphs(head: str, *others: str) -> str:
    """The text of a page's docstring, safe between triple quotes; indented parts stay as they are.

    Empty parts are left out.
    """
    parts = [part if part.startswith("    ") else fill(part, 99) for part in others if part]
    text = "\n\n".join([fill(head, 96), *parts])
    return python_docstring(text)
