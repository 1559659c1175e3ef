"""Recipes of several stages at work: each prunes the model as those before it left it.

What goes becomes zeros in tensors of full size, as in any pruning, so that all that a later stage
looks at, gradients too, is of the model without it; units of all kinds leave together, once, when
the model is saved. How much each stage removes is settled before the first (`stage_shares.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prunezero.errors import RecipeError
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import NARROWER, SMALLER
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import Progress, calibrate
from prunezero.pruning import prune as single
from prunezero.pruning import requirements
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import AnyRecipe, StagedRecipe
from prunezero.pruning.recovery.training import TrainingReport
from prunezero.pruning.recovery.words import known_of_dense
from prunezero.pruning.stage_shares import Plan, parameters_left, plan_of, still_there
from prunezero.scoring.masking import count_zeros
from prunezero.scoring.statistics import Statistics


@dataclass(frozen=True)
class Staging:
    """What the stages of a recipe will do to a model."""

    groups: tuple[tuple[Group, ...], ...]
    """of each stage"""
    plan: Plan


@dataclass(frozen=True)
class _Text:
    """What stages look at and train on, see `prune`."""

    windows: Tensor | None
    held_out: Tensor | None
    sources: Sequence[str]


def prune(
    language_model: LanguageModel,
    recipe: AnyRecipe,
    sparsity: float | None = None,
    *,
    statistics: Mapping[str, Statistics] | None = None,
    windows: Tensor | None = None,
    held_out: Tensor | None = None,
    sources: Sequence[str] = (),
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prune a model in place, as `prunezero.pruning.prune.prune` does, by one stage or several.

    Args:
        sparsity: of a recipe of several stages, the fraction of all blocks' parameters to remove.
        statistics: sums of the dense model, those of `dense_sums` of the first stage.
        windows: calibration token ids [count, length]; later stages collect their sums on them.
        held_out: such token ids for what is measured on trial, see there.
        sources: of which source of its text each of `windows` is, by name; none of one source.
        folder: of a recipe of several stages, not used: they begin anew after a stop.

    Raises:
        PruneZeroError: as there; or stages cannot remove as much, or have no text to look at.
    """
    if isinstance(recipe, Recipe):
        return single.prune(
            language_model,
            recipe,
            sparsity,
            statistics=statistics,
            windows=windows,
            held_out=held_out,
            sources=sources,
            folder=folder,
            progress=progress,
        )
    text = _Text(windows, held_out, sources)
    return _prune_in_stages(language_model, recipe, sparsity, statistics or {}, text, progress)


def _prune_in_stages(
    language_model: LanguageModel,
    recipe: StagedRecipe,
    sparsity: float | None,
    statistics: Mapping[str, Statistics],
    text: _Text,
    progress: Progress | None,
) -> Outcome:
    """Prune by one stage after another."""
    windows = text.windows
    begin = time.perf_counter()
    fraction = requirements.settled_sparsity(recipe.pattern, sparsity)
    staging = staging_of(language_model, recipe, fraction)
    _refuse_without_text(recipe, text)
    gone = Selection()
    trainings: tuple[TrainingReport, ...] = ()
    # Of the dense model, which the first stage changes.
    of_dense = [
        known_of_dense(language_model, one.recover.options, windows, text.sources, progress)
        for one in recipe.recipes
    ]
    for place, (one, share) in enumerate(zip(recipe.recipes, staging.plan.shares, strict=True)):
        left = _on_what_is_left(one, staging.groups[place], gone)
        if left is None:
            continue
        if place:
            layers = requirements.check_recipe(language_model, left, share)
            statistics = _seen(language_model, left, layers, windows, progress)
        outcome = single.prune(
            language_model,
            left,
            share,
            statistics=statistics,
            windows=windows,
            held_out=text.held_out,
            sources=text.sources,
            of_dense=of_dense[place],
            progress=progress,
        )
        gone |= outcome.selection
        trainings += outcome.trainings
    every, layers = find_linears(language_model.model), linears_of(gone.groups)
    return Outcome(
        sparsity=fraction,
        pattern=recipe.pattern,
        zeros=sum(count_zeros(layer.weight) for layer in layers),
        total=sum(layer.weight.numel() for layer in layers),
        seconds=time.perf_counter() - begin,
        selection=gone,
        measure=recipe.unit.measure,
        reached=1 - parameters_left(every, gone) / staging.plan.total,
        trainings=trainings,
    )


def staging_of(language_model: LanguageModel, recipe: StagedRecipe, sparsity: float) -> Staging:
    """What the stages will do, after every check that needs no computation.

    Raises:
        PruneZeroError: as `checked_groups`, of some stage; or as `plan_of`.
    """
    groups = []
    for one in recipe.recipes:
        found = find_linears(language_model.model, targets=one.targets, ignore=one.ignore)
        groups.append(tuple(one.unit.row.groups(found, language_model, one.unit.options)))
    plan = plan_of(language_model, recipe, sparsity, groups)
    for one, share in zip(recipe.recipes, plan.shares, strict=True):
        requirements.checked_groups(language_model, one, share)
    return Staging(tuple(groups), plan)


def check_recipe(language_model: LanguageModel, recipe: AnyRecipe, sparsity: float) -> list[Linear]:
    """The layers that a recipe prunes, by all its stages, after every check before the work.

    Raises:
        PruneZeroError: as `checked_groups` and `staging_of`.
    """
    if isinstance(recipe, Recipe):
        return requirements.check_recipe(language_model, recipe, sparsity)
    groups = staging_of(language_model, recipe, sparsity).groups
    return linears_of([group for found in groups for group in found])


def refuse_unequal_widths(
    language_model: LanguageModel, recipe: AnyRecipe, sparsity: float
) -> None:
    """Refuse to make a model smaller that could not be saved or loaded then, by all stages.

    Raises:
        ModelError: as `prunezero.pruning.requirements.refuse_unequal_widths`.
    """
    if isinstance(recipe, Recipe):
        requirements.refuse_unequal_widths(language_model, recipe, sparsity)
        return
    staging = staging_of(language_model, recipe, sparsity)
    tried = Selection()
    for one, groups, share in zip(recipe.recipes, staging.groups, staging.plan.shares, strict=True):
        tried |= requirements.units_tried(one, groups, share)
    requirements.refuse_unsaveable(language_model, tried)


def edit_of(recipe: AnyRecipe) -> Edit:
    """How what a recipe removes is taken out of a model."""
    if isinstance(recipe, Recipe):
        return recipe.unit.row.edit
    return SMALLER if recipe.unit.zeros_suffice else NARROWER


def _on_what_is_left(recipe: Recipe, groups: tuple[Group, ...], gone: Selection) -> Recipe | None:
    """The recipe on parts of the model that are still there; None where it has none."""
    left = still_there(groups, gone)
    names = [layer.name for layer in linears_of(groups)]
    kept = {layer.name for layer in linears_of(left)}
    if not left:
        return None
    away = tuple(name for name in names if name not in kept)
    return recipe.model_copy(update={"ignore": (*recipe.ignore, *away)}) if away else recipe


def _refuse_without_text(recipe: StagedRecipe, text: _Text) -> None:
    """Refuse to begin without the text that some stage will ask for.

    Raises:
        RecipeError: there is none, or too little of it.
    """
    for place, one in enumerate(recipe.recipes):
        requirements.check_text(one, text.windows, text.sources)
        if place and text.windows is None and requirements.dense_sums([one]):
            raise RecipeError(
                f"recipe {recipe.name}: its stage of unit {one.unit.word} looks at the model as "
                "pruned before it, so it needs calibration text"
            )


def _seen(
    language_model: LanguageModel,
    recipe: Recipe,
    layers: list[Linear],
    windows: Tensor | None,
    progress: Progress | None,
) -> dict[str, Statistics]:
    """Sums of the model as pruned so far, gradients included, that a stage looks at."""
    sums = requirements.dense_sums([recipe])
    if not sums or windows is None:
        return {}
    return calibrate(language_model, windows, layers, sums, progress=progress)
