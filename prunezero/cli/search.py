"""`prunezero search`: find a criterion, measure it honestly, write a pruner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prunezero.cli import options
from prunezero.cli import search_options as asking
from prunezero.cli.layer_options import Ignore, Targets
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
    Signals,
    Space,
    Sparsity,
    StartFrom,
    StrategyWord,
    TestTokens,
    TextName,
    Threads,
    TimeLimit,
    Workers,
)
from prunezero.cli.quantities import seconds_of
from prunezero.errors import OutputError, RecipeError, shell_word

if TYPE_CHECKING:
    from prunezero.pruning.testbed import Settings
    from prunezero.report.runs.search_file import Asked
    from prunezero.report.tracking.tracker import Tracker
    from prunezero.searching.evaluation.rungs import Evaluators
    from prunezero.searching.experiment.candidate import Candidate
    from prunezero.searching.experiment.task import Task
    from prunezero.searching.session import Session
    from prunezero.searching.workers.worker import Plan


def search(
    ctx: typer.Context,
    model: Model = "demo",
    text: TextName = "demo",
    sparsity: Sparsity = None,
    pattern: Pattern = "free",
    also: Also = "",
    also_model: AlsoModel = None,
    draws: Draws = 1,
    targets: Targets = "",
    ignore: Ignore = "",
    space: Space = "formulas",
    signals: Signals = None,
    budget: Budget = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    name: SearchName = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Resume = False,
    from_scratch: FromScratch = False,
    start_from: StartFrom = None,
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
    was chosen by. Ctrl-C and SIGTERM keep everything; `--resume` goes on, under the options of
    before.

    Examples:

        prunezero search --model demo --sparsity 0.5 --time 5m --name first

        prunezero search --model demo --pattern 2:4 --space pruner_zero --budget 500

        prunezero search --model demo --sparsity 0.5 --also 0.7,2:4 --time 30m

        prunezero search --model demo --also-model ./mine --sparsity 0.5 --time 30m

        prunezero search --model demo --sparsity 0.5 --signals activations --time 10m

        prunezero search --model demo --sparsity 0.5 --space pipeline --start-from first --time 1h

        prunezero search --model demo --sparsity 0.5 --space tiny --budget 20 --name quick

        prunezero search --model demo --sparsity 0.5 --targets q_proj,k_proj,v_proj --time 10m

        prunezero search --time 10m --name first --resume
    """
    from prunezero.cli.stopping import sigterm_interrupts, told_what_is_kept
    from prunezero.cli.tables import say
    from prunezero.report.runs.folder import refuse_foreign, run_folder
    from prunezero.report.tracking.tracker import Tracker

    seconds = seconds_of(time_limit)
    options.check_json(json_file)
    asking.check_limits(budget, seconds, resume, name)
    asking.check_hands(workers, threads, cluster)
    folder = run_folder(runs_dir, name) if name else None
    if resume and folder and not (folder / "journal.jsonl").is_file():
        raise RecipeError(f"{folder} holds no search to go on with; leave --resume out")
    asked, settings = asking.asked(ctx, folder if resume else None)
    task = asked.task()
    name = name or time.strftime(f"{task.space.name}-%Y%m%d-%H%M%S")
    folder = folder or run_folder(runs_dir, name)
    refuse_foreign(folder)
    with sigterm_interrupts():
        # Started first: MLflow needs seconds to open its database, and the model takes longer.
        tracker = Tracker(runs_dir)
        try:
            with told_what_is_kept(lambda: asking.kept(folder, budget, seconds)):
                staff = asking.staff(workers, threads, cluster)
                session = _opened(asked, settings, task, folder, resume=resume, staff=staff)
                try:
                    rows = _run(session, tracker, folder, budget, seconds)
                finally:
                    session.rungs.close()
        finally:
            untracked = tracker.close()
            if untracked:
                say(f"{untracked} results could not be logged to MLflow yet; they are kept")
    models = {"model": asked.model, "also_models": list(asked.also_model)}
    found = {**models, "text": asked.text, "name": name, "rows": rows}
    options.write_json(found, json_file)
    say(f"see it here: prunezero show {asking.typed_name(folder)}")
    say(f"see it in MLflow: prunezero ui --runs-dir {shell_word(runs_dir)}")


def _opened(
    asked: Asked,
    settings: Settings,
    task: Task,
    folder: Path,
    *,
    resume: bool,
    staff: Callable[[Plan], Evaluators] | None,
) -> Session:
    """The search that was asked for, on its models and text, ready to run."""
    from prunezero.cli.tables import Bars
    from prunezero.report.runs.search_file import forget_asked, write_asked
    from prunezero.searching.session import open_session

    testbed, *others = asking.testbeds(asked, settings)
    try:
        with Bars() as bars:
            return open_session(
                testbed,
                task,
                folder,
                also_testbeds=others,
                resume=resume,
                archive=folder.parent / "archive.jsonl",
                staff=staff,
                progress=bars,
                opened=partial(write_asked, asked.settled(testbed, task), folder),
            )
    except BaseException:
        forget_asked(folder)
        raise


def _run(
    session: Session, tracker: Tracker, folder: Path, budget: int | None, seconds: float | None
) -> list[dict[str, Any]]:
    """Search, then judge; rows of results, the winner's last, none when it was interrupted."""
    from prunezero.cli.final_table import judged
    from prunezero.cli.tables import say
    from prunezero.report.runs.folder import write_run
    from prunezero.report.tracking.search_records import kept_files, tracked_search

    name = folder.name
    tracker.record(tracked_search(session, name, finished=False))
    try:
        known = _baselines(session, tracker)
        candidates, was_interrupted = _searched(session, tracker, folder, known, budget, seconds)
        write_run(session, folder, candidates, known)
        rows = [] if was_interrupted else judged(session, tracker, folder, candidates)
    except KeyboardInterrupt:
        tracker.record(tracked_search(session, name, finished=True, artifacts=kept_files(folder)))
        raise
    if was_interrupted:
        say(asking.kept(folder, budget, seconds))
    tracker.record(tracked_search(session, name, finished=True, artifacts=kept_files(folder)))
    return rows


def _baselines(session: Session, tracker: Tracker) -> list[dict[str, Any]]:
    """Rows of what the search has to beat, on the texts that it looks at."""
    from prunezero.cli.tables import Bars
    from prunezero.report.tracking.search_records import tracked_rows
    from prunezero.searching.experiment.baselines import baselines
    from prunezero.searching.session import measure_baselines

    known: list[dict[str, Any]] = []
    with Bars() as bars:
        for row in measure_baselines(session, ("search", "validation")):
            known.append(row)
            bars("published recipes", len(known), len(baselines(session.task)) + 1)
    for record in tracked_rows(known, session.testbed, also_testbeds=session.also_testbeds):
        tracker.record(record)
    return known


def _searched(
    session: Session,
    tracker: Tracker,
    folder: Path,
    known: list[dict[str, Any]],
    budget: int | None,
    seconds: float | None,
) -> tuple[list[Candidate], bool]:
    """Every candidate in order of slots, as far as it came; and whether somebody stopped it."""
    from prunezero.cli.live import SearchView
    from prunezero.cli.stopping import Stopping
    from prunezero.report.runs.candidate_tables import RunningTables
    from prunezero.report.tracking.search_records import search_key, tracked_candidate
    from prunezero.searching.search import search as candidates_of

    name = folder.name
    found: dict[int, Candidate] = {}
    tables = RunningTables(folder)
    view = SearchView(known, budget=budget, seconds=seconds)
    with view, Stopping(seconds, view.say) as stopping:
        proposed = candidates_of(
            session.rungs, max_candidates=budget, stop=stopping, ended=view.say
        )
        for candidate in proposed:
            found[candidate.slot] = candidate
            view.show(candidate)
            if candidate.search_perplexity is not None:
                tracker.record(tracked_candidate(candidate, session, name))
                if candidate.validation_perplexity is None:
                    key = search_key(session, name)
                    tracker.progress(key, view.measured, view.progress())
            try:
                tables.show(candidate, found)
            except OutputError as error:
                # The journal holds all of it, and the tables are written once more at the end.
                view.say(str(error))
    return [found[slot] for slot in sorted(found)], stopping.was_interrupted
