"""How many units does each group lose? Measured: by the distance to the dense model on trial.

Parts of a model are taken away in steps of equal cost, so that what one group loses less another
can lose more. What a group's steps cost by themselves is measured first; an allocation then adds
the cheapest steps. Evolution goes on from there: allocations with some steps moved are measured on
a little text, the better ones on more, and the best takes the place of its parent.

Experts are not mended, and what their mixture's output loses says how steps grow.

Functions of the recipe's words at `allocate`, for units; what they look at stands in `Evidence`.

Sources: Sieberling et al. 2024, EvoPress, arXiv:2410.14649 (level switches, staged tokens, KL);
Li et al. 2025, Tyr-the-Pruner (NeurIPS), arXiv:2503.09657 (steps of mended weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from prunezero.errors import RecipeError, SelectionError
from prunezero.models.anatomy.groups import Group
from prunezero.pruning.budget import Budget
from prunezero.pruning.expert_trials import ExpertTrials
from prunezero.pruning.trials import Trials

if TYPE_CHECKING:
    from prunezero.models.anatomy.linears import Linear
    from prunezero.pruning.allocation import Evidence
    from prunezero.pruning.recipes.word_options import Evolve, Slopes

# Steps of a group by itself whose distance is measured; that of the others follows what the outputs
# of its reader lose, which is known of every step.
_PROBED = (1, 3)
# Nats per token: a distance that is less is noise, and some are even below zero.
LEAST_DISTANCE = 1e-9
# What is believed of single costs once all are together: they differ by so much, and a measured
# allocation from their sum by so much, as fractions.
_SPREAD, _MISFIT = 0.3, 0.02
# Of offspring, those that are measured on all windows.
_BEST = 4

Steps = tuple[int, ...]


@dataclass(frozen=True)
class Ladder:
    """Steps of equal cost in which groups lose units."""

    groups: Sequence[Group]
    """those that may lose any"""
    counts: Sequence[Sequence[int]]
    """of each group, the units that have gone after 0, 1, ... steps"""
    grain: float
    """what a step costs"""
    wanted: float
    """what has to go together"""

    @classmethod
    def of(cls, groups: Sequence[Group], sparsity: float, measure: str, steps: int) -> Ladder:
        """The steps of groups that lose a share together.

        Args:
            steps: into so many the largest group is divided, or fewer where a unit is larger.

        Raises:
            SelectionError: so much cannot go.
        """
        cost = {group.name: group.cost_of(measure) for group in groups}
        total = sum(cost[group.name] * group.units for group in groups)
        open_ = [group for group in groups if not group.is_protected]
        if not open_:
            raise SelectionError("every group is protected, so nothing can go")
        largest = max(cost[group.name] * group.units for group in open_)
        turns = (cost[group.name] * _at_a_time(group) for group in open_)
        grain = max(largest / steps, *turns, 0.0)
        counts = [_counts(group, grain / cost[group.name]) for group in open_]
        wanted = float(Budget(sparsity, measure=measure).allowance(total))
        if sum(len(one) - 1 for one in counts) < math.floor(wanted / grain + 1e-9):
            raise SelectionError(
                f"{sparsity:g} of the {measure} cannot go in steps of {grain:.12g}, since some "
                "units of each group have to stay; remove less, or take more steps"
            )
        return cls(open_, counts, grain, wanted)

    @property
    def total(self) -> int:
        """Steps that have to be taken."""
        return math.floor(self.wanted / self.grain + 1e-9)

    def removed(self, taken: Steps) -> dict[str, int]:
        """Units that go after so many steps of each group, by its name."""
        rows = zip(self.groups, self.counts, taken, strict=True)
        return {group.name: counts[steps] for group, counts, steps in rows}


def first_steps(groups: Sequence[Group], measure: str, steps: int = 16) -> dict[str, int]:
    """Units that each group loses in its first step, by name; none where it has no more than stay.

    A group that is smaller than a step loses as few as it can.

    Args:
        steps: into so many the largest group is divided, or fewer where a unit is larger.
    """
    ladder = Ladder.of([replace(one, is_protected=False) for one in groups], 0.0, measure, steps)
    rows = zip(ladder.groups, ladder.counts, strict=True)
    return {
        group.name: counts[1] if len(counts) > 1 else _fewest_gone(group) for group, counts in rows
    }


def _fewest_gone(group: Group) -> int:
    """As few units as may go from a group, but for none; none where all have to stay."""
    left = (group.units - 1) // group.step * group.step
    return group.units - left if left >= max(group.fewest, 1) else 0


def _at_a_time(group: Group) -> int:
    """How many units go at least; a multiple that lets none of a group go holds up no other."""
    return group.step if group.step < group.units else group.strata


def _counts(group: Group, units: float) -> list[int]:
    """Units that are gone after each step of a group, as long as enough of them stay."""
    counts = [0]
    while True:
        gone = math.floor(len(counts) * units + 1e-9)
        gone -= -(group.units - gone) % group.step
        if group.units - gone < group.fewest or gone > group.units:
            return counts
        counts.append(max(gone, counts[-1]))


def slopes(
    layers: Sequence[Linear], sparsity: float, options: Slopes, evidence: Evidence
) -> dict[str, float]:
    """Groups whose loss moves the model less lose more, as measured for each by itself.

    Raises:
        RecipeError: the evidence has no model, text or groups.
        SelectionError: so much cannot go.
    """
    ladder = _ladder(sparsity, options.steps, evidence)
    with _trials(evidence, options.windows) as trials:
        curves = _curves(ladder, trials, options.windows)
    return _ratios(evidence, ladder, _cheapest(ladder, curves), curves)


def evolve(
    layers: Sequence[Linear], sparsity: float, options: Evolve, evidence: Evidence
) -> dict[str, float]:
    """The best of many allocations by KL to the dense model, on calibration text.

    The first is that of `slopes`. Offspring move steps between groups: at random, or as costs of
    single steps say that are fitted to all measurements so far, drawn from what is believed of
    them.

    Raises:
        RecipeError, SelectionError: as `slopes`.
    """
    ladder = _ladder(sparsity, options.steps, evidence)
    generator = np.random.default_rng(options.seed)
    with _trials(evidence, options.windows) as trials:
        curves = _curves(ladder, trials, options.first_windows)
        parent = _cheapest(ladder, curves)
        best = trials.kl(ladder.removed(parent), options.windows)
        known = {parent: trials.kl(ladder.removed(parent), options.first_windows)}
        spent = 2
        while spent < options.evaluations:
            belief = _Belief.of(curves, known)
            young: dict[Steps, float] = {}
            for _ in range(min(options.offspring, options.evaluations - spent)):
                child = _child(ladder, belief, parent, known, options.proposals, generator)
                young[child] = trials.kl(ladder.removed(child), options.first_windows)
                known[child] = young[child]
                spent += 1
            for child in sorted(young, key=young.__getitem__)[:_BEST]:
                if young[child] < known[parent] * (1 + _MISFIT) and spent < options.evaluations:
                    reached = trials.kl(ladder.removed(child), options.windows)
                    spent += 1
                    if reached < best:
                        parent, best = child, reached
    return _ratios(evidence, ladder, parent, curves)


def _ladder(sparsity: float, steps: int, evidence: Evidence) -> Ladder:
    if evidence.recipe is None or evidence.language_model is None or evidence.held_out is None:
        raise RecipeError("an allocation that is measured needs the model and calibration text")
    return Ladder.of(evidence.groups, sparsity, evidence.recipe.unit.measure, steps)


def _trials(evidence: Evidence, windows: int) -> Trials | ExpertTrials:
    assert evidence.recipe is not None and evidence.language_model is not None
    assert evidence.held_out is not None  # _ladder refused it; for the type checker
    if evidence.recipe.unit.word == "expert":
        assert evidence.windows is not None  # check_text refused it; for the type checker
        return ExpertTrials(
            evidence.language_model,
            evidence.recipe,
            evidence.groups,
            evidence.windows,
            evidence.held_out[:windows],
        )
    return Trials(
        evidence.language_model,
        evidence.recipe,
        evidence.groups,
        evidence.statistics,
        evidence.held_out[:windows],
    )


def _curves(ladder: Ladder, trials: Trials | ExpertTrials, windows: int) -> list[np.ndarray]:
    """What a group's steps cost by themselves, KL after 0, 1, ... steps of each group."""
    curves = []
    for group, counts in zip(ladder.groups, ladder.counts, strict=True):
        most = len(counts) - 1
        probed = sorted({min(step, most) for step in _PROBED} - {0})
        measured = {
            step: max(trials.kl({group.name: counts[step]}, windows), LEAST_DISTANCE)
            for step in probed
        }
        lost = [trials.lost(group.name, count) for count in counts]
        curves.append(_through(measured, np.maximum.accumulate(lost)))
    return curves


def _through(measured: Mapping[int, float], lost: np.ndarray) -> np.ndarray:
    """What each step loses, in the distances that were measured; no step is a bargain.

    Args:
        measured: distances after some steps; where these are all steps, they stand as they are.
        lost: energy of the outputs that are lost after 0, 1, ... steps, rising.
    """
    if not measured:
        return lost
    steps = np.arange(len(lost), dtype=float)
    shape = lost if lost[min(measured)] > 0 else steps
    # A power of the loss through both would carry the noise of two distances far beyond them.
    scale = math.exp(np.mean([math.log(value / shape[step]) for step, value in measured.items()]))
    curve = scale * shape
    if len(measured) == len(lost) - 1:
        curve = np.array([0.0, *(measured[step] for step in sorted(measured))])
    # Steps are taken from the cheapest on, so a later one must not cost less than those before it.
    return np.concatenate([[0.0], np.maximum.accumulate(np.diff(curve)).cumsum()])


def _cheapest(
    ladder: Ladder, curves: Sequence[np.ndarray], factors: np.ndarray | None = None
) -> Steps:
    """The steps of least cost together; each group's grow with their number, so one by one."""
    weights = np.ones(len(curves)) if factors is None else factors
    costs = [
        (float(weight * (curve[step] - curve[step - 1])), place, step)
        for place, (weight, curve) in enumerate(zip(weights, curves, strict=True))
        for step in range(1, len(curve))
    ]
    taken = [0] * len(curves)
    for _, place, _ in sorted(costs, key=lambda one: (one[0], one[2], one[1]))[: ladder.total]:
        taken[place] += 1
    return tuple(taken)


@dataclass(frozen=True)
class _Belief:
    """What is believed of factors on the curves of single groups, once all lose units together."""

    curves: Sequence[np.ndarray]
    mean: np.ndarray
    root: np.ndarray
    """of the covariance of the factors"""

    @classmethod
    def of(cls, curves: Sequence[np.ndarray], known: Mapping[Steps, float]) -> _Belief:
        """By Bayesian linear regression of all measurements on the costs of single groups."""
        alone = np.array(
            [[curve[k] for curve, k in zip(curves, one, strict=True)] for one in known]
        )
        reached = np.array(list(known.values()))
        scale = float(np.median(reached / np.maximum(alone.sum(1), 1e-12)))
        spread, noise = _SPREAD * scale, _MISFIT * float(np.median(reached))
        precision = alone.T @ alone / noise**2 + np.eye(len(curves)) / spread**2
        covariance = np.linalg.inv(precision)
        mean = scale + covariance @ (alone.T @ (reached - scale * alone.sum(1))) / noise**2
        return cls(curves, mean, np.linalg.cholesky((covariance + covariance.T) / 2))

    def drawn(self, generator: np.random.Generator) -> np.ndarray:
        """Factors that may be the true ones."""
        drawn = self.mean + self.root @ generator.normal(size=len(self.mean))
        return np.maximum(drawn, 0.05 * abs(float(self.mean.mean())))


def _child(
    ladder: Ladder,
    belief: _Belief,
    parent: Steps,
    known: Mapping[Steps, float],
    proposals: str,
    generator: np.random.Generator,
) -> Steps:
    """An allocation that was not measured yet."""
    for tries in range(100):
        if proposals == "fitted" and generator.random() < 0.8 and tries < 20:
            child = _cheapest(ladder, belief.curves, belief.drawn(generator))
        else:
            child = _switched(ladder, parent, int(generator.integers(1, 4)), generator)
        if child not in known:
            return child
    return child


def _switched(
    ladder: Ladder, parent: Steps, switches: int, generator: np.random.Generator
) -> Steps:
    """The parent with some steps moved from one group to another."""
    taken = list(parent)
    for _ in range(switches):
        givers = [place for place, steps in enumerate(taken) if steps > 0]
        takers = [
            place for place, steps in enumerate(taken) if steps < len(ladder.counts[place]) - 1
        ]
        if givers and takers:
            taken[int(generator.choice(givers))] -= 1
            taken[int(generator.choice(takers))] += 1
    return tuple(taken)


def _ratios(
    evidence: Evidence, ladder: Ladder, taken: Steps, curves: Sequence[np.ndarray]
) -> dict[str, float]:
    """The share of its units that each group loses, by its name and those of its linear maps."""
    removed = dict.fromkeys((group.name for group in evidence.groups), 0)
    removed |= ladder.removed(taken)
    _fill(ladder, taken, curves, removed, evidence)
    ratios = {}
    for group in evidence.groups:
        # Half a unit more, which is rounded down again: no share of binary digits loses one.
        share = (removed[group.name] + 0.5) / group.units if removed[group.name] else 0.0
        for name in (group.name, *(member.linear.name for member in group.members)):
            ratios[name] = min(share, 1.0)
    return ratios


def _fill(
    ladder: Ladder,
    taken: Steps,
    curves: Sequence[np.ndarray],
    removed: dict[str, int],
    evidence: Evidence,
) -> None:
    """Take what is less than a step from the groups whose next one is cheapest."""
    assert evidence.recipe is not None  # _ladder refused it; for the type checker
    measure = evidence.recipe.unit.measure
    gone = sum(group.cost_of(measure) * removed[group.name] for group in ladder.groups)
    rows = zip(ladder.groups, curves, taken, strict=True)
    following = [
        (float(curve[steps + 1] - curve[steps]), group)
        for group, curve, steps in rows
        if steps + 1 < len(curve)
    ]
    for _, group in sorted(following, key=lambda one: one[0]):
        count = math.floor((ladder.wanted - gone) / group.cost_of(measure) + 1e-9)
        count = min(count, group.units - group.fewest - removed[group.name])
        count -= count % group.step
        if count > 0:
            removed[group.name] += count
            gone += count * group.cost_of(measure)
