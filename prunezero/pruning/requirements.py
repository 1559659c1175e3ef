"""What must hold before a recipe is applied to a model, and which sums does it need?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prunezero.errors import ModelError, RecipeError, SelectionError
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import Linear, find_linears, matching
from prunezero.models.editing.biases import refuse_without_bias
from prunezero.models.editing.expert_skipping import refuse_without_choice
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import first_of_each, setting_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.walk import FORWARD_SUMS
from prunezero.models.saving.own_class import refuse_without_class
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.training_options import Training
from prunezero.pruning.recipes.word_options import Slopes
from prunezero.pruning.recovery.words import layers_trained
from prunezero.pruning.selecting import left_of, shares_of
from prunezero.pruning.timing import are_needed, with_milliseconds
from prunezero.pruning.unit_allocation import Ladder
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.request import pattern_sparsity, removed_count


def settled_sparsity(pattern: str, sparsity: float | None) -> float:
    """The fraction to remove: as asked for, or as an N:M pattern implies.

    Raises:
        SelectionError: nothing says how much to remove, or both do and disagree.
    """
    implied = pattern_sparsity(pattern)
    if sparsity is None:
        if implied is None:
            raise SelectionError("say how much to remove, for example --sparsity 0.5")
        return implied
    if implied is not None and abs(implied - sparsity) > 1e-6:
        raise SelectionError(
            f"pattern {pattern} removes exactly {implied:g} of the weights, not {sparsity:g}; "
            "leave --sparsity out or choose another pattern"
        )
    removed_count(1, sparsity)
    return sparsity


def layer_sums(recipe: Recipe) -> frozenset[str]:
    """Names of the sums of a layer that the recipe's formulas and updates look at."""
    of_formulas = needed_sums([recipe]) - observed_sums(recipe)
    return of_formulas.union(*(choice.row.sums for choice in recipe.update))


def observed_sums(recipe: Recipe) -> frozenset[str]:
    """Names of the sums that the recipe's formula looks at and no linear map has by itself."""
    of_units: frozenset[str] = getattr(recipe.unit.options, "sums", frozenset())
    return needed_sums([recipe]) | of_units if recipe.unit.row.observer else frozenset()


def dense_sums(recipes: Sequence[Recipe]) -> frozenset[str]:
    """Names of the sums over the dense model that these recipes need."""
    needed: set[str] = set()
    for recipe in recipes:
        sums = layer_sums(recipe)
        is_walked = recipe.statistics == "sequential" and not recipe.tries
        is_walked |= bool(recipe.unit.row.walker)
        needed |= sums - FORWARD_SUMS if is_walked else sums
        # Units that are observed as a whole have no linear maps to be seen.
        needed |= set() if recipe.unit.row.observer else recipe.allocate.row.sums
    return frozenset(needed)


def check_text(recipe: Recipe, windows: Tensor | None, sources: Sequence[str] = ()) -> None:
    """Refuse to begin without the calibration text that the recipe will ask for.

    Args:
        windows: calibration token ids [count, length], or None.
        sources: of each window, by name; of text of one source there may be none.

    Raises:
        RecipeError: there is none, or too little of it.
    """
    walks = recipe.statistics == "sequential" and layer_sums(recipe) & FORWARD_SUMS
    needs = [f"unit {recipe.unit.word} needs"] if recipe.unit.row.walker else []
    needs += ["sequential statistics need"] if walks else []
    needs += [f"criterion {recipe.criterion.text} needs"] if observed_sums(recipe) else []
    needs += [f"{one.arrow} {one.word} needs" for one in recipe.choices if one.row.needs_text]
    needs += ["skip: median needs"] if skips_experts(recipe) else []
    needs += ["feature SLOPE needs"] if "SLOPE" in recipe.features else []
    if recipe.looks_anew:
        needs.append("statistics that are collected anew need")
    if needs and windows is None:
        raise RecipeError(f"recipe {recipe.name}: {needs[0]} calibration text")
    wanted = recipe.allocate.options.model_dump().get("sequences", 0)
    if windows is not None and len(windows) < wanted:
        raise RecipeError(
            f"recipe {recipe.name}: allocate {recipe.allocate.word} looks at {wanted} sequences, "
            f"but the calibration text has {len(windows)}; use more text, or fewer sequences"
        )
    recover = recipe.recover
    if windows is not None and isinstance(recover.options, Training):
        fault = recover.options.fault_of_text(len(windows), sources)
        if fault:
            raise RecipeError(f"recipe {recipe.name}: recover {recover.word} {fault}")


def skips_experts(recipe: Recipe) -> bool:
    """Whether tokens skip experts of those that stay."""
    return bool(getattr(recipe.unit.options, "skip", "none") != "none")


def check_recipe(language_model: LanguageModel, recipe: Recipe, sparsity: float) -> list[Linear]:
    """The layers that a recipe prunes, after every check that needs no computation.

    Raises:
        PruneZeroError: as `checked_groups`.
    """
    return linears_of(checked_groups(language_model, recipe, sparsity))


def checked_groups(language_model: LanguageModel, recipe: Recipe, sparsity: float) -> list[Group]:
    """The groups of units that a recipe prunes, after every check that needs no computation.

    Where the recipe asks for milliseconds, they are measured first, once for a model and machine.

    Raises:
        RecipeError: choices that exclude each other, or two formulas for one layer.
        ModelError: `targets`, `ignore`, `criteria` or ratios match nothing, a bias cannot be had,
            or the model has no such units; or what they take cannot be measured.
        SelectionError: the sparsity, group or pattern fits no selection of some group.
    """
    if recipe.compare == "model" and recipe.statistics == "sequential":
        raise RecipeError(
            f"recipe {recipe.name}: compare 'model' ranks all layers before the first is pruned, "
            "so it needs statistics 'dense'"
        )
    kind = recipe.unit.row
    if kind.domain.name == "expert" and (recipe.targets or recipe.ignore):
        raise RecipeError(
            f"recipe {recipe.name}: targets and ignore choose weight matrices by name, of which "
            "experts are stacks; use protect_first and protect_last of unit: expert"
        )
    if skips_experts(recipe):
        refuse_without_choice(language_model)
    found = find_linears(language_model.model, targets=recipe.targets, ignore=recipe.ignore)
    groups = kind.groups(found, language_model, recipe.unit.options)
    if are_needed(recipe):
        groups = with_milliseconds(groups, language_model)
    budget = Budget(sparsity, measure=recipe.unit.measure, pattern=recipe.pattern)
    kind.check(groups, budget, compare=recipe.compare)
    layers = linears_of(groups)
    for pattern in recipe.allocate.options.model_dump().get("ratios", ()):
        matching(pattern, layers)
    options = recipe.allocate.options
    if isinstance(options, Slopes):
        Ladder.of(groups, sparsity, recipe.unit.measure, options.steps)
    trained = layers_trained(language_model, layers, recipe.recover.options)
    if recipe.schedule.row.in_training:
        _refuse_untrained(recipe, layers, trained)
    _refuse_two_formulas(recipe, layers)
    if recipe.statistics == "sequential" and any(map(_spans_blocks, groups)):
        raise RecipeError(
            f"recipe {recipe.name}: a {kind.word} has a part in every block, so no block is pruned "
            "before another, and it needs statistics 'dense'"
        )
    if recipe.needs_biases:
        refuse_without_bias(language_model, layers)
    return groups


def refuse_unequal_widths(language_model: LanguageModel, recipe: Recipe, sparsity: float) -> None:
    """Refuse to make a model smaller that could not be saved or loaded then.

    Where all layers compete, what stays of each is known only when all have been scored: whether
    layers may differ at all is tried on other numbers, and parts of the depth on the first block
    that may lose some.

    Raises:
        ModelError: no configuration has the widths that will be left, or so few layers, nor can
            layers have settings of their own; or the smaller model would compute otherwise.
    """
    groups = checked_groups(language_model, recipe, sparsity)
    if getattr(recipe.unit.options, "instead", "others") != "others":
        raise ModelError(
            f"recipe {recipe.name} lets experts that went answer their mean output, which no class "
            "of transformers holds, so such a model cannot be saved; leave --output out, or use "
            "instead: others"
        )
    if skips_experts(recipe):
        groups = [replace(group, skip_below=0.0) for group in groups]
    refuse_unsaveable(language_model, units_tried(recipe, groups, sparsity))


def units_tried(recipe: Recipe, groups: Sequence[Group], sparsity: float) -> Selection:
    """A selection that makes a model smaller in the way in which the recipe will.

    Raises:
        SelectionError: as `shares_of`.
    """
    if recipe.unit.row.is_of_depth:
        free = [group for group in groups if not group.is_protected]
        groups = [group for group in free if group.block == free[0].block]
        counts = dict.fromkeys((group.name for group in groups), 0)
    elif recipe.competes_freely:
        counts = {group.name: _one_less(group) for group in groups}
        # Attentions may stay whole beside others that do not.
        counts[groups[0].name] = groups[0].units
    else:
        shares = shares_of(groups, Budget(sparsity, measure=recipe.unit.measure))
        counts = {group.name: left_of(group, shares[group.name]) for group in groups}
    return first_of_each(groups, counts)


def refuse_unsaveable(language_model: LanguageModel, selection: Selection) -> None:
    """Refuse to make a model smaller by such units, where it could not be saved or loaded then.

    Raises:
        ModelError: as `refuse_unequal_widths`.
    """
    if setting_of(language_model, selection).needs_own_class:
        refuse_without_class(language_model.model)


def _spans_blocks(group: Group) -> bool:
    return len({member.linear.block for member in group.members}) > 1


def _one_less(group: Group) -> int:
    """A number of units that may stay of a group, other than in the blocks before and behind."""
    fewer = group.units - (1 + group.block % 2) * group.step
    return fewer if fewer >= group.fewest and not group.is_protected else group.units


def _refuse_untrained(recipe: Recipe, layers: Sequence[Linear], trained: Sequence[Linear]) -> None:
    """Refuse units that would go in a training that passes by a part of them."""
    names = {layer.name for layer in trained}
    for layer in layers:
        if layer.name not in names:
            raise RecipeError(
                f"recipe {recipe.name}: schedule {recipe.schedule.word} takes units out of layers "
                f"in training, and {layer.name} is not among the targets of recover "
                f"{recipe.recover.word}; leave these targets out, or widen them"
            )


def _refuse_two_formulas(recipe: Recipe, layers: Sequence[Linear]) -> None:
    taken: dict[str, str] = {}
    for pattern in recipe.criteria:
        try:
            found = sorted(matching(pattern, layers))
        except ModelError as error:
            raise ModelError(
                f"recipe {recipe.name}: criteria: {error}, of those that the recipe prunes"
            ) from error
        for name in found:
            if name in taken:
                raise RecipeError(
                    f"recipe {recipe.name}: criteria '{taken[name]}' and '{pattern}' both match "
                    f"layer {name}; leave one of them out, or make it match fewer layers"
                )
            taken[name] = pattern
