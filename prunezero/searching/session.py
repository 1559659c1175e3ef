"""Session: a search set up on its models, its baselines measured, its best measured honestly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunezero.errors import RecipeError, SearchError
from prunezero.formula.criterion import Criterion
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed, beginning
from prunezero.searching.evaluation.archive import Archive, check_archive
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.evaluation.promotion import FINALISTS
from prunezero.searching.evaluation.rungs import Evaluators, Rungs
from prunezero.searching.experiment.baselines import baselines, on_terms_of, published_rules
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.config import SearchConfig, starting_rules
from prunezero.searching.experiment.objectives import find_objective
from prunezero.searching.experiment.provenance import header, machine
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.experiment.testbeds import fitted, without_unknown_features
from prunezero.searching.search import search
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.spaces.space_choices import alike
from prunezero.searching.strategies.catalogue import find_strategy
from prunezero.searching.strategies.per_layer import settled
from prunezero.searching.workers.worker import EvaluatorPlan


@dataclass(frozen=True)
class Session:
    """A search that is ready to run."""

    testbeds: tuple[Testbed, ...]
    """its models, its own first, on the same text"""
    task: Task
    """what it looks for"""
    rungs: Rungs
    """how candidates are measured"""
    journal: Journal
    """what it remembers"""

    @property
    def models(self) -> str:
        """The names of all its models."""
        return " and ".join(testbed.language_model.name for testbed in self.testbeds)


def make_task(config: SearchConfig) -> Task:
    """The task of an experiment, seeded with the published formulas that its space can write.

    Of rules to start from, choices that the space does not offer are left out, and formulas that it
    cannot write.

    Raises:
        SelectionError: sparsity and pattern do not go together.
        RecipeError: its units are of run time.
        SearchError: no such strategy or objective (the message gives the nearest), no such budget,
            one twice, or one in which nothing goes, no draw, or no rule to start with that the
            space can write.
    """
    if config.is_run_time:
        space = config.space_content
        raise RecipeError(
            f"search space {space.name} is of unit: {space.unit}, which is left out while a model "
            "runs, and here weights are searched; use open_session of "
            "prunezero.searching.attending.session"
        )
    strategy = find_strategy(config.strategy)
    find_objective(config.objective)
    if config.draws < 1:
        raise SearchError(
            f"draws is {config.draws}; rules need at least 1 draw of calibration text"
        )
    task = Task(config)
    if config.stop_early and not (task.measures_once and strategy.is_screened):
        raise SearchError(
            "stop_early compares windows of one model, draw and budget, under a strategy that "
            "screens its candidates; leave it out"
        )
    if len(set(task.budgets)) < len(task.budgets):
        raise SearchError(
            f"--also {','.join(config.also)}: a budget stands there twice, or is the search's own"
        )
    if not all(budget.amount for budget in task.budgets):
        raise SearchError("at sparsity 0 all formulas are alike; give one above 0, such as 0.5")
    start = config.rules
    begun = _writable(task, start)
    if start and not begun:
        raise SearchError(
            f"none of the {len(start)} rules to start from can be written in search space "
            f"'{task.space.name}'; leave them out, or choose another space"
        )
    first = [] if config.from_scratch else published_rules(task)
    return replace(task, seeds=_writable(task, [*begun, *first]))


def _writable(task: Task, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """What of these rules a task may write: formulas of its space, with choices that it offers."""
    space = task.space

    def is_writable(criterion: Criterion) -> bool:
        return space.holds(criterion) and space.speaks(criterion)

    found: dict[str, Rule] = {}
    for rule in rules:
        if is_writable(rule.criterion):
            offered = {
                key: one
                for key, value in rule.choices.items()
                for one in task.options.get(key, ())
                if alike(key, one, value, space.unit)
            }
            own = Rule(rule.criterion, offered)
            if set(rule.per_layer) <= set(space.criteria) and all(map(is_writable, rule.formulas)):
                own = settled(task, own.with_per_layer(rule.per_layer))
            found.setdefault(own.text, own)
    return tuple(found.values())


def open_session(
    testbeds: Sequence[Testbed],
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    archive: Path | None = None,
    pool: Callable[[EvaluatorPlan], Evaluators] | None = None,
    progress: Progress | None = None,
    opened: Callable[[], None] = lambda: None,
) -> Session:
    """Calibrate the models and open the journal `folder/journal.jsonl`.

    Args:
        testbeds: of all models that rules have to be good on, with the same text and settings.
        archive: file of results that searches share; None asks nobody else.
        pool: makes a pool of workers, see `workers/`; None leaves all to this process.
        opened: called once the journal is this search's, before the long work.

    Raises:
        SearchError: the journal is in use, or belongs to a search under other settings; or the
            models are not comparable.
        PruneZeroError: the model, the text and the task do not go together.
    """
    if archive is not None:
        check_archive(archive)
    # What is left to the machine and to the pattern is the same when the search goes on.
    task = replace(fitted(task, testbeds), config=task.config.settled(testbeds[0]))
    # Opened before the long work, so that a wrong name or setting is known at once.
    journal = Journal(folder / "journal.jsonl", header(task, testbeds), resume=resume)
    try:
        opened()
        evaluator = Evaluator(task, testbeds, progress)
        plan = EvaluatorPlan.of(task.config, testbeds)
        evaluators = evaluator if pool is None else pool(plan)
        within = {**plan.conditions, **machine(testbeds[0], evaluators.threads)}
        known = None if archive is None else Archive(archive, within)
        return Session(tuple(testbeds), task, Rungs(evaluator, journal, evaluators, known), journal)
    except BaseException:
        # A search that could not begin must not stand in the way of its next attempt.
        journal.give_up()
        raise


def measure_baselines(session: Session, splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for the dense model and each baseline, on the given splits."""
    yield session.rungs.measure_dense(splits)
    for recipe in baselines(session.task):
        yield session.rungs.measure(recipe, splits)


def measure_on_same_terms(
    session: Session, found: Recipe, splits: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each baseline's formula under the choices of a found recipe, or its `fault`."""
    recipes, refused = on_terms_of(found, session.task)
    yield from ({"recipe": name, "fault": why} for name, why in refused.items())
    for recipe, row in zip(recipes, session.rungs.rows(recipes, splits), strict=True):
        yield {"recipe": recipe.name, **row, "choices": recipe.effect}


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that stand on validation text or should, best on search text first.

    Raises:
        SearchError: no candidate was measured.
    """
    measured = [
        (one.search_fitness, one.slot, one)
        for one in candidates
        if one.search_fitness is not None
        and one.validation_at_least is None
        and one.status == "new"
    ]
    if not measured:
        raise SearchError(
            "no candidate was measured on the model; give the search more --budget or --time, and "
            "go on with --resume"
        )
    ranked = [one for *_, one in sorted(measured, key=lambda known: known[:2])]
    late = ranked[FINALISTS:]
    return ranked[:FINALISTS] + [one for one in late if one.validation_fitness is not None]


def measure_finalist(session: Session, candidate: Candidate) -> dict[str, Any]:
    """The row of a finalist on validation text, which no search has seen."""
    recipe = session.task.recipe(candidate.rule, f"candidate-{candidate.slot}")
    return session.rungs.measure(recipe, ("validation",))


def found_recipe(session: Session, name: str, winner: Candidate) -> Recipe:
    """The recipe of the winner, with where it comes from."""
    task, (own, *others) = session.task, session.testbeds
    models = [one.language_model for one in others]
    also = [{"name": model.name, "fingerprint": model.fingerprint} for model in models]
    return task.recipe(winner.rule, name).model_copy(
        update={
            "source": f"found by prunezero in search space '{task.space.name}'",
            "provenance": {
                "search": name,
                "slot": winner.slot,
                "origin": winner.origin,
                **task.config.settled(own).shown(),
                "model_fingerprint": own.language_model.fingerprint,
                **({"also_models": also} if also else {}),
                "text_fingerprint": own.text.fingerprint,
                **beginning(one.begin_with for one in session.testbeds),
            },
        }
    )


def find(
    testbed: Testbed,
    space: str | SearchSpace = "formulas",
    sparsity: float | None = None,
    *,
    folder: str | Path,
    also_testbeds: Sequence[Testbed] = (),
    start: Sequence[Rule | Criterion | str] = (),
    budget: int | None = None,
    resume: bool = False,
    **named: Any,
) -> Iterator[Candidate]:
    """Search from Python: yields each candidate when screened, and again when it is measured.

    `prunezero search` also measures the finalists, logs to MLflow and exports the winner.

    Args:
        space: name, path of a .yaml file, or a SearchSpace.
        folder: where the journal is kept.
        also_testbeds: of further models that a rule has to be good on, with the same text and
            settings.
        start: rules or formulas to begin with, beside published formulas.
        budget: candidates with a new mask to screen; None goes on until the caller stops asking.
        named: other fields of `SearchConfig`: pattern, also, draws, targets, ignore, seed,
            from_scratch, strategy, objective.

    Raises:
        PruneZeroError: model, text and task do not go together, or the journal belongs to others.
    """
    if named.get("start_from"):
        raise SearchError("give the rules themselves to start=, as `prunezero search` finds them")
    chosen = space if isinstance(space, SearchSpace) else SearchSpace.load(space)
    config = SearchConfig.on(
        testbed,
        also_testbeds,
        space_content=chosen,
        sparsity=sparsity,
        start=starting_rules(start),
        **named,
    )
    testbeds = (testbed, *also_testbeds)
    config, _ = without_unknown_features(config, testbeds)
    session = open_session(testbeds, make_task(config), Path(folder), resume=resume)
    try:
        yield from search(session.rungs, max_candidates=budget)
    finally:
        session.journal.close()
