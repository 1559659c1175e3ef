"""How results look on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from prunezero.cli.fitting import Table
from prunezero.errors import printable
from prunezero.models.measures import SHARES

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.pruning.recipes.staged import AnyRecipe
    from prunezero.pruning.testbed import Testbed
    from prunezero.searching.experiment.objectives import Objective

# Names of models, files and recipes may hold brackets and colons, which are no markup here.
console = Console(markup=False, emoji=False)
# What a terminal does without where all columns together are wider than it.
_SPARE = ("acceptance",)
# Columns of the patterns that choose layers, where there are any.
_LAYERS = ("targets", "ignore")


def say(text: str, *, style: str = "") -> None:
    """One line of text, which is not broken where it is redirected to a file."""
    console.print(printable(text), style=style, soft_wrap=True, highlight=False)


def waiting(text: str) -> Status:
    """Within it, the text stands beside a moving sign."""
    # The usual sign is drawn in braille, which not every code page has.
    spinner = "line" if console.options.ascii_only else "dots"
    return console.status(Text(printable(text)), spinner=spinner)


# In a log, a stage that is longer than this tells how far it is.
SECONDS_OF_SILENCE = 30.0

# How the columns of what is measured are headed, behind the name of a text.
_MEASURES = {
    "kl": "KL",
    "top1_agreement": "agreed",
    "acceptance": "accepted",
}
_COLUMNS = {
    "recipe": "recipe",
    "sparsity_reached": "sparsity",
    "removed": "removed",
    "search_perplexity": "search",
    "validation_perplexity": "validation",
    "test_perplexity": "test",
    **{
        f"{split}_{column}": f"{split}\n{heading}"
        for column, heading in _MEASURES.items()
        for split in ("search", "validation", "test")
    },
    "kl": "KL to dense",
    "acceptance": "accepted",
    "parameters_without_embeddings": "parameters",
    "flops": "FLOPs",
    "seconds": "seconds",
}


def results_table(rows: Sequence[dict[str, Any]], title: str, *, best: str = "") -> Table:
    """Rows of results; the pruned one that is best in the column `best` is bold.

    Where that is of another measure than perplexity, the table can do without all beside both.
    """
    shown = [key for key in _COLUMNS if _is_told(key, rows)]
    is_usual = best == "" or best.endswith("_perplexity")
    spare = _SPARE if is_usual else (*_SPARE, "kl", "seconds", "search_perplexity")
    table = Table(title=title)
    for key in shown:
        justify = "left" if key == "recipe" else "right"
        table.add_column(_COLUMNS[key], justify=justify, is_spare=key in spare)
    pruned = [row for row in rows if row["recipe"] != "dense" and row.get(best) is not None]
    way = -1 if best.endswith(SHARES) else 1
    winner = min(pruned, key=lambda row: way * row[best], default=None)
    for row in rows:
        style = "bold" if row is winner else None
        table.add_row(*(_with_rounding(key, row) for key in shown), style=style)
    return table


def _is_told(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some row says something; of the dense model nothing is worth saying of what went."""
    pruned = [row for row in rows if row["recipe"] != "dense"]
    asked = pruned if key == "sparsity_reached" and pruned else rows
    return any(row.get(key) is not None for row in asked)


def _with_rounding(key: str, row: Mapping[str, Any]) -> str:
    """A cell of a row, and where it was measured what rounding alone changes in it."""
    change = row.get(f"{key.removesuffix('_perplexity')}_rounding")
    return cell(key, row.get(key)) + ("" if change is None else f" ±{cell(key, change)}")


def print_results(rows: Sequence[dict[str, Any]], title: str, *, best: str) -> None:
    """The table of results, and under it each budget, model and draw by itself, if several.

    Args:
        best: the column that decides, such as `test_perplexity`.
    """
    console.print(results_table(rows, title, best=best))
    told = [row for row in rows if row.get("regimes")]
    if told:
        console.print(_parts_table(told, best))


def means_over(rows: Sequence[dict[str, Any]]) -> str:
    """The models and draws over which rows are means, in words; none where there is one alone."""
    parts = [part for row in rows for part in row.get("regimes") or ()]
    models = dict.fromkeys(part["model"] for part in parts if "model" in part)
    draws = {part["seed"] for part in parts if "seed" in part}
    told = [" and ".join(models)] if models else []
    told += [f"{len(draws)} draws of calibration text"] if draws else []
    return ", ".join(told)


def _parts_table(told: Sequence[dict[str, Any]], key: str) -> Table:
    """Each budget, model and draw by itself."""
    # The dense model has no budgets; a pruned one comes last.
    columns = told[-1]["regimes"]
    headings = [
        {
            "on each model": part.get("model", ""),
            "under each draw": f"seed {part['seed']}" if "seed" in part else "",
            "under each budget": (
                f"{100 * part['sparsity']:g} %" if part["pattern"] == "free" else part["pattern"]
            ),
        }
        for part in columns
    ]
    # What all have in common needs no saying.
    each = [key for key in headings[0] if len({one[key] for one in headings}) > 1]
    split, _, column = key.partition("_")
    what = _MEASURES.get(column, column)
    title = f"{what} on {split} text {' and '.join(each)}"
    table = Table(title=title)
    table.add_column("recipe")
    for heading in headings:
        words = ", ".join(heading[key] for key in each)
        table.add_column(words, justify="right")
    for row in told:
        table.add_row(
            row["recipe"], *(cell(key, _part(row, column).get(key)) for column in columns)
        )
    return table


def _part(row: dict[str, Any], column: dict[str, Any]) -> dict[str, Any]:
    """What a row says in the place of a column; a dense one says the same in all budgets."""
    for part in row["regimes"]:
        is_budget = all(part[key] == column[key] for key in ("sparsity", "pattern"))
        is_place = all(part.get(key) == column.get(key) for key in ("model", "seed"))
        if is_place and (is_budget or part["sparsity"] == 0):
            return part
    return {}


def cell(key: str, value: Any) -> str:
    """One value as text, rounded as its kind deserves."""
    if value is None:
        return "-"
    if key.endswith("perplexity"):
        return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"
    if key in ("sparsity_reached", "removed") or key.endswith(SHARES):
        return f"{100 * value:.2f} %"
    if key.endswith("kl"):
        return f"{value:.4f}"
    if key in ("parameters_without_embeddings", "flops"):
        return f"{value / 1e6:,.1f} M"
    if key == "seconds":
        return f"{value:.1f}"
    return str(value)


def change(objective: Objective, value: float, other: float) -> str:
    """How far a number is from another: relative, and of shares in points of a hundred."""
    if objective.rises:
        return f"{100 * (value - other):+.2f} points"
    return f"{value / other - 1:+.1%}" if other else "from 0"


def one_line(row: dict[str, Any]) -> str:
    """The perplexities of one row, for a log that is read while the work goes on."""
    splits = [key for key in row if key.endswith("_perplexity")]
    shown = ", ".join(f"{_COLUMNS[key]} {cell(key, row[key])}" for key in splits)
    return f"{row['recipe']}: {shown}"


def conditions(rows: Sequence[dict[str, Any]], model: str, testbed: Testbed) -> str:
    """The line under a table that says how its numbers were measured."""
    from prunezero.searching.experiment.budgets import seeds_of, windows_of

    row = rows[-1]

    # Recipes of one table may choose layers each for themselves.
    chosen = {f"{word} {one[word]}" for one in rows for word in _LAYERS if word in one}
    pruned = [one for one in rows if one["recipe"] != "dense"]
    alike = [told for told in sorted(chosen) if all(_tells(one, told) for one in pruned)]
    costs = "; parameters outside of embeddings and head, FLOPs for each token"
    what = "geometric mean of the perplexities" if row.get("regimes") else "perplexity"
    return (
        f"{what} of {model} in {testbed.language_model.dtype_word} on {testbed.text.name} text, "
        f"{windows_of(row)}; "
        f"{row['statistics']} statistics from {row['calibration_tokens']} tokens, "
        f"pattern {row['pattern']}, {seeds_of(row)}"
        + "".join(f", {told}" for told in alike)
        + (costs if any("flops" in one for one in rows) else "")
    )


def _tells(row: dict[str, Any], told: str) -> bool:
    """Whether a row was measured with these layers alone, or without them."""
    return any(told == f"{word} {row.get(word)}" for word in _LAYERS)


def say_about(testbeds: Sequence[Testbed], recipes: Sequence[AnyRecipe] = ()) -> None:
    """A line on each model at hand, and one on what was guessed about their text, if anything.

    One more is on recipes that would prefer some sources of a text which has one.
    """
    from prunezero.pruning.recipes.staged import recipes_of

    for testbed in testbeds:
        say(_about_model(testbed))
    text = testbeds[0].text
    if text.notes:
        say(f"text {text.name}: {'; '.join(text.notes)}")
    waiting_for = [
        one.name
        for recipe in recipes
        for one in recipes_of(recipe)
        if getattr(one.recover.options, "sampling", "equal") != "equal" and not text.parts
    ]
    if waiting_for:
        say(
            f"text {text.name} is one source, so {', '.join(waiting_for)} trains on all of its "
            "windows equally often; several sources are given with commas between"
        )


def _about_model(testbed: Testbed) -> str:
    """One line on the model at hand."""
    from prunezero.models.anatomy.linears import find_linears, uncalled_linears

    loaded = testbed.language_model
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    layers = len(find_linears(loaded.model))
    uncalled = uncalled_linears(loaded.model)
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in uncalled}))
    left = f"; {len(uncalled)} more ({kinds}) are never called, and left alone" if uncalled else ""
    return (
        f"{loaded.name}: {type(loaded.model).__name__}, {count / 1e6:.1f} M parameters, "
        f"{layers} prunable layers, {loaded.dtype_word} on {loaded.device}{left}"
    )


def say_same_terms(rows: Sequence[Mapping[str, Any]], found: Recipe | None) -> None:
    """Under a table, what a + behind a name means, where one stands there."""
    from prunezero.searching.experiment.baselines import SAME_TERMS, choices_in_words

    if found is not None and any(str(row["recipe"]).endswith(SAME_TERMS) for row in rows):
        say(f"+: a published formula with the choices of the winner: {choices_in_words(found)}")


def say_conditions(rows: Sequence[dict[str, Any]], model: str, testbeds: Sequence[Testbed]) -> None:
    """The line under a table, and what is to be doubted of its first row, the dense model's.

    Args:
        model: its name, or the names of several.
        testbeds: on which the rows were measured.
    """
    from prunezero.pruning.soundness import dense_warnings

    say(conditions(rows, model, testbeds[0]))
    if any("test_rounding" in row for row in rows):
        say(
            "±: how much rounding alone changes it, by the same calibration windows in reverse "
            "order: no smaller difference means anything, and other text usually changes more"
        )
    for warning in dense_warnings(rows[0], testbeds):
        say(f"warning: {warning}", style="yellow")


class Bars:
    """Progress bars for work in several stages, fed by (what, done, total).

    Where the output is no terminal, a line tells the end of each stage instead, and now and then
    how far a long one has come.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a stage are done."""
        now = time.monotonic()
        if not console.is_terminal and (done == total or now - self._told > SECONDS_OF_SILENCE):
            say(f"{what}: {done} of {total}")
            self._told = now
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(printable(what), total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
