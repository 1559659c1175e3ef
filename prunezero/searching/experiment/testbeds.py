"""Testbeds of a search: one for each model and draw of calibration text that a rule has to serve.

All testbeds have the same text and sizes, so that a window of one stands for a window of the other,
and every rule has to fit every model. What does not fit is refused before the long work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from prunezero.errors import ModelError, PruneZeroError, RecipeError, SearchError
from prunezero.models.anatomy.groups import linears_of
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.biases import refuse_without_bias
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import Progress
from prunezero.models.observing.routing import unknown_features
from prunezero.models.text.splits import SPLITS
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.reordering import Reordering
from prunezero.pruning.requirements import check_recipe
from prunezero.pruning.testbed import Testbed, with_choices
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.experiment.config import SearchConfig
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task


def beside(testbed: Testbed, names: Sequence[str], *, device: str) -> tuple[Testbed, ...]:
    """Testbeds of further models, on the text of the first and in the dtype that it has.

    Raises:
        SearchError: a model is named twice.
        ModelError: one cannot be loaded.
    """
    _refuse_twice([testbed.language_model.name, *names])
    dtype = testbed.language_model.dtype_word
    return tuple(
        replace(testbed, language_model=load_model(name, dtype=dtype, device=device))
        for name in names
    )


def _refuse_twice(names: Sequence[str]) -> None:
    """Refuse a list of models that names one of them twice.

    Raises:
        SearchError: it does.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise SearchError(f"model {name} is named twice; name every model once")


def without_missing_biases(
    config: SearchConfig, testbeds: Sequence[Testbed]
) -> tuple[SearchConfig, str]:
    """The experiment as all its models can take it, and why an update was left out.

    A space of whole units offers updates of biases, and most models can have none. Recipes that
    need them are no baselines then.

    Returns:
        The experiment, and the reason; the same experiment and no reason where nothing is missing.
    """
    space = config.space_content
    updates = space.choices.get("update", ())
    kept = tuple(words for words in updates if "bias" not in words)
    if space.unit == "weight" or len(kept) in (0, len(updates)):
        return config, ""
    for testbed in testbeds:
        model = testbed.language_model
        linears = find_linears(model.model, targets=config.targets, ignore=config.ignore)
        try:
            refuse_without_bias(model, linears_of(UNITS[space.unit].groups(linears, model)))
        except ModelError as error:
            choices = {**space.choices, "update": kept}
            narrowed = space.model_copy(update={"choices": choices})
            return config.model_copy(update={"space_content": narrowed}), str(error)
    return config, ""


def without_unknown_features(
    config: SearchConfig, testbeds: Sequence[Testbed]
) -> tuple[SearchConfig, str]:
    """The experiment without features that routers of some model say nothing of, and which and why.

    Of routers that choose among groups of experts no expert goes by itself, so nobody knows what is
    lost without one.

    Returns:
        The experiment, and the reason; the same experiment and no reason where nothing is missing.
    """
    space = config.space_content
    if space.unit != "expert":
        return config, ""
    unknown: dict[str, str] = {}
    for testbed in testbeds:
        model = testbed.language_model
        groups = UNITS["expert"].groups(find_linears(model.model), model)
        unknown = {**unknown_features(groups), **unknown}
    used = {name: why for name, why in unknown.items() if name in space.features}
    kept = tuple(one for one in space.terminals if not used.keys() & set(one.features))
    if not used or not kept:
        return config, ""
    narrowed = space.model_copy(update={"terminals": kept})
    why = "; ".join(f"{name} ({reason})" for name, reason in used.items())
    return config.model_copy(update={"space_content": narrowed}), why


def fitted(task: Task, testbeds: Sequence[Testbed]) -> Task:
    """The task on these models, once it is known that each can take it and its baselines.

    Raises:
        SearchError: one model stands there twice, or they share no text, settings or device.
        PruneZeroError: model, text and task do not go together; of several models it names which.
    """
    _refuse_unlike(testbeds)
    if testbeds[0].settings != task.config.settings:
        raise SearchError(
            f"the task is for {task.config.settings}, its testbed has {testbeds[0].settings}; make "
            "it by SearchConfig.on(testbed)"
        )
    found = []
    for testbed in testbeds:
        with about(testbed, testbeds):
            model = testbed.language_model.model
            found.append(
                find_linears(model, targets=task.config.targets, ignore=task.config.ignore)
            )
            for budget in task.budgets:
                for recipe in [*_examples(task), *baselines(task)]:
                    one = with_choices(recipe, pattern=budget.pattern)
                    layers = check_recipe(testbed.language_model, one, budget.amount)
                    _check_permutation(testbed.language_model, one, layers)
            for split in SPLITS:
                testbed.windows(split)
    return task.on(*found)


def drawn(testbeds: Sequence[Testbed], draws: int) -> tuple[Testbed, ...]:
    """Each testbed on so many draws of calibration text, by seeds that count up from its own."""
    return tuple(testbed.drawn(draw) for testbed in testbeds for draw in range(draws))


@contextmanager
def about(testbed: Testbed, testbeds: Sequence[Testbed]) -> Iterator[None]:
    """Within it, an error says which model and draw it is about, where there are several."""
    try:
        yield
    except PruneZeroError as error:
        place = ", ".join(_place(testbed, testbeds))
        if not place:
            raise
        raise type(error)(f"{place}: {error}") from error


def progress_of(
    testbed: Testbed, testbeds: Sequence[Testbed], progress: Progress | None
) -> Progress | None:
    """The progress of work on one model and draw, under their names where there are several."""
    place = ", ".join(_place(testbed, testbeds))
    if progress is None or not place:
        return progress
    return lambda what, done, total: progress(f"{place}: {what}", done, total)


def _place(testbed: Testbed, testbeds: Sequence[Testbed]) -> Iterator[str]:
    """What tells one testbed from the others, in words."""
    if len({one.language_model.name for one in testbeds}) > 1:
        yield f"model {testbed.language_model.name}"
    if len({one.settings.seed for one in testbeds}) > 1:
        yield f"calibration seed {testbed.settings.seed}"


def _refuse_unlike(testbeds: Sequence[Testbed]) -> None:
    _refuse_twice([testbed.language_model.name for testbed in testbeds])
    first, *others = testbeds
    known = {first.language_model.fingerprint: first.language_model.name}
    for testbed in others:
        model = testbed.language_model
        if model.fingerprint in known:
            raise SearchError(
                f"{known[model.fingerprint]} and {model.name} are the same model; name every "
                "model once"
            )
        known[model.fingerprint] = model.name
        if _shared(testbed) != _shared(first):
            raise SearchError(
                f"model {model.name} has other text, settings or another kind of device than "
                f"{first.language_model.name}, so their windows cannot be compared one by one; "
                "give all models the same text and Settings, and load them on one kind of device"
            )


def _shared(testbed: Testbed) -> tuple[object, ...]:
    """What all testbeds of a search have in common."""
    return testbed.text.fingerprint, testbed.settings, testbed.language_model.device.type


def _examples(task: Task) -> Iterator[Recipe]:
    """A recipe of the task, and one with each value of what it leaves open."""
    formula = task.space.terminals[0]
    yield task.recipe(formula, "example")
    for key, values in task.options.items():
        for value in values:
            # What the other choices of the space exclude is never proposed.
            with suppress(RecipeError):
                yield task.recipe(Rule(formula, {key: value}), "example")


def _check_permutation(model: LanguageModel, recipe: Recipe, layers: Sequence[Linear]) -> None:
    """Refuse a permutation that the model cannot follow.

    Raises:
        RecipeError, ModelError: it cannot.
    """
    if recipe.permute.word == "none":
        return
    # Blocks are nearly always alike, and probing all of them takes a minute.
    inside = [layer for layer in layers if layer.block == layers[0].block]
    try:
        Reordering(model, recipe, inside)
    except PruneZeroError:
        Reordering(model, recipe, layers)
