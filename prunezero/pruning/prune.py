"""Pruning, the one loop: step by step, block by block, scores become masks and mended weights.

The recipe's kind of unit (`kinds.py`) finds the groups and says which of their units stay; updates
work with the masks of weight matrices that follow, whatever the units are.

With dense statistics every layer is scored by what it saw in the dense model. With sequential
statistics each block sees what the already pruned blocks before it make of the calibration text,
as Wanda and SparseGPT do it. Gradients always come from the dense model.
"""

from __future__ import annotations

import functools
import operator
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from prunezero.models.anatomy.groups import Group, linears_of, weight_groups
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.biases import open_biases
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import clear_biases
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.source import round_as_stored
from prunezero.models.observing.calibration import FORWARD_SUMS, BlockWalk, Progress, calibrate
from prunezero.models.observing.expert_calls import warn_of_scarce
from prunezero.models.text.windows import windows_fingerprint
from prunezero.pruning.allocation import Evidence
from prunezero.pruning.budget import Budget
from prunezero.pruning.choosing import formula_of, last_what_went, selected
from prunezero.pruning.experts import OnText, chosen_experts, with_means, with_thresholds
from prunezero.pruning.in_training import InTraining
from prunezero.pruning.knowledge import with_protected
from prunezero.pruning.local_search import improved
from prunezero.pruning.outcome import Outcome, check_reached
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery.parts import Follower
from prunezero.pruning.recovery.training import TrainingReport
from prunezero.pruning.recovery.words import OfDense, known_of_dense, layers_trained
from prunezero.pruning.reordering import Reordering
from prunezero.pruning.requirements import (
    check_text,
    checked_groups,
    dense_sums,
    layer_sums,
    observed_sums,
    settled_sparsity,
)
from prunezero.pruning.slopes import with_slopes
from prunezero.pruning.stages import Stages
from prunezero.pruning.unit_scores import weight_scores
from prunezero.pruning.updates.mend import Work, mend
from prunezero.scoring.masking import count_zeros
from prunezero.scoring.second_order import forget_factors, share_gram
from prunezero.scoring.statistics import Statistics


def prune(
    language_model: LanguageModel,
    recipe: Recipe,
    sparsity: float | None = None,
    *,
    statistics: Mapping[str, Statistics] | None = None,
    windows: Tensor | None = None,
    held_out: Tensor | None = None,
    sources: Sequence[str] = (),
    of_dense: OfDense | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prune a model in place.

    Weights that are zero already count towards the sparsity like any other weight. Units that go
    become zeros too: the outcome says which, and tensors become smaller when the model is saved.
    Of channels of the residual stream only linear maps hold zeros, and no zeros stand for them: the
    model computes without them within `edit.simulated` of their kind. Directions of the stream and
    experts leave all weights as they are: the outcome alone knows them.

    Args:
        language_model: modified; after an error some of its layers may be pruned already.
        recipe: the choices; `recipe.pattern` may fix the sparsity.
        sparsity: fraction to remove; may be left out with an N:M pattern.
        statistics: sums of the dense model by layer name, those of `dense_sums([recipe])`.
        windows: calibration token ids `[count, length]`, for sequential statistics, allocations
            that look at the loss, and recovery.
        held_out: such ids that statistics have not seen, for trials; None takes `windows`.
        sources: of which source of its text each of `windows` is, by name; none of one source.
        of_dense: by `known_of_dense`, where the model is not the dense one any more.
        folder: keeps finished pruning steps and trainings, so that the same call goes on there
            after a stop; the caller deletes it. None keeps nothing.
        progress: told (what, done, total) as the work goes on.

    Raises:
        SelectionError: the sparsity, group or pattern fits no mask of some layer.
        ScoreError: the criterion gives a layer scores that rank nothing.
        StatisticsError: a sum is missing, or not finite, or a Gram matrix cannot be factored.
        ModelError: `targets` or `ignore` match nothing, or an update does not fit the model.
        RecipeError: choices that exclude each other.
        OutputError: the folder is of another request, or cannot be written.
    """
    begin = time.perf_counter()
    fraction = settled_sparsity(recipe.pattern, sparsity)
    groups = checked_groups(language_model, recipe, fraction)
    layers = linears_of(groups)
    check_text(recipe, windows, sources)
    reordering = Reordering(language_model, recipe, layers)
    if recipe.needs_biases:
        open_biases(language_model, layers)
    options = recipe.recover.options
    of_dense = of_dense or known_of_dense(language_model, options, windows, sources, progress)
    sums = {} if statistics is None else statistics
    texts = (windows, windows if held_out is None else held_out)
    job = _Job(language_model, recipe, layers, groups, reordering, sums, *texts, of_dense)
    ratios = job.run(fraction, folder, progress or (lambda what, done, total: None))
    outcome = job.outcome(fraction, time.perf_counter() - begin)
    check_reached(outcome, recipe, groups, ratios)
    return outcome


def prune_layers(
    recipe: Recipe,
    layers: Sequence[Linear],
    statistics: Mapping[str, Statistics],
    ratios: Mapping[str, float],
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Choose masks and mend weights of some layers, in place.

    Args:
        recipe: its criterion, groups and updates.
        layers: usually those of one block; neighbours that read the same inputs share their factor.
        statistics: by layer name; missing where the recipe looks at the weights alone.
        ratios: the fraction to remove by layer name.
        masks: those that are chosen already, by layer name.

    Raises:
        ScoreError, StatisticsError, SelectionError: as `mend`.
    """
    together: list[Work] = []
    for layer in layers:
        mask = None if masks is None else masks.get(layer.name)
        work = Work(recipe, layer, statistics.get(layer.name), ratios[layer.name], mask)
        if together and not _read_the_same(together[-1], work):
            _finish(together)
            together = []
        together.append(work)
    if together:
        _finish(together)


def settle(language_model: LanguageModel, layers: Sequence[Linear]) -> None:
    """Let pruned layers be, in place, what their files will hold, so that this is what is measured.

    Mended numbers are rounded to the dtype of the files, where that is narrower than the one of the
    computation; every zero among the weights becomes +0.0.
    """
    source = language_model.source
    for layer in layers:
        weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
        layer.weight.add_(0.0)
        if source is not None:
            round_as_stored(source, weight, layer.weight)
            if layer.bias is not None:
                round_as_stored(source, bias, layer.bias, like=weight)


def _read_the_same(first: Work, second: Work) -> bool:
    known = first.statistics, second.statistics
    has_mask = [work.mask is not None for work in (first, second)]
    if known[0] is None or known[1] is None or has_mask[0] != has_mask[1]:
        return False
    return share_gram(known[0], known[1])


def _finish(works: list[Work]) -> None:
    mend(works)
    for work in works:
        if work.statistics is not None:
            forget_factors(work.statistics)


@dataclass
class _Job:
    """One recipe at work on one model."""

    language_model: LanguageModel
    recipe: Recipe
    layers: list[Linear]
    groups: list[Group]
    reordering: Reordering
    dense: Mapping[str, Statistics]
    windows: Tensor | None
    held_out: Tensor | None
    of_dense: OfDense
    known: ChainMap[str, Statistics] = field(default_factory=ChainMap, init=False)
    """of the dense model and, block by block, of the model as pruned so far"""
    selection: Selection = field(default_factory=Selection, init=False)
    """units that stay, where they are rows and columns that can be taken out"""
    trainings: list[TrainingReport] = field(default_factory=list, init=False)
    """after each pruning step; those that an earlier call finished are not told again"""

    def run(self, sparsity: float, folder: Path | None, tell: Progress) -> dict[str, float]:
        """All steps of the schedule; returns the last step's sparsity by layer name."""
        recipe = self.recipe
        if "SLOPE" in recipe.features:
            assert self.held_out is not None  # check_text refused it; for the type checker
            self.groups = with_slopes(
                self.groups,
                self.language_model,
                recipe.unit.word,
                self.dense,
                self.held_out,
                progress=tell,
            )
        schedule = recipe.schedule.options
        if isinstance(schedule, Periods) and schedule.protect:
            assert self.held_out is not None  # check_text refused it; for the type checker
            known = (self.language_model, self.held_out, schedule)
            self.groups = with_protected(self.groups, *known, progress=tell)
            budget = Budget(sparsity, measure=recipe.unit.measure)
            recipe.unit.row.check(self.groups, budget, compare=recipe.compare)
        shares = recipe.schedule.row.function(sparsity, schedule)
        # Decided on the dense model, before the first step changes it.
        evidence = Evidence(
            self.dense, self.language_model, self.windows, self.recipe, self.groups, self.held_out
        )
        ratios = self._ratios(shares, evidence)
        # All layers: a permutation also moves rows of layers that are not pruned.
        every = find_linears(self.language_model.model)
        # Weights alone do not say which units stay, but to choose them anew is quick.
        is_usual = recipe.unit.is_usual
        kept = None if recipe.recover.is_usual and not is_usual else folder
        stages = Stages(kept, self._request(sparsity), every, keeps_weights=is_usual)
        if recipe.schedule.row.in_training:
            self._prune_in_training(sparsity, ratios[-1], stages.checkpoint(0), tell)
            return ratios[-1]
        for step, share in enumerate(shares):
            if step and recipe.looks_anew:
                self.dense = self._seen_anew(tell)
            if not stages.has(step, "pruned"):
                self._prune(share, ratios[step], tell)
                stages.keep(step, "pruned")
            trains = recipe.trains_after(step, len(shares))
            if trains and not stages.has(step, "tuned"):
                self._recover(step, stages.checkpoint(step), tell)
                stages.keep(step, "tuned")
        return ratios[-1]

    def outcome(self, sparsity: float, seconds: float) -> Outcome:
        """What it did to the model, once it has run."""
        return Outcome(
            sparsity,
            self.recipe.pattern,
            sum(count_zeros(layer.weight) for layer in self.layers),
            sum(layer.weight.numel() for layer in self.layers),
            seconds,
            self.selection,
            self.recipe.unit.measure,
            trainings=tuple(self.trainings),
        )

    def _ratios(self, shares: Sequence[float], evidence: Evidence) -> list[dict[str, float]]:
        """How much each layer loses after each step of the schedule."""
        if self.recipe.unit.is_usual or self.recipe.compare != "group":
            return [self._allocated(share, evidence) for share in shares]
        # Where small units make up for large ones, they do so less once a large one fits: a share
        # of what goes in the end never takes more than that.
        final = self._allocated(shares[-1], evidence)
        parts = [share / shares[-1] if shares[-1] else 1.0 for share in shares]
        return [{name: ratio * part for name, ratio in final.items()} for part in parts]

    def _allocated(self, sparsity: float, evidence: Evidence) -> dict[str, float]:
        allocate = self.recipe.allocate
        ratios: dict[str, float] = allocate.row.function(
            self.layers, sparsity, allocate.options, evidence
        )
        return ratios

    def _request(self, sparsity: float) -> dict[str, Any]:
        """Whatever the pruned weights follow from, in words and numbers."""
        mixture = self.of_dense.mixture
        return ({} if mixture is None else mixture.request) | {
            "model": self.language_model.fingerprint,
            "recipe": self.recipe.to_yaml(),
            "sparsity": sparsity,
            "text": None if self.windows is None else windows_fingerprint(self.windows),
            "held_out": None if self.held_out is None else windows_fingerprint(self.held_out),
            "device": self.language_model.device.type,
            "versions": {name: version(name) for name in ("prunezero", "torch", "transformers")},
        }

    def _recover(
        self,
        step: int,
        checkpoint: Path | None,
        tell: Progress,
        follower: Follower | None = None,
    ) -> None:
        recover = self.recipe.recover
        assert self.windows is not None  # check_text refused it; for the type checker
        layers = layers_trained(self.language_model, self.layers, recover.options)
        report = recover.row.function(
            self.language_model,
            layers,
            self.windows,
            recover.options,
            step=step,
            answers=self.of_dense.answers,
            mixture=self.of_dense.mixture,
            checkpoint=checkpoint,
            progress=tell,
            follower=follower,
        )
        self.trainings.append(report)
        settle(self.language_model, layers)

    def _prune_in_training(
        self, sparsity: float, ratios: dict[str, float], checkpoint: Path | None, tell: Progress
    ) -> None:
        """Units go while the recovery trains; the training ends with all that were to go."""
        follower = InTraining(self.recipe, self.groups, self.dense, sparsity, ratios).follower()
        self._recover(0, checkpoint, tell, follower)
        self.selection = follower.selection
        clear_biases(self.selection)

    def _prune(self, sparsity: float, ratios: dict[str, float], tell: Progress) -> None:
        """One walk over the blocks at one sparsity."""
        # What is seen on the way stands in front; the dense ones may be on disk, so none is copied.
        self.known = ChainMap({}, cast(MutableMapping[str, Statistics], self.dense))
        kind = self.recipe.unit.row
        if kind.walker or kind.domain.name == "expert":
            if kind.walker:
                self.selection = self._chosen_on_the_way(sparsity, tell)
            else:
                self.selection = self._chosen_experts(sparsity, ratios, tell)
            return
        competes_freely = self.recipe.compare == "model"
        together = self._chosen_together(sparsity, tell) if competes_freely else Selection()
        walk = self._walk()
        done = 0
        for block, members in groupby(self.groups, key=lambda group: group.block):
            groups = list(members)
            inside = linears_of(groups)
            self.known |= self._seen_by_pruned(walk, block, inside)
            self.reordering.move(block, self._score, self.known)
            selection = together.of(groups)
            for group in selection.undecided(groups):
                # All members of a group lose the same share.
                selection |= self._selected([group], ratios[group.members[0].linear.name])
            selection = improved(selection, self.recipe, self.known, before=self.selection)
            masks = selection.matrix_masks()
            prune_layers(self.recipe, inside, self.known, ratios, masks=masks)
            clear_biases(selection)
            self.selection |= selection.with_rows()
            settle(self.language_model, inside)
            if walk is not None:
                # The Gram matrices of all blocks together are larger than the model.
                for layer in inside:
                    self.known.pop(layer.name, None)
            done += len(inside)
            tell(f"layers pruned to {sparsity:.0%}", done, len(self.layers))
        if walk is not None:
            warn_of_scarce(walk.scarce)

    def _chosen_on_the_way(self, share: float, tell: Progress) -> Selection:
        """What stays where a walk through the model says what the units are; it stays dense."""
        assert self.windows is not None  # check_text refused it; for the type checker

        def choose(group: Group, seen: Statistics) -> Tensor:
            self.known[group.name] = seen
            (kept,) = self._selected([group], share).kept
            return kept

        recipe = self.recipe
        return recipe.unit.row.walk(
            self.language_model,
            self.groups,
            self.windows,
            layer_sums(recipe),
            choose,
            damping=recipe.damping,
            is_sequential=recipe.statistics == "sequential",
            progress=tell,
        )

    def _chosen_experts(
        self, share: float, ratios: Mapping[str, float], tell: Progress
    ) -> Selection:
        """What stays of mixtures, whose weights are left as they are.

        Args:
            ratios: what each mixture loses by itself, by its name, where that was tried.
        """

        def choose(groups: Sequence[Group], part: float) -> Selection:
            self._look(groups, (), tell)
            return self._selected(groups, part)

        text = OnText(self.language_model, self.windows, tell)
        if self.recipe.allocate.row.tries:
            self._look(self.groups, (), tell)
            each = (self._selected([group], ratios[group.name]) for group in self.groups)
            chosen = functools.reduce(operator.or_, each)
        else:
            chosen = chosen_experts(self.recipe, self.groups, text, share, choose)
        return with_thresholds(with_means(chosen, self.recipe, self.known), self.recipe, text)

    def _chosen_together(self, share: float, tell: Progress) -> Selection:
        """What stays where all units of the model compete."""
        kind, schedule = self.recipe.unit.row, self.recipe.schedule.row
        if schedule.chooser:
            budget = Budget(share, measure=self.recipe.unit.measure)
            chosen: Selection = schedule.choose(self.groups, self._scorer(tell), budget)
            return chosen
        if kind.observer:
            self._look(self.groups, (), tell)
        return self._selected(self.groups, share)

    def _scorer(self, tell: Progress) -> Callable[[Sequence[Group], Sequence[Group]], list[float]]:
        """Scores of groups of one unit each, on the model without others."""

        def scores_of(groups: Sequence[Group], gone: Sequence[Group]) -> list[float]:
            self._look(groups, gone, tell)
            return [float(self._scores_of(group)) for group in groups]

        return scores_of

    def _look(self, groups: Sequence[Group], gone: Sequence[Group], tell: Progress) -> None:
        """See what parts of the depth do to the model without some others."""
        sums = observed_sums(self.recipe)
        if sums:
            assert self.windows is not None  # check_text refused it; for the type checker
            look = self.recipe.unit.row.observe
            text = self.language_model, groups, self.windows
            self.known |= look(*text, sums, gone=gone, progress=tell)

    def _selected(self, groups: Sequence[Group], share: float) -> Selection:
        """What stays of groups that lose a share together, as far as it is chosen beforehand."""
        return selected(self.recipe, groups, share, self._scores_of)

    def _scores_of(self, group: Group) -> Tensor:
        scores = formula_of(self.recipe, group, self.known)
        return last_what_went(group, scores, self.selection)

    def _seen_anew(self, tell: Progress) -> dict[str, Statistics]:
        """Sums of the model as pruned so far, gradients included."""
        assert self.windows is not None  # check_text refused it; for the type checker
        needed = dense_sums([self.recipe])
        return calibrate(self.language_model, self.windows, self.layers, needed, progress=tell)

    def _score(self, layer: Linear) -> Tensor:
        """The scores of the weights of one matrix."""
        criterion = self.recipe.criterion_of(layer.name)
        (group,) = weight_groups([layer])
        return weight_scores(group, criterion, self.known, damping=self.recipe.damping)

    def _walk(self) -> BlockWalk | None:
        sums = layer_sums(self.recipe) & FORWARD_SUMS
        if self.recipe.statistics == "dense" or not sums:
            return None
        assert self.windows is not None  # check_text refused it; for the type checker
        return BlockWalk(self.language_model, self.windows)

    def _seen_by_pruned(
        self, walk: BlockWalk | None, block: int, layers: list[Linear]
    ) -> dict[str, Statistics]:
        """Statistics of one block behind already pruned ones, with the dense gradients beside."""
        if walk is None:
            return {}
        while walk.position < block:
            walk.advance(walk.position)
        seen = walk.observe(block, layers, layer_sums(self.recipe) & FORWARD_SUMS)
        for name, statistics in seen.items():
            if name in self.known:
                statistics.sums |= {
                    key: value
                    for key, value in self.known[name].sums.items()
                    if key not in FORWARD_SUMS
                }
        return seen
