"""Everything around a search: set it up, give it something to beat, judge its best honestly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunezero.errors import SearchError
from prunezero.formula.criterion import Criterion
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.requirements import settled_sparsity
from prunezero.pruning.testbed import Testbed, beginning
from prunezero.searching.evaluation.archive import Archive, check_archive
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.evaluation.promotion import FINALISTS
from prunezero.searching.evaluation.rungs import Evaluators, LocalEvaluator, Rungs
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.budgets import read_budgets
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.provenance import conditions, further, machine
from prunezero.searching.experiment.task import Rule, Task
from prunezero.searching.experiment.testbeds import fitted
from prunezero.searching.search import search
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.spaces.space_choices import alike
from prunezero.searching.strategies.catalogue import find_strategy
from prunezero.searching.strategies.per_layer import settled
from prunezero.searching.workers.worker import Plan


@dataclass(frozen=True)
class Session:
    """A search that is ready to run."""

    testbed: Testbed
    """model and text"""
    task: Task
    """what it looks for"""
    rungs: Rungs
    """how candidates are judged"""
    journal: Journal
    """what it remembers"""
    also_testbeds: tuple[Testbed, ...] = ()
    """further models that its rules have to be good on, and the same text"""

    @property
    def models(self) -> str:
        """The names of all its models."""
        return " and ".join(
            testbed.language_model.name for testbed in (self.testbed, *self.also_testbeds)
        )


def make_task(
    space: SearchSpace,
    sparsity: float | None,
    *,
    pattern: str = "free",
    also: str = "",
    seed: int = 0,
    draws: int = 1,
    start: Sequence[Rule] = (),
    from_scratch: bool = False,
    strategy: str = "evolution",
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Task:
    """A search task, seeded with the published formulas that the space can write.

    Args:
        also: other regimes that its rules have to serve, such as `0.7,2:4`.
        draws: of calibration text that its rules have to be good on.
        start: other rules to begin with; choices that the space does not offer are left out, and
            formulas that it cannot write.
        from_scratch: whether it starts without published formulas.
        strategy: who proposes rules, see `strategies/catalogue.py`.
        targets: patterns of the layers to prune, as in `find_linears`.
        ignore: patterns of those to leave alone.

    Raises:
        SelectionError: sparsity and pattern do not go together.
        SearchError: no such strategy (the message gives the nearest), no such regime, one twice, or
            one in which nothing goes, no draw, or no rule to start with that the space can write.
    """
    find_strategy(strategy)
    if draws < 1:
        raise SearchError(f"draws is {draws}; rules need at least 1 draw of calibration text")
    published = [Recipe.load(name).criterion for name in published_recipes()]
    # Simplest first: of formulas with equal masks the first one stands for all.
    published.sort(key=lambda criterion: (criterion.complexity, criterion.text))
    settled = settled_sparsity(pattern, sparsity)
    task = Task(space, settled, pattern, seed, (), strategy, read_budgets(also), draws)
    task = replace(task, targets=tuple(targets), ignore=tuple(ignore))
    if len(set(task.budgets)) < len(task.budgets):
        raise SearchError(f"--also {also}: a regime stands there twice, or is the search's own")
    if not all(budget.sparsity for budget in task.budgets):
        raise SearchError("at sparsity 0 all formulas are alike; give one above 0, such as 0.5")
    begun = _writable(task, start)
    if start and not begun:
        raise SearchError(
            f"none of the {len(start)} rules to start from can be written in search space "
            f"'{space.name}'; leave them out, or choose another space"
        )
    first = [] if from_scratch else [Rule(criterion) for criterion in published]
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
                if alike(key, one, value)
            }
            own = Rule(rule.criterion, offered)
            if set(rule.per_layer) <= set(space.criteria) and all(map(is_writable, rule.formulas)):
                own = settled(task, own.with_per_layer(rule.per_layer))
            found.setdefault(own.text, own)
    return tuple(found.values())


def open_session(
    testbed: Testbed,
    task: Task,
    folder: Path,
    *,
    also_testbeds: Sequence[Testbed] = (),
    resume: bool = False,
    archive: Path | None = None,
    staff: Callable[[Plan], Evaluators] | None = None,
    progress: Progress | None = None,
    opened: Callable[[], None] = lambda: None,
) -> Session:
    """Calibrate the model and open the journal `folder/journal.jsonl`.

    Args:
        also_testbeds: of further models that rules have to be good on, with the same text and
            settings.
        archive: file of answers that searches share; None asks nobody else.
        staff: hires judges, see `hiring/`; None leaves all to this process.
        opened: called once the journal is this search's, before the long work.

    Raises:
        SearchError: the journal is in use, or belongs to a search under other settings; or the
            models are not comparable.
        PruneZeroError: the model, the text and the task do not go together.
    """
    also = tuple(also_testbeds)
    if archive is not None:
        check_archive(archive)
    task = fitted(task, (testbed, *also), baselines(task))
    # Opened before the long work, so that a wrong name or setting is known at once.
    journal = Journal(folder / "journal.jsonl", _header(testbed, task, also), resume=resume)
    try:
        opened()
        evaluator = Evaluator(task, testbed, baselines(task), progress, also_testbeds=also)
        plan = Plan.of(testbed, task, baselines(task), also_testbeds=also)
        evaluators = LocalEvaluator(evaluator) if staff is None else staff(plan)
        within = conditions(testbed, task, also) | machine(testbed, evaluators.threads)
        answers = None if archive is None else Archive(archive, within)
        return Session(testbed, task, Rungs(evaluator, journal, evaluators, answers), journal, also)
    except BaseException:
        # A search that could not begin must not stand in the way of its next attempt.
        journal.give_up()
        raise


def measure_baselines(session: Session, splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for the dense model and each rival, on the given splits."""
    yield session.rungs.measure_dense(splits)
    for recipe in baselines(session.task):
        yield session.rungs.measure(recipe, splits)


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that stand on validation text or should, best on search text first.

    Raises:
        SearchError: no candidate was measured.
    """
    measured = [
        one for one in candidates if one.search_perplexity is not None and one.status == "new"
    ]
    if not measured:
        raise SearchError(
            "no candidate was measured on the model; give the search more --budget or --time, and "
            "go on with --resume"
        )
    measured.sort(key=lambda one: (one.search_perplexity or 0.0, one.slot))
    late = measured[FINALISTS:]
    return measured[:FINALISTS] + [one for one in late if one.validation_perplexity is not None]


def evaluator(session: Session, candidate: Candidate) -> dict[str, Any]:
    """The row of a finalist on validation text, which no search has seen."""
    recipe = session.task.recipe(candidate.rule, f"candidate-{candidate.slot}")
    return session.rungs.measure(recipe, ("validation",))


def found_recipe(session: Session, name: str, winner: Candidate) -> Recipe:
    """The recipe of the winner, with where it comes from."""
    task, testbed = session.task, session.testbed
    models = [one.language_model for one in session.also_testbeds]
    others = [{"name": model.name, "fingerprint": model.fingerprint} for model in models]
    return task.recipe(winner.rule, name).model_copy(
        update={
            "source": f"found by prunezero in search space '{task.space.name}'",
            "provenance": {
                "search": name,
                "slot": winner.slot,
                "origin": winner.origin,
                "sparsity": task.sparsity,
                "pattern": task.pattern,
                **further(task),
                "seed": task.seed,
                "model": testbed.language_model.name,
                "model_fingerprint": testbed.language_model.fingerprint,
                **({"also_models": others} if others else {}),
                "text": testbed.text.name,
                "text_fingerprint": testbed.text.fingerprint,
                "calibration_tokens": testbed.settings.calibration_tokens,
                "sequence_length": testbed.settings.sequence_length,
                **beginning(one.begin_with for one in (testbed, *session.also_testbeds)),
                "dtype": testbed.language_model.dtype_word,
            },
        }
    )


def _header(testbed: Testbed, task: Task, also_testbeds: Sequence[Testbed] = ()) -> dict[str, Any]:
    """Everything that the results of a search depend on."""
    return conditions(testbed, task, also_testbeds) | {
        "space": task.space.model_dump(mode="json"),
        "pattern": task.pattern,
        "seed": task.seed,
        "seeds": [rule.text for rule in task.seeds],
        "strategy": task.strategy,
        "rivals": [recipe.criterion.text for recipe in baselines(task)],
    }


def find(
    testbed: Testbed,
    space: str | SearchSpace = "formulas",
    sparsity: float | None = None,
    *,
    folder: str | Path,
    also_testbeds: Sequence[Testbed] = (),
    pattern: str = "free",
    also: str = "",
    seed: int = 0,
    draws: int = 1,
    start: Sequence[Rule] = (),
    budget: int | None = None,
    from_scratch: bool = False,
    strategy: str = "evolution",
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    resume: bool = False,
) -> Iterator[Candidate]:
    """Search from Python: yields each candidate when screened, and again when it is measured.

    `prunezero search` also judges the finalists, logs to MLflow and exports the winner.

    Args:
        space: name, path of a .yaml file, or a SearchSpace.
        folder: where the journal is kept.
        also_testbeds: of further models that a rule has to be good on, with the same text and
            settings.
        also: other regimes that a rule has to serve as well, such as `0.7,2:4`.
        draws: of calibration text that a rule has to be good on.
        start: rules to begin with, beside published formulas.
        budget: candidates with a new mask to screen; None goes on until the caller stops asking.
        strategy: who proposes rules, see `strategies/catalogue.py`.
        targets: patterns of the layers to prune, as in `find_linears`.
        ignore: patterns of those to leave alone.

    Raises:
        PruneZeroError: model, text and task do not go together, or the journal belongs to others.
    """
    chosen = space if isinstance(space, SearchSpace) else SearchSpace.load(space)
    task = make_task(
        chosen,
        sparsity,
        pattern=pattern,
        also=also,
        seed=seed,
        draws=draws,
        start=start,
        from_scratch=from_scratch,
        strategy=strategy,
        targets=targets,
        ignore=ignore,
    )
    session = open_session(testbed, task, Path(folder), also_testbeds=also_testbeds, resume=resume)
    try:
        yield from search(session.rungs, max_candidates=budget)
    finally:
        session.journal.close()
