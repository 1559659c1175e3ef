"""The final table of a search: its finalists on validation text, its winner beside baselines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.searching.experiment.objectives import PERPLEXITY, Objective

if TYPE_CHECKING:
    from prunezero.pruning.recipes.recipe import Recipe
    from prunezero.report.tracking.tracker import Tracker
    from prunezero.searching.experiment.candidate import Candidate
    from prunezero.searching.session import Session


def measured_finally(
    session: Session, tracker: Tracker, folder: Path, candidates: list[Candidate]
) -> list[dict[str, Any]]:
    """Measure the finalists on validation text, the winner and its baselines on test text."""
    from prunezero.cli.tables import print_results, say, say_conditions, say_same_terms
    from prunezero.report.runs.folder import write_winner
    from prunezero.report.tracking.search_records import tracked_rows, tracked_winner
    from prunezero.searching.experiment.baselines import published_equivalent
    from prunezero.searching.session import found_recipe

    name, task = folder.name, session.task
    best = _best_finalist(session, candidates)
    recipe = found_recipe(session, name, best)
    rows, faults = _on_all_texts(session, recipe)
    recipe = write_winner(recipe, rows, folder)
    for record in tracked_rows(rows[:-1], session.testbeds):
        tracker.record(record)
    objective = task.objective
    searched = best.row()
    keys = ("search_perplexity", objective.key("search"))
    winner = {**rows[-1], **{key: searched[key] for key in keys}}
    tracker.record(tracked_winner(recipe, winner, session, name, folder))
    print_results(rows, f"search {name}", best=objective.key("test"))
    say_conditions(rows, session.models, session.testbeds)
    say_same_terms(rows, recipe)
    for row in faults:
        say(f"{row['recipe']} cannot be measured: {row['fault']}")
    say(f"found: {best.rule.text}", style="bold")
    equivalent = published_equivalent(task, best.rule)
    if equivalent is not None:
        say(f"it ranks as the published {equivalent} does")
    for sentence in verdict(rows, objective):
        say(sentence)
    _say_files(recipe, folder)
    return rows


def _best_finalist(session: Session, candidates: list[Candidate]) -> Candidate:
    from prunezero.cli.tables import Bars
    from prunezero.searching.session import finalists, measure_finalist

    final = finalists(candidates)
    pairs = []
    with Bars() as bars:
        for done, candidate in enumerate(final, start=1):
            pairs.append((measure_finalist(session, candidate), candidate))
            bars("finalists on validation text", done, len(final))
    objective = session.task.objective

    def place(pair: tuple[dict[str, Any], Candidate]) -> float:
        value = objective.of(pair[0], "validation")
        return math.inf if value is None else value

    return min(pairs, key=place)[1]


def _on_all_texts(
    session: Session, recipe: Recipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the dense model, baselines and the winner, its own last; and those with a fault."""
    from prunezero.cli.tables import Bars
    from prunezero.pruning.compare import SPLITS
    from prunezero.searching.experiment.baselines import baselines, on_terms_of
    from prunezero.searching.session import measure_baselines, measure_on_same_terms

    rows: list[dict[str, Any]] = []
    faults: list[dict[str, Any]] = []
    total = len(baselines(session.task)) + 1  # the dense model is one of them
    more = sum(map(len, on_terms_of(recipe, session.task)))
    with Bars() as bars:
        for row in measure_baselines(session, SPLITS):
            rows.append(row)
            bars("published recipes on test text", len(rows), total)
        for done, row in enumerate(measure_on_same_terms(session, recipe, SPLITS), start=1):
            (faults if "fault" in row else rows).append(row)
            bars("published formulas with its choices on test text", done, more)
        rows.append(session.rungs.measure(recipe, SPLITS))
    return rows, faults


def _say_files(recipe: Recipe, folder: Path) -> None:
    from prunezero.cli.tables import say
    from prunezero.report.export.page import no_page

    say(f"recipe: {folder / 'recipe.yaml'}")
    reason = no_page(recipe)
    say(f"no pruner page: {reason}" if reason else f"pruner: {folder / 'pruner.py'}")


def verdict(rows: list[dict[str, Any]], objective: Objective = PERPLEXITY) -> list[str]:
    """Is the winner, the last row, better than the strongest of the others, and by whose merit?

    The strongest is the best on validation text, as published or with the winner's choices.
    """
    winner, others = rows[-1], [row for row in rows[:-1] if row["recipe"] != "dense"]
    best = best_on_validation(others, objective)
    if best is None or objective.of(winner, "test") is None:
        return ["no published recipe to compare with was measurable"]
    published = best_on_validation([row for row in others if not _is_on_same_terms(row)], objective)
    told = [_compared(winner, best, objective)]
    if published is not None and _is_on_same_terms(best):
        told.append(_shared(winner, best, published, objective))
    return told


def _is_on_same_terms(row: dict[str, Any]) -> bool:
    from prunezero.searching.experiment.baselines import SAME_TERMS

    return str(row["recipe"]).endswith(SAME_TERMS)


def best_on_validation(
    rows: list[dict[str, Any]], objective: Objective = PERPLEXITY
) -> dict[str, Any] | None:
    """The best row on validation text of those that were measurable; None if none was."""
    found = [(row, [objective.of(row, split) for split in ("validation", "test")]) for row in rows]
    measured = [(values[0], row) for row, values in found if None not in values]
    return min(measured, key=lambda pair: pair[0] or 0.0, default=(None, None))[1]


def _compared(winner: dict[str, Any], best: dict[str, Any], objective: Objective) -> str:
    from prunezero.cli.tables import cell, change
    from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain

    key, noise_key = objective.key("test"), objective.rounding_key("test")
    noise = max(row.get(noise_key) or 0.0 for row in (winner, best))
    is_better = objective.turned(winner[key]) + noise < objective.turned(best[key])
    verdict = "better than" if is_better else "no better than"
    losses = [objective.of_windows(row, "test") for row in (winner, best)]
    numbers = [cell(key, row[key]) for row in (winner, best)]
    return (
        f"{verdict} {best['recipe']}, the best of these on validation text: test "
        f"{objective.text} {numbers[0]} against {numbers[1]} "
        f"({change(objective, winner[key], best[key])}; chance of no gain "
        f"{chance_of_no_gain(*losses):.2g} "
        f"over {len(losses[0])} windows)"
        + (f"; {cell(key, noise)} may be rounding" if noise else "")
    )


def _shared(
    winner: dict[str, Any],
    fair: dict[str, Any],
    published: dict[str, Any],
    objective: Objective,
) -> str:
    """What of the gain over the best recipe as published is left on the same terms."""
    from prunezero.cli.tables import cell

    key = objective.key("test")
    gain, own = (
        objective.turned(row[key]) - objective.turned(winner[key]) for row in (published, fair)
    )
    if gain <= 0:
        return f"{published['recipe']} as published is not beaten"
    beaten = f"the {cell(key, gain)} that it gains over {published['recipe']} as published"
    if own <= 0:
        return f"nothing of {beaten} is left on the same terms: it is what the choices around gain"
    if own >= gain:
        return f"all of {beaten} is left on the same terms: it is the formula's"
    return (
        f"of {beaten}, {cell(key, own)} ({own / gain:.0%}) are left on the same terms: those are "
        "the formula's"
    )
