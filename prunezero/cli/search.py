"""`prunezero search`: find a criterion, measure it honestly, write a pruner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunezero.cli import asking, options
from prunezero.cli.options import (
    CalibrationTokens,
    Device,
    Dtype,
    EvaluationTokens,
    JsonFile,
    Model,
    RunsDir,
    Seed,
    SequenceLength,
    Sparsity,
    TestTokens,
    TextName,
)
from prunezero.errors import RecipeError

if TYPE_CHECKING:
    from prunezero.report.track import Tracker
    from prunezero.searching.candidate import Candidate
    from prunezero.searching.ladder import Judges
    from prunezero.searching.plan import Plan
    from prunezero.searching.session import Session


def search(
    ctx: typer.Context,
    model: Model = "demo",
    text: TextName = "demo",
    sparsity: Sparsity = None,
    pattern: Annotated[
        str, typer.Option(help="`free`, or N:M such as 2:4, which keeps 2 of every 4 weights.")
    ] = "free",
    space: Annotated[
        str, typer.Option(help="Name or .yaml file; see `prunezero list spaces`.")
    ] = "formulas",
    budget: Annotated[
        int | None, typer.Option(help="Candidates with a new mask to screen.", min=1)
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Such as 90s, 10m or 2h, of the search alone.")
    ] = None,
    seed: Seed = 0,
    name: Annotated[
        str | None, typer.Option(help="Folder of this search inside the runs folder.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --name stopped.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Do not start from published formulas.")
    ] = False,
    strategy: Annotated[
        str, typer.Option(help="Who proposes; the others are controls to compare `evolution` with.")
    ] = "evolution",
    workers: Annotated[
        int, typer.Option(help="local_crew or actors that judge candidates.", min=1)
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="Of each who judges; the cores divided by --workers if left out.", min=1),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Judge on Ray: address of a cluster, or `local`; see docs/scaling.md."),
    ] = None,
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

        prunezero search --model demo --sparsity 0.5 --space tiny --budget 20 --name quick

        prunezero search --time 10m --name first --resume
    """
    from prunezero.cli.tables import Bars, say, waiting
    from prunezero.pruning.bench import set_up
    from prunezero.report.run_folder import run_folder
    from prunezero.report.search_file import write_asked
    from prunezero.report.track import Tracker
    from prunezero.searching.session import open_session

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
        with waiting(f"loading {asked.model} and {asked.text} text"):
            bench = set_up(
                asked.model, asked.text, settings, dtype=asked.dtype, device=asked.device
            )
        say(options.about_model(bench))
        kept = partial(write_asked, asked.settled(bench, task), folder)
        with Bars() as bars:
            session = open_session(
                bench,
                task,
                folder,
                resume=resume,
                archive=runs_dir / "archive.jsonl",
                staff=_staff(workers, threads, cluster),
                progress=bars,
                opened=kept,
            )
        try:
            rows = _run(session, tracker, folder, budget, seconds)
        finally:
            session.ladder.close()
    finally:
        untracked = tracker.close()
        if untracked:
            say(f"{untracked} results could not be logged to MLflow yet; they are kept")
    found = {"model": asked.model, "text": asked.text, "name": name, "rows": rows}
    options.write_json(found, json_file)
    say(f"see it here: prunezero show {asking.typed_name(folder)}")
    say(f"see it in MLflow: prunezero ui --runs-dir {runs_dir}")


def _staff(
    workers: int, threads: int | None, cluster: str | None
) -> Callable[[Plan], Judges] | None:
    """Who hires judges beside this process; None where it judges alone."""
    import torch

    from prunezero.cli.tables import say
    from prunezero.searching.workers import local_crew, usable_cores

    if cluster is not None:
        from prunezero.searching.cluster import ray_crew

        return lambda plan: ray_crew(plan, cluster, workers, threads=threads)
    if workers == 1:
        torch.set_num_threads(threads or torch.get_num_threads())
        return None
    each = threads or max(1, usable_cores() // workers)
    say(f"{workers} workers with {each} {'thread' if each == 1 else 'threads'} each")
    return lambda plan: local_crew(plan, workers, threads=each)


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
    for record in tracked_rows(known, session.bench):
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
    for candidate in candidates_of(session.ladder, budget=budget, stop=stopping):
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
    from prunezero.cli.tables import Bars, conditions, console, results_table, say
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
    for record in tracked_rows(rows[:-1], session.bench):
        tracker.record(record)
    champion = {**rows[-1], "search_perplexity": best.search_perplexity}
    tracker.record(tracked_champion(recipe, champion, session, name, folder))
    tracker.record(tracked_search(session, name, finished=True, artifacts=_files(folder)))
    console.print(results_table(rows, f"search {name}", best="test_perplexity"))
    say(conditions(rows, session.bench.language_model.name, session.bench))
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
    from prunezero.searching.audit import chance_of_no_gain

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
    pictures = ("pareto.png", "proxy.png", "progress.png")
    return tuple(folder / name for name in (*names, *pictures) if (folder / name).is_file())
