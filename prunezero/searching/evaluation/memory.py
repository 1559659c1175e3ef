"""Memory of a search: what its rungs hold, in the one formula of `pruning/memory_plan.py`."""

from __future__ import annotations

from prunezero.errors import SearchError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.block_trace import trace_block
from prunezero.pruning.memory_plan import MemoryPlan, Work, plan_of, refuse_unplanned
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings
from prunezero.searching.evaluation.evaluator import recipes_of_space, sums_of
from prunezero.searching.evaluation.sampled_testbed import dampings_of
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.task import Task
from prunezero.searching.proxies.samples import sample_bytes


def search_plan(
    language_model: LanguageModel,
    task: Task,
    *,
    is_sparing: bool = False,
    limit: int | None = None,
) -> MemoryPlan:
    """The memory of a search on one model in one process.

    Args:
        language_model: its weights may be outlines.
        is_sparing, limit: as `compare_plan`.

    Raises:
        SearchError: it is a search on several models, or for units.
        RecipeError: the memory of one of its recipes cannot be planned.
        ModelError: the limit is less than the least that it takes; `targets` match nothing.
    """
    config = task.config
    if task.space.unit != "weight":
        raise SearchError(
            f"search space {task.space.name} is of unit: {task.space.unit}, and what a search for "
            "units remembers is not planned; leave the memory limit out"
        )
    if config.also_model:
        raise SearchError(
            "the memory of a search on several models is not planned; leave --also-model out, or "
            "the memory limit"
        )
    recipes = [refuse_unplanned(one) for one in (*recipes_of_space(task), *baselines(task))]
    twice = [dense_sums([recipe]) for recipe in recipes if recipe.mends]
    layers = find_linears(language_model.model, targets=config.targets, ignore=config.ignore)
    is_sparing = is_sparing or limit is not None
    held, making = _samples(language_model, task, layers, is_sparing=is_sparing)
    work = Work(
        layers=layers,
        recipes=recipes,
        sums=sums_of(task),
        settings=config.settings,
        answers=_answers(config.settings, has_objective=bool(task.objective.also)),
        again=max(twice, key=len, default=frozenset()),
        draws=config.draws,
        samples=config.draws * held,
        sampling=making,
    )
    return plan_of(language_model, work, is_sparing=is_sparing, limit=limit)


def _samples(
    language_model: LanguageModel, task: Task, layers: list[Linear], *, is_sparing: bool
) -> tuple[int, int]:
    """Bytes of samples, kept and while they are made."""
    return sample_bytes(
        layers,
        task.space.features,
        readers=trace_block(language_model, task.config.sequence_length).readers,
        dampings=dampings_of(task),
        holds_grams=is_sparing,
        is_cpu=language_model.device.type == "cpu",
    )


def _answers(settings: Settings, *, has_objective: bool) -> int:
    """Tokens of texts on which the dense model's answers are kept."""
    searched = settings.evaluation_tokens
    quick = max(settings.sequence_length, searched // 4)
    if has_objective:
        return 2 * searched + settings.test_tokens + quick
    return searched + quick
