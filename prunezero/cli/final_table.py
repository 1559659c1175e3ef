"""The final table of a search: its finalists on validation text, its winner beside baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    winner = {**rows[-1], "search_perplexity": best.search_perplexity}
    tracker.record(tracked_winner(recipe, winner, session, name, folder))
    print_results(rows, f"search {name}", best="test_perplexity")
    say_conditions(rows, session.models, session.testbeds)
    say_same_terms(rows, recipe)
    for row in faults:
        say(f"{row['recipe']} cannot be measured: {row['fault']}")
    say(f"found: {best.rule.text}", style="bold")
    equivalent = published_equivalent(task, best.rule)
    if equivalent is not None:
        say(f"it ranks weights as the published {equivalent} does")
    for sentence in verdict(rows):
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
    return min(pairs, key=lambda pair: pair[0]["validation_perplexity"] or float("inf"))[1]


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


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Is the winner, the last row, better than the strongest of the others, and by whose merit?

    The strongest is the best on validation text, as published or with the winner's choices.
    """
    winner, others = rows[-1], [row for row in rows[:-1] if row["recipe"] != "dense"]
    best = _best(others)
    if best is None or winner["test_perplexity"] is None:
        return ["no published recipe to compare with was measurable"]
    published = _best([row for row in others if not _is_on_same_terms(row)])
    told = [_compared(winner, best)]
    if published is not None and _is_on_same_terms(best):
        told.append(_shared(winner, best, published))
    return told


def _is_on_same_terms(row: dict[str, Any]) -> bool:
    from prunezero.searching.experiment.baselines import SAME_TERMS

    return str(row["recipe"]).endswith(SAME_TERMS)


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    measured = [row for row in rows if None not in _perplexities(row)]
    return min(measured, key=lambda row: row["validation_perplexity"], default=None)


def _perplexities(row: dict[str, Any]) -> tuple[float | None, float | None]:
    return row["validation_perplexity"], row["test_perplexity"]


def _compared(winner: dict[str, Any], best: dict[str, Any]) -> str:
    from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain

    change = winner["test_perplexity"] / best["test_perplexity"] - 1
    noise = max(row.get("test_rounding") or 0.0 for row in (winner, best))
    is_better = winner["test_perplexity"] + noise < best["test_perplexity"]
    verdict = "better than" if is_better else "no better than"
    losses = [row["window_losses"]["test"] for row in (winner, best)]
    return (
        f"{verdict} {best['recipe']}, the best of these on validation text: test "
        f"perplexity {winner['test_perplexity']:.2f} against {best['test_perplexity']:.2f} "
        f"({change:+.1%}; chance of no gain {chance_of_no_gain(*losses):.2g} "
        f"over {len(losses[0])} windows)" + (f"; {noise:.2f} may be rounding" if noise else "")
    )


def _shared(winner: dict[str, Any], fair: dict[str, Any], published: dict[str, Any]) -> str:
    """What of the gain over the best recipe as published is left on the same terms."""
    gain, own = (row["test_perplexity"] - winner["test_perplexity"] for row in (published, fair))
    if gain <= 0:
        return f"{published['recipe']} as published is not beaten"
    beaten = f"the {gain:.2f} that it gains over {published['recipe']} as published"
    if own <= 0:
        return f"nothing of {beaten} is left on the same terms: it is what the choices around gain"
    if own >= gain:
        return f"all of {beaten} is left on the same terms: it is the formula's"
    return (
        f"of {beaten}, {own:.2f} ({own / gain:.0%}) are left on the same terms: those are the "
        "formula's"
    )
