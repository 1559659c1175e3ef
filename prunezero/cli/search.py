"""`prunezero search`: find a criterion, measure it honestly, write a pruner."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.cli import options, search_setup
from prunezero.cli.limit import Limit, MemoryLimit
from prunezero.cli.options import JsonFile, RunsDir
from prunezero.cli.quantities import seconds_of
from prunezero.cli.search_options import (
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
    Ignore,
    Model,
    ObjectiveWord,
    Pattern,
    Resume,
    SearchName,
    Seed,
    SequenceLength,
    Signals,
    Space,
    Sparsity,
    StartFrom,
    StopEarly,
    StrategyWord,
    Targets,
    TestTokens,
    TextName,
    Threads,
    TimeLimit,
    Workers,
)
from prunezero.errors import OutputError, RecipeError, shell_word

if TYPE_CHECKING:
    from prunezero.report.tracking.tracker import Tracker
    from prunezero.searching.evaluation.rungs import Evaluators
    from prunezero.searching.experiment.candidate import Candidate
    from prunezero.searching.experiment.config import SearchConfig
    from prunezero.searching.experiment.task import Task
    from prunezero.searching.session import Session
    from prunezero.searching.workers.worker import EvaluatorPlan


def search(
    model: Model = None,
    text: TextName = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    also: Also = None,
    also_model: AlsoModel = None,
    draws: Draws = None,
    targets: Targets = None,
    ignore: Ignore = None,
    space: Space = None,
    signals: Signals = None,
    budget: Budget = None,
    time_limit: TimeLimit = None,
    seed: Seed = None,
    name: SearchName = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Resume = False,
    from_scratch: FromScratch = None,
    start_from: StartFrom = None,
    strategy: StrategyWord = None,
    objective: ObjectiveWord = None,
    stop_early: StopEarly = None,
    workers: Workers = 1,
    threads: Threads = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = None,
    json_file: JsonFile = None,
    sequence_length: SequenceLength = None,
    calibration_tokens: CalibrationTokens = None,
    evaluation_tokens: EvaluationTokens = None,
    test_tokens: TestTokens = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Search for a criterion that prunes this model better than the published ones.

    Candidates are screened by their layer error and the best are measured on search text, the best
    of those on validation text, and the winner on test text, which nothing was chosen by; beside it
    stand published recipes, as they are and with the winner's choices around their formulas. Ctrl-C
    and SIGTERM keep everything; `--resume` goes on, under the options of before. A space of keys in
    a cache, such as `attention`, has two objectives, KL on text that goes on and on recall:
    --sparsity is then the share of a prompt's keys that go, --budget counts recipes whose KL is
    measured, and the front is left as recipes for `compare`.

    Examples:

        prunezero search --model demo --sparsity 0.5 --time 5m --name first

        prunezero search --model demo --pattern 2:4 --space pruner_zero --budget 500

        prunezero search --model demo --sparsity 0.5 --also 0.7,2:4 --time 30m

        prunezero search --model demo --also-model ./mine --sparsity 0.5 --time 30m

        prunezero search --model demo --sparsity 0.5 --signals activations --time 10m

        prunezero search --model demo --sparsity 0.5 --space pipeline --start-from first --time 1h

        prunezero search --model demo --sparsity 0.5 --space tiny --budget 20 --name quick

        prunezero search --model demo --sparsity 0.5 --objective acceptance --time 30m

        prunezero search --model demo --sparsity 0.5 --memory-limit 4GiB --time 30m

        prunezero search --model demo --sparsity 0.5 --targets q_proj,k_proj,v_proj --time 10m

        prunezero search --model demo --space attention --sparsity 0.75 --budget 60 --name keys

        prunezero search --time 10m --name first --resume
    """
    from prunezero.cli.stopping import sigterm_interrupts, told_what_is_kept
    from prunezero.cli.tables import say
    from prunezero.files.atomic import write_json
    from prunezero.report.runs.folder import refuse_foreign, run_folder
    from prunezero.report.tracking.tracker import Tracker

    seconds = seconds_of(time_limit)
    options.check_json(json_file)
    search_setup.check_limits(budget, seconds, resume, name)
    search_setup.check_workers(workers, threads, cluster)
    limit = Limit(memory_limit, device or "auto")
    limit.refuse_workers(workers, cluster)
    folder = run_folder(runs_dir, name) if name else None
    if resume and folder and not (folder / "journal.jsonl").is_file():
        raise RecipeError(f"{folder} holds no search to go on with; leave --resume out")
    named = {
        "model": model,
        "also_model": also_model,
        "text": text,
        "sparsity": sparsity,
        "pattern": pattern,
        "also": also,
        "draws": draws,
        "targets": targets,
        "ignore": ignore,
        "space": space,
        "signals": signals,
        "seed": seed,
        "from_scratch": from_scratch,
        "start_from": start_from,
        "strategy": strategy,
        "objective": objective,
        "stop_early": stop_early,
        "sequence_length": sequence_length,
        "calibration_tokens": calibration_tokens,
        "evaluation_tokens": evaluation_tokens,
        "test_tokens": test_tokens,
        "dtype": dtype,
        "device": device,
    }
    typed = {key: value for key, value in named.items() if value is not None}
    config = search_setup.config_of(typed, folder if resume else None, runs_dir)
    hands = (workers, threads, cluster)
    searched = _way(config, hands, limit, resume=resume, limits=(budget, seconds))
    name = name or time.strftime(f"{config.space_content.name}-%Y%m%d-%H%M%S")
    folder = folder or run_folder(runs_dir, name)
    refuse_foreign(folder)
    with sigterm_interrupts():
        # Started first: MLflow needs seconds to open its database, and the model takes longer.
        tracker = Tracker(runs_dir)
        try:
            with told_what_is_kept(lambda: search_setup.kept(folder, budget, seconds)):
                rows = searched(tracker, folder)
        finally:
            untracked = tracker.close()
            if untracked:
                say(f"{untracked} results could not be logged to MLflow yet; they are kept")
    models = {"model": config.model, "also_models": list(config.also_model)}
    memory = limit.measured()
    if memory:
        write_json(memory, folder / "memory.json")
    found = {**models, **memory, "text": config.text, "name": name, "rows": rows}
    options.write_json(found, json_file)
    say(f"see it here: prunezero show {search_setup.typed_name(folder)}")
    say(f"see it in MLflow: prunezero ui --runs-dir {shell_word(runs_dir)}")


def _way(
    config: SearchConfig,
    hands: tuple[int, int | None, str | None],
    memory: Limit,
    *,
    resume: bool,
    limits: tuple[int | None, float | None],
) -> Callable[[Tracker, Path], list[dict[str, Any]]]:
    """What searches and then measures: weights, or keys that leave a cache while a model runs.

    Args:
        hands: workers, threads of each, and the address of a cluster.
        memory: limit on it.
        limits: candidates and seconds.
    """
    if config.is_run_time:
        from prunezero.cli.attention_search import search_keys

        search_setup.check_alone(config, hands[0], hands[2], memory.bytes)
        return partial(search_keys, config, threads=hands[1], resume=resume, limits=limits)
    from prunezero.searching.session import make_task

    return partial(_search_weights, make_task(config), hands, memory, resume=resume, limits=limits)


def _search_weights(
    task: Task,
    hands: tuple[int, int | None, str | None],
    memory: Limit,
    tracker: Tracker,
    folder: Path,
    *,
    resume: bool,
    limits: tuple[int | None, float | None],
) -> list[dict[str, Any]]:
    """Rows of results, as `_run` gives them; `hands`, `memory` and `limits` as of `_way`."""
    pool = search_setup.pool_of(*hands)
    session = _opened(task, folder, memory, resume=resume, pool=pool)
    try:
        return _run(session, tracker, folder, *limits)
    finally:
        session.rungs.close()


def _opened(
    task: Task,
    folder: Path,
    limit: Limit,
    *,
    resume: bool,
    pool: Callable[[EvaluatorPlan], Evaluators] | None,
) -> Session:
    """The search that was asked for, on its models and text, ready to run."""
    from prunezero.cli.tables import Bars, say
    from prunezero.report.runs.search_file import forget_config, write_config
    from prunezero.searching.evaluation.memory import search_plan
    from prunezero.searching.experiment.testbeds import (
        without_missing_biases,
        without_unknown_features,
    )
    from prunezero.searching.session import make_task, open_session

    testbeds = search_setup.loaded(task.config)
    config, reason = without_missing_biases(task.config, testbeds)
    if reason:
        say(f"updates of biases are left out: {reason}")
    config, unknown = without_unknown_features(config, testbeds)
    if unknown:
        say(f"left out of the search space: {unknown}")
    if reason or unknown:
        task = make_task(config)
    first = testbeds[0].language_model
    kept = limit.kept_on(testbeds[0], lambda size: search_plan(first, task, limit=size))
    testbeds = [kept, *testbeds[1:]]
    try:
        with Bars() as bars:
            return open_session(
                testbeds,
                task,
                folder,
                resume=resume,
                archive=folder.parent / "archive.jsonl",
                pool=pool,
                progress=bars,
                opened=partial(write_config, task.config.settled(testbeds[0]), folder),
            )
    except BaseException:
        forget_config(folder)
        raise


def _run(
    session: Session, tracker: Tracker, folder: Path, budget: int | None, seconds: float | None
) -> list[dict[str, Any]]:
    """Search, then measure; rows of results, the winner's last, none when it was interrupted."""
    from prunezero.cli.final_table import measured_finally
    from prunezero.cli.tables import say
    from prunezero.report.runs.folder import write_run
    from prunezero.report.tracking.search_records import kept_files, tracked_search

    name = folder.name
    tracker.record(tracked_search(session, name, finished=False))
    try:
        known = _baselines(session, tracker)
        candidates, was_interrupted = _searched(session, tracker, folder, known, budget, seconds)
        write_run(session, folder, candidates, known)
        rows = [] if was_interrupted else measured_finally(session, tracker, folder, candidates)
    except KeyboardInterrupt:
        tracker.record(tracked_search(session, name, finished=True, artifacts=kept_files(folder)))
        raise
    if was_interrupted:
        say(search_setup.kept(folder, budget, seconds))
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
    for record in tracked_rows(known, session.testbeds):
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
    objective = session.task.objective
    view = SearchView(known, budget=budget, seconds=seconds, objective=objective)
    with view, Stopping(seconds, view.say) as stopping:
        proposed = candidates_of(
            session.rungs, max_candidates=budget, stop=stopping, ended=view.say
        )
        for candidate in proposed:
            found[candidate.slot] = candidate
            view.show(candidate)
            if candidate.search_fitness is not None:
                tracker.record(tracked_candidate(candidate, session, name))
                if candidate.validation_fitness is None:
                    key = search_key(session, name)
                    tracker.progress(key, view.measured, view.progress())
            try:
                tables.show(candidate, found)
            except OutputError as error:
                # The journal holds all of it, and the tables are written once more at the end.
                view.say(str(error))
    return [found[slot] for slot in sorted(found)], stopping.was_interrupted
