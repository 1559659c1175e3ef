"""`prunezero search`: find a criterion, measure it honestly, write a pruner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prunezero.cli import asking, options
from prunezero.cli.options import (
    Also,
    AlsoModel,
    Budget,
    CalibrationTokens,
    Cluster,
    Device,
    Draws,
    Dtype,
    EvaluationTokens,
    FromScratch,
    JsonFile,
    Model,
    Pattern,
    Resume,
    RunsDir,
    SearchName,
    Seed,
    SequenceLength,
    Space,
    Sparsity,
    StrategyWord,
    TestTokens,
    TextName,
    Threads,
    TimeLimit,
    Workers,
)
from prunezero.errors import RecipeError

if TYPE_CHECKING:
    from prunezero.pruning.bench import Settings
    from prunezero.report.search_file import Asked
    from prunezero.report.track import Tracker
    from prunezero.searching.candidate import Candidate
    from prunezero.searching.hiring.plan import Plan
    from prunezero.searching.judging.ladder import Judges
    from prunezero.searching.session import Session
    from prunezero.searching.task import Task


def search(
    ctx: typer.Context,
    model: Model = "demo",
    text: TextName = "demo",
    sparsity: Sparsity = None,
    pattern: Pattern = "free",
    also: Also = "",
    also_model: AlsoModel = None,
    draws: Draws = 1,
    space: Space = "formulas",
    budget: Budget = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    name: SearchName = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Resume = False,
    from_scratch: FromScratch = False,
    strategy: StrategyWord = "evolution",
    workers: Workers = 1,
    threads: Threads = None,
    cluster: Cluster = None,
    json_file: JsonFile = None,
    sequence_length: SequenceLength = 256,
    calibration_tokens: CalibrationTokens = 8192,
    evaluation_tokens: EvaluationTokens = 4096,
    test_tokens: TestTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Search for a criterion that prunes this model better than the published ones.

    Candidates are screened by their layer error and the best are measured on search text; the best
    of those are judged on validation text, and the winner is reported on test text, which nothing
    was chosen by. Ctrl-C keeps everything; `--resume` goes on, under the options of before.

    Examples:

        prunezero search --model demo --sparsity 0.5 --time 5m --name first

        prunezero search --model demo --pattern 2:4 --space pruner_zero --budget 500

        prunezero search --model demo --sparsity 0.5 --also 0.7,2:4 --time 30m

        prunezero search --model demo --also-model ./mine --sparsity 0.5 --time 30m

        prunezero search --model demo --sparsity 0.5 --space tiny --budget 20 --name quick

        prunezero search --time 10m --name first --resume
    """
    from prunezero.cli.tables import say
    from prunezero.report.run_folder import run_folder
    from prunezero.report.track import Tracker

    seconds = options.seconds_of(time_limit)
    options.check_json(json_file)
    asking.check_limits(budget, seconds, resume, name)
    folder = run_folder(runs_dir, name) if name else None
    if resume and folder and not (folder / "journal.jsonl").is_file():
        raise RecipeError(f"{folder} holds no search to go on with; leave --resume out")
    asked, settings = asking.asked(ctx, folder if resume else None)
    task = asked.task()
    name = name or time.strftime(f"{task.space.name}-%Y%m%d-%H%M%S")
    folder = folder or run_folder(runs_dir, name)
    # Started first: MLflow needs seconds to open its database, and the model takes longer.
    tracker = Tracker(runs_dir)
    try:
        staff = asking.staff(workers, threads, cluster)
        session = _opened(asked, settings, task, folder, resume=resume, staff=staff)
        try:
            rows = _run(session, tracker, folder, budget, seconds)
        finally:
            session.ladder.close()
    finally:
        untracked = tracker.close()
        if untracked:
            say(f"{untracked} results could not be logged to MLflow yet; they are kept")
    models = {"model": asked.model, "also_models": list(asked.also_model)}
    found = {**models, "text": asked.text, "name": name, "rows": rows}
    options.write_json(found, json_file)
    say(f"see it here: prunezero show {asking.typed_name(folder)}")
    say(f"see it in MLflow: prunezero ui --runs-dir {runs_dir}")


def _opened(
    asked: Asked,
    settings: Settings,
    task: Task,
    folder: Path,
    *,
    resume: bool,
    staff: Callable[[Plan], Judges] | None,
) -> Session:
    """The search that was asked for, on its models and text, ready to run."""
    from prunezero.cli.tables import Bars
    from prunezero.report.search_file import write_asked
    from prunezero.searching.session import open_session

    bench, *others = asking.benches(asked, settings)
    with Bars() as bars:
        return open_session(
            bench,
            task,
            folder,
            also_benches=others,
            resume=resume,
            archive=folder.parent / "archive.jsonl",
            staff=staff,
            progress=bars,
            opened=partial(write_asked, asked.settled(bench, task), folder),
        )


def _run(
    session: Session, tracker: Tracker, folder: Path, budget: int | None, seconds: float | None
) -> list[dict[str, Any]]:
    """Search, then judge; rows of results, the winner's last, none when it was interrupted."""
    from prunezero.cli.live import SearchView
    from prunezero.cli.stopping import Stopping
    from prunezero.cli.tables import Bars, say
    from prunezero.report.run_folder import tracked_rows, tracked_search, write_run
    from prunezero.searching.session import measure_rivals, rivals

    name = folder.name
    tracker.record(tracked_search(session, name, finished=False))
    known: list[dict[str, Any]] = []
    with Bars() as bars:
        for row in measure_rivals(session, ("search", "validation")):
            known.append(row)
            bars("published recipes", len(known), len(rivals(session.task)) + 1)
    for record in tracked_rows(known, session.bench, also_benches=session.also_benches):
        tracker.record(record)
    view = SearchView(known, budget=budget, seconds=seconds)
    with view, Stopping(seconds, view.say) as stopping:
        candidates = _candidates(session, tracker, name, view, budget, stopping)
    write_run(session, folder, candidates, known)
    if stopping.was_interrupted:
        say(f"stopped; everything is in {folder}, and goes on from here by")
        say(f"  {asking.way_on(folder)} {asking.limits(budget, seconds)}")
        tracker.record(tracked_search(session, name, finished=True, artifacts=_files(folder)))
        return []
    return _judged(session, tracker, folder, candidates)


def _candidates(
    session: Session,
    tracker: Tracker,
    name: str,
    view: Any,
    budget: int | None,
    stopping: Any,
) -> list[Candidate]:
    """Every candidate of the search, the measured ones with their perplexity, in order of slots."""
    from prunezero.report.run_folder import tracked_candidate
    from prunezero.searching.search import search as candidates_of

    found: dict[int, Candidate] = {}
    proposed = candidates_of(session.ladder, budget=budget, stop=stopping, ended=view.say)
    for candidate in proposed:
        found[candidate.slot] = candidate
        view.show(candidate)
        if candidate.search_perplexity is not None:
            tracker.record(tracked_candidate(candidate, session, name))
            if candidate.validation_perplexity is None:
                tracker.progress(name, view.measured, view.progress())
    return [found[slot] for slot in sorted(found)]


def _judged(
    session: Session, tracker: Tracker, folder: Path, candidates: list[Candidate]
) -> list[dict[str, Any]]:
    """Judge the finalists on validation text, report the winner and its rivals on test text."""
    from prunezero.cli.tables import Bars, conditions, print_results, say
    from prunezero.pruning.compare import SPLITS
    from prunezero.report.run_folder import (
        tracked_champion,
        tracked_rows,
        tracked_search,
        write_winner,
    )
    from prunezero.searching import session as sessions

    name = folder.name
    final = sessions.finalists(candidates)
    with Bars() as bars:
        judged = []
        for done, candidate in enumerate(final, start=1):
            judged.append((sessions.judge(session, candidate), candidate))
            bars("finalists on validation text", done, len(final))
        best = min(judged, key=lambda pair: pair[0]["validation_perplexity"] or float("inf"))[1]
        rows = []
        total = len(sessions.rivals(session.task)) + 1  # the dense model is one of them
        for row in sessions.measure_rivals(session, SPLITS):
            rows.append(row)
            bars("published recipes on test text", len(rows), total)
        recipe = sessions.found_recipe(session, name, best)
        rows.append(session.ladder.measure(recipe, SPLITS))
    recipe = write_winner(recipe, rows, folder)
    for record in tracked_rows(rows[:-1], session.bench, also_benches=session.also_benches):
        tracker.record(record)
    champion = {**rows[-1], "search_perplexity": best.search_perplexity}
    tracker.record(tracked_champion(recipe, champion, session, name, folder))
    tracker.record(tracked_search(session, name, finished=True, artifacts=_files(folder)))
    print_results(rows, f"search {name}", best="test_perplexity")
    say(conditions(rows, session.models, session.bench))
    say(f"found: {best.rule.text}", style="bold")
    twin = sessions.published_twin(session.task, best.rule)
    if twin is not None:
        say(f"it ranks weights as the published {twin} does")
    say(_verdict(rows))
    say(f"recipe: {folder / 'recipe.yaml'}")
    say(f"pruner: {folder / 'pruner.py'}")
    return rows


def _verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence: is the winner, the last row, better than the best published recipe?"""
    from prunezero.searching.judging.audit import chance_of_no_gain

    winner, rivals = rows[-1], [row for row in rows[:-1] if row["recipe"] != "dense"]
    measured = [row for row in rivals if row["validation_perplexity"] is not None]
    best = min(measured, key=lambda row: row["validation_perplexity"], default=None)
    if best is None or None in (best["test_perplexity"], winner["test_perplexity"]):
        return "no published recipe to compare with was measurable"
    change = winner["test_perplexity"] / best["test_perplexity"] - 1
    verdict = "better than" if change < 0 else "no better than"
    losses = [row["window_losses"]["test"] for row in (winner, best)]
    return (
        f"{verdict} {best['recipe']}, the best published one on validation text: test perplexity "
        f"{winner['test_perplexity']:.2f} against {best['test_perplexity']:.2f} ({change:+.1%}; "
        f"chance of no gain {chance_of_no_gain(*losses):.2g} over {len(losses[0])} windows)"
    )


def _files(folder: Path) -> tuple[Path, ...]:
    """What of a run's folder is also kept in MLflow."""
    names = ("recipe.yaml", "pruner.py", "results.json", "candidates.parquet", "candidates.csv")
    views = ("pareto.png", "proxy.png", "progress.png", "optuna.log")
    return tuple(folder / name for name in (*names, *views) if (folder / name).is_file())
