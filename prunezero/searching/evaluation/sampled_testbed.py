"""SampledTestbed: what an evaluator holds of each model and draw of calibration text."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Protocol, cast

from torch import Tensor

from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear, find_blocks, find_linears
from prunezero.models.observing.calibration import Progress
from prunezero.pruning.budget import Budget
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import observed_sums
from prunezero.pruning.slopes import with_slopes
from prunezero.pruning.testbed import Testbed
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.statistics import BLOCK_SUMS, Statistics
from prunezero.searching.experiment.task import Task
from prunezero.searching.proxies.begun_training import begin_training
from prunezero.searching.proxies.expert_samples import ExpertSamples, losses_of
from prunezero.searching.proxies.layer_error import WeightSamples
from prunezero.searching.proxies.samples import probe_of, sample_rows, stacked
from prunezero.searching.proxies.unit_samples import DISTANCE, UnitSamples

# Numbers of a formula are tried on every third layer; a Llama block has seven kinds.
_TUNED_ON = 3


class Samples(Protocol):
    """What the first two rungs look at: which parts of a model a recipe takes, how bad that is."""

    def scores(
        self, criteria: Sequence[Criterion], damping: float
    ) -> Iterator[Sequence[Tensor] | None]:
        """What `masks_under` wants to know of each formula, where it is had for many at once."""
        ...

    def masks_under(
        self,
        recipe: Recipe,
        budgets: Iterable[Budget],
        scores: Sequence[Tensor] | None = None,
    ) -> Iterator[list[Tensor]]:
        """What stays under each budget, bool."""
        ...

    def error(self, recipe: Recipe, masks: Sequence[Tensor]) -> float:
        """The share of the layers' outputs that the masks lose, 0 to about 1."""
        ...


@dataclass(frozen=True)
class SampledTestbed:
    """One model under one draw of calibration text: to prune and measure on, and to look at."""

    runner: RecipeRunner
    """prunes the model, measures what is left, and makes it dense again"""
    samples: Samples
    """for the layer error: rows of every layer, or all units"""
    tuning_samples: Samples
    """those of some layers, for many layer errors; all units"""
    probe: Samples
    """to tell masks apart: few rows of few layers, or all units"""

    @classmethod
    def of(
        cls,
        testbed: Testbed,
        sums: Iterable[str],
        task: Task,
        progress: Progress | None = None,
        *,
        runner: RecipeRunner | None = None,
    ) -> SampledTestbed:
        """Calibrate the model, or find its statistics where an earlier process left them.

        Args:
            sums: over calibration text, of every layer that is pruned.
            task: says which those are, what a formula may look at, and which may have one of their
                own.
            runner: of the same model under another draw of calibration text.

        Raises:
            TextError, StatisticsError: the text is too short, or nothing follows from it.
        """
        config = task.config
        layers = find_linears(
            testbed.language_model.model, targets=config.targets, ignore=config.ignore
        )
        statistics = testbed.statistics(layers, sums, progress)
        if runner is None:
            splits = ("search", "validation", "test")
            runner = RecipeRunner(testbed, statistics, splits=splits, also=task.objective.also)
        else:
            runner = runner.redrawn(testbed, statistics)
        if task.space.unit == "weight":
            return cls(runner, *_weights(task, layers, statistics))
        units = _units(task, testbed, layers, statistics, progress)
        return cls(runner, units, units, units)


def _weights(
    task: Task, layers: Sequence[Linear], statistics: Mapping[str, Statistics]
) -> list[Samples]:
    """Rows of all layers, of some, and few rows of few."""
    space = task.space
    samples = sample_rows(layers, statistics, space.features, dampings=dampings_of(task))
    of_some = (samples, samples[::_TUNED_ON], probe_of(samples, kinds=space.criteria))
    return [WeightSamples(stacked(one)) for one in of_some]


def dampings_of(task: Task) -> list[float]:
    """Those that the rules of a search may have, beside the usual one."""
    offered = [*task.space.choices.get("damping", ())]
    return offered + [rule.choices["damping"] for rule in task.seeds if "damping" in rule.choices]


def _units(
    task: Task,
    testbed: Testbed,
    layers: Sequence[Linear],
    statistics: Mapping[str, Statistics],
    progress: Progress | None,
) -> UnitSamples:
    """All units of the model, and of parts of the depth what the model does without each."""
    recipe = task.recipe(task.usual, "it")
    kind = recipe.unit.row
    groups = tuple(kind.groups(layers, testbed.language_model))
    seeds = map(task.recipe, task.seeds, repeat("it"))
    looked_at = {name for one in chain(task.space.examples("free"), seeds) for name in one.features}
    if "SLOPE" in looked_at.union(task.space.features):
        model, unit, text = testbed.language_model, kind.word, testbed.held_out
        groups = tuple(with_slopes(groups, model, unit, statistics, text, progress=progress))
    if task.space.training:
        begun = begin_training(testbed, recipe, groups, statistics, progress)
        statistics = _beside(statistics, begun)
    blocks = len(find_blocks(testbed.language_model.model))
    if kind.is_of_depth:
        sums = {DISTANCE, *(needed_sums(task.space.features) & BLOCK_SUMS.keys())}
        seen = kind.observe(
            testbed.language_model, groups, testbed.windows("calibration"), sums, progress=progress
        )
        statistics = _beside(statistics, seen)
    if kind.domain.name == "expert":
        return _experts(task, testbed, groups, progress)
    return UnitSamples(groups, blocks, statistics)


def _beside(
    statistics: Mapping[str, Statistics], more: Mapping[str, Statistics]
) -> Mapping[str, Statistics]:
    """Both, the second in front of the first; none is read that is not asked for."""
    return ChainMap(*(cast(MutableMapping[str, Statistics], one) for one in (more, statistics)))


def _experts(
    task: Task, testbed: Testbed, groups: tuple[Group, ...], progress: Progress | None
) -> ExpertSamples:
    """All experts of the model, what routers do to them, and what they make of some tokens."""
    model, windows = testbed.language_model, testbed.windows("calibration")
    seeds = map(task.recipe, task.seeds, repeat("it"))
    looked_at = map(observed_sums, chain(task.space.examples("free"), seeds))
    sums = needed_sums(task.space.features).union(*looked_at)
    kind = task.recipe(task.usual, "it").unit.row
    seen = kind.observe(model, groups, windows, sums, progress=progress) if sums else {}
    blocks = len(find_blocks(model.model))
    return ExpertSamples(groups, blocks, seen, losses=losses_of(model, groups, windows))
