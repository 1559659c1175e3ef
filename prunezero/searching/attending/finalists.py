"""The front of a search beside its published rivals, on windows that the search never saw.

What is best on the prompts that chose it looks better than it is; so every recipe of the front, and
every published one that looks at no costlier signal, is measured once more on other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prunezero.errors import PruneZeroError
from prunezero.models.attending.installing import Known
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.attention import kept_row
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.attending.front import pareto_ranks
from prunezero.searching.attending.proposals import choices_of, key_of, published_within
from prunezero.searching.attending.results import Results
from prunezero.searching.attending.rungs import Texts
from prunezero.searching.attending.search import Experiment, Found, Tried

Row = dict[str, Any]


def front_recipes(found: Found, experiment: Experiment, name: str) -> list[Recipe]:
    """The recipes of the front that the search itself made, named NAME-1, NAME-2 and so on.

    Published ones on the front stay what they were, and are left out.
    """
    published = {key_of(one) for one in published_within(experiment.space)}
    made = [one for one in found.front if key_of(one.recipe) not in published]
    return [
        _named(one, experiment, f"{name}-{place}", name) for place, one in enumerate(made, start=1)
    ]


def _named(tried: Tried, experiment: Experiment, name: str, search: str) -> Recipe:
    fields = {
        "name": name,
        "source": f"found by prunezero in search space '{experiment.space.name}'",
        **tried.recipe.effect,
        "provenance": {
            "search": search,
            "slot": tried.slot,
            "origin": tried.origin,
            "parents": list(tried.parents),
            "kept": experiment.kept,
            "seed": experiment.seed,
            "search_kl": dict(tried.kl),
        },
    }
    return validated(Recipe, fields, f"recipe {name}")


def validated_rows(
    language_model: LanguageModel,
    recipes: Sequence[Recipe],
    texts: Texts,
    experiment: Experiment,
    *,
    known: Known | None = None,
    results: Results | None = None,
) -> list[Row]:
    """A row for each recipe of the front, and of each published one that a search's space allows.

    A row has `recipe`, `formula`, `choices`, `signal`, `simulated`, `is_found`, the KL of each text
    in nats per token (`text_kl` and so on), the losses of its windows, and `rank`: its Pareto rank
    among all rows. One that cannot be measured says why under `refused`, and has no rank.

    Args:
        recipes: those of the front.
        texts: of windows that the search did not look at, by the names of its own.
        known: as the search had it.
        results: of before, to go on from.

    Raises:
        OutputError: the results cannot be written.
    """
    results = results or Results()
    rows = []
    for recipe in [*recipes, *published_within(experiment.space)]:
        measure = partial(_measured, language_model, recipe, texts, experiment.kept, known or {})
        row = results.result("validation", key_of(recipe), measure)
        rows.append(
            {
                "recipe": recipe.name,
                "formula": recipe.criterion.text,
                "choices": choices_of(recipe),
                "is_found": recipe in recipes,
                **row,
            }
        )
    return ranked(rows, [f"{name}_kl" for name in texts])


def _measured(
    language_model: LanguageModel, recipe: Recipe, texts: Texts, kept: float, known: Known
) -> Row:
    try:
        row = kept_row(language_model, recipe, kept, texts, known)
    except PruneZeroError as error:
        return {"refused": str(error)}
    keys = ["signal", "simulated", "kv_bytes", "links", "seconds"]
    keys += [f"{name}_{key}" for name in texts for key in ("kl", "perplexity", "window_losses")]
    return {key: row[key] for key in keys}


def ranked(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The rows with their Pareto rank over these keys, by rank and then by the first key.

    Rows that lack a number have no rank, and come last.
    """
    whole = [row for row in rows if all(row.get(key) is not None for key in keys)]
    ranks = pareto_ranks([[row[key] for key in keys] for row in whole])
    found = [{**row, "rank": rank} for row, rank in zip(whole, ranks, strict=True)]
    found.sort(key=lambda row: (row["rank"], row[keys[0]]))
    return found + [row for row in rows if row not in whole]


def table(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """The rows as lines of a Markdown table; KL in nats per token, rank 0 is dominated by none."""
    head = ["recipe", *(f"KL {name}" for name in texts), "rank", "formula", "choices", "saves"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        name = f"**{row['recipe']}**" if row["is_found"] else row["recipe"]
        if "refused" in row:
            words = [*["-"] * (len(texts) + 1), _code(row["formula"]), row["refused"], "-"]
        else:
            kls = [f"{row[f'{text}_kl']:.4f}" for text in texts]
            saves = "nothing: simulated" if row["simulated"] else "bytes"
            said = _code(_told(row["choices"]))
            words = [*kls, str(row["rank"]), _code(row["formula"]), said, saves]
        lines.append(_line([name, *words]))
    return lines


def _told(choices: Mapping[str, Any]) -> str:
    """Choices in a few words; `unit: kv_column` without numbers says nothing here."""
    unit = choices["unit"]
    numbers = unit["kv_column"] if isinstance(unit, Mapping) else {}
    return ", ".join([str(choices["compare"]), *(f"{key} {one}" for key, one in numbers.items())])


def _code(text: str) -> str:
    return f"`{text}`"


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"
