"""Which experts of each mixture stay: all mixtures seen at once, one after another, or by subsets?

Weights are left as they are; who is gone is what routers do not choose any more. Of what is chosen
then, tokens may skip some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.expert_skipping import median_thresholds
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.subset_losses import mixture_of
from prunezero.pruning.budget import Budget
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.selecting import shares_of
from prunezero.scoring.statistics import Statistics

# What stays of groups that lose a share together, by what they do in the model as it is.
Choose = Callable[[Sequence[Group], float], Selection]


@dataclass(frozen=True)
class OnText:
    """A model and the text that experts are seen on."""

    language_model: LanguageModel
    windows: Tensor | None
    """calibration token ids [count, length]; None for formulas that need none"""
    tell: Callable[[str, int, int], None]
    """told (what, done, total) as the work goes on"""


def chosen_experts(
    recipe: Recipe, groups: Sequence[Group], text: OnText, share: float, choose: Choose
) -> Selection:
    """The experts that stay by a recipe.

    Raises:
        SelectionError, StatisticsError, ScoreError: as `select_units` and `best_subsets`.
    """
    budget = Budget(share, measure=recipe.unit.measure)
    schedule, is_sequential = recipe.schedule, recipe.statistics == "sequential"
    if schedule.row.chooser:
        chosen: Selection = schedule.row.choose(
            groups,
            text.language_model,
            text.windows,
            budget,
            schedule.options,
            is_sequential=is_sequential,
            tell=text.tell,
        )
        return chosen
    if not is_sequential:
        return choose(groups, share)
    return mixture_by_mixture(text.language_model, groups, budget, choose)


def with_means(
    selection: Selection, recipe: Recipe, statistics: Mapping[str, Statistics]
) -> Selection:
    """The same, where a recipe says so with experts that went answering their mean outputs.

    Args:
        statistics: by the name of a mixture.

    Source: MoNE, arXiv:2507.00390, whose experts that went are a constant each.
    """
    if getattr(recipe.unit.options, "instead", "others") == "others":
        return selection
    groups = []
    for group in selection.groups:
        sums = statistics[group.name].sums
        counts = sums["routed_count"].clamp(min=1.0)
        groups.append(replace(group, means=sums["expert_output_sum"] / counts[:, None]))
    return Selection(tuple(groups), selection.kept)


def with_thresholds(selection: Selection, recipe: Recipe, text: OnText) -> Selection:
    """The same, where a recipe says so with tokens that skip experts of those that stay.

    Raises:
        ModelError, TextError: as `median_thresholds`.
    """
    if getattr(recipe.unit.options, "skip", "none") == "none":
        return selection
    assert text.windows is not None  # check_text refused it; for the type checker
    layers = [mixture_of(group) for group in selection.groups]
    with without_experts(text.language_model, selection):
        found = median_thresholds(text.language_model, text.windows, layers)
    groups = (replace(group, skip_below=found[group.name]) for group in selection.groups)
    return Selection(tuple(groups), selection.kept)


def mixture_by_mixture(
    language_model: LanguageModel, groups: Sequence[Group], budget: Budget, choose: Choose
) -> Selection:
    """What stays of mixtures that are chosen in their order, each without what went before it."""
    shares, chosen = shares_of(groups, budget), Selection()
    for group in groups:
        with without_experts(language_model, chosen):
            chosen |= choose([group], shares[group.name])
    return chosen
