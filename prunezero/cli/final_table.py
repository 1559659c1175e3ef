"""What is a search worth? Its finalists are judged, its winner set beside published recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunezero.report.tracking.tracker import Tracker
    from prunezero.searching.experiment.candidate import Candidate
    from prunezero.searching.session import Session


def judged(
    session: Session, tracker: Tracker, folder: Path, candidates: list[Candidate]
) -> list[dict[str, Any]]:
    """Judge the finalists on validation text, report the winner and its rivals on test text."""
    from prunezero.cli.tables import Bars, print_results, say, say_conditions
    from prunezero.pruning.compare import SPLITS
    from prunezero.report.export.page import no_page
    from prunezero.report.runs.folder import write_winner
    from prunezero.report.tracking.search_records import tracked_rows, tracked_winner
    from prunezero.searching import session as sessions
    from prunezero.searching.experiment.baselines import baselines, published_equivalent

    name = folder.name
    final = sessions.finalists(candidates)
    with Bars() as bars:
        pairs = []
        for done, candidate in enumerate(final, start=1):
            pairs.append((sessions.evaluator(session, candidate), candidate))
            bars("finalists on validation text", done, len(final))
        best = min(pairs, key=lambda pair: pair[0]["validation_perplexity"] or float("inf"))[1]
        rows = []
        total = len(baselines(session.task)) + 1  # the dense model is one of them
        for row in sessions.measure_baselines(session, SPLITS):
            rows.append(row)
            bars("published recipes on test text", len(rows), total)
        recipe = sessions.found_recipe(session, name, best)
        rows.append(session.rungs.measure(recipe, SPLITS))
    recipe = write_winner(recipe, rows, folder)
    for record in tracked_rows(rows[:-1], session.testbed, also_testbeds=session.also_testbeds):
        tracker.record(record)
    winner = {**rows[-1], "search_perplexity": best.search_perplexity}
    tracker.record(tracked_winner(recipe, winner, session, name, folder))
    print_results(rows, f"search {name}", best="test_perplexity")
    say_conditions(rows, session.models, [session.testbed, *session.also_testbeds])
    say(f"found: {best.rule.text}", style="bold")
    twin = published_equivalent(session.task, best.rule)
    if twin is not None:
        say(f"it ranks weights as the published {twin} does")
    say(_verdict(rows))
    say(f"recipe: {folder / 'recipe.yaml'}")
    reason = no_page(recipe)
    say(f"no pruner page: {reason}" if reason else f"pruner: {folder / 'pruner.py'}")
    return rows


def _verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence: is the winner, the last row, better than the best published recipe?"""
    from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain

    winner, baselines = rows[-1], [row for row in rows[:-1] if row["recipe"] != "dense"]
    measured = [row for row in baselines if row["validation_perplexity"] is not None]
    best = min(measured, key=lambda row: row["validation_perplexity"], default=None)
    if best is None or None in (best["test_perplexity"], winner["test_perplexity"]):
        return "no published recipe to compare with was measurable"
    change = winner["test_perplexity"] / best["test_perplexity"] - 1
    noise = max(row.get("test_rounding") or 0.0 for row in (winner, best))
    is_better = winner["test_perplexity"] + noise < best["test_perplexity"]
    verdict = "better than" if is_better else "no better than"
    losses = [row["window_losses"]["test"] for row in (winner, best)]
    return (
        f"{verdict} {best['recipe']}, the best of these published ones on validation text: test "
        f"perplexity {winner['test_perplexity']:.2f} against {best['test_perplexity']:.2f} "
        f"({change:+.1%}; chance of no gain {chance_of_no_gain(*losses):.2g} "
        f"over {len(losses[0])} windows)" + (f"; {noise:.2f} may be rounding" if noise else "")
    )
