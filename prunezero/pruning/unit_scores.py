"""How much each unit of a group matters: one function for each domain of formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prunezero.errors import ScoreError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.models.anatomy.groups import Group, Member
from prunezero.pruning.recipes.unit_options import Channels, Depth, Directions, Experts, Units
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.rescoring import reader_of, rescored
from prunezero.scoring.expert_features import Mixture, expert_feature
from prunezero.scoring.feature_values import feature
from prunezero.scoring.score import refuse_unusable, score, score_depth, score_units
from prunezero.scoring.statistics import Statistics
from prunezero.scoring.tables import Tables
from prunezero.scoring.unit_features import Reader, noise, unit_feature

# How scores along the first axis become one: of several matrices [members, units], or of the
# channels of each unit [channels, units].
COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "product": lambda scores: scores.prod(0),
    "l2": lambda scores: scores.square().sum(0).sqrt(),
}
# What makes the scores [units] of several groups comparable.
NORMALISE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "zscore": lambda scores: (scores - scores.mean()) / scores.std(correction=0),
    "mean": lambda scores: scores / scores.mean(),
    "l2": lambda scores: scores / scores.square().sum().sqrt(),
    "max": lambda scores: scores / scores.abs().max(),
}

# The sum by which super experts are known.
_LARGEST = "largest_activations"


def _comparable(scores: Tensor, group: Group, options: Units) -> Tensor:
    """The scores [units] of a group, made comparable with those of others."""
    if options.normalise != "slope":
        return NORMALISE[options.normalise](scores)
    if "slope" not in group.cost:
        raise StatisticsError("how far the model moves when the first units go is not known")
    if not group.first:
        # Nothing may go there.
        return torch.full_like(scores, torch.finfo(scores.dtype).max)
    lowest = scores.double().sort().values[: group.first].mean()
    # Scores that are no sizes, or of which the lowest are nothing, cannot be stretched.
    scale = group.cost["slope"] / lowest if lowest > 0 else lowest * math.inf
    return (scores * (scale / group.cost_of(options.measure))).to(scores.dtype)


def weight_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Options | None = None,
    tables: Tables | None = None,
) -> Tensor:
    """The scores [out, in] of single weights: their group is one matrix.

    Raises:
        ScoreError, StatisticsError: as `score`.
    """
    linear = group.members[0].linear
    known = statistics.get(linear.name)
    return score(criterion, linear.weight, known, damping=damping, layer=linear.name)


def row_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Units,
    tables: Tables | None = None,
) -> Tensor:
    """The scores [units] of units that are rows and columns of several matrices.

    Each matrix that is asked about is scored by itself, turned so that units are rows, or each of
    their channels where the options reduce those; what a unit hands on is what its reader saw.

    Raises:
        ScoreError, StatisticsError: as `score_units` and `unit_feature`; or nothing can be
            normalised.
    """
    try:
        normalised = _normalised(group, criterion, statistics, damping, options, tables)
    except StatisticsError as error:
        raise type(error)(f"{group.name}: {error}") from error
    if not bool(torch.isfinite(normalised).all()):
        raise ScoreError(
            f"criterion {criterion.text}: the scores of {group.name} cannot be normalised by "
            f"{options.normalise}; use another word at normalise"
        )
    return normalised


def _normalised(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    damping: float,
    options: Units,
    tables: Tables | None,
) -> Tensor:
    """The scores [units] of a group, made comparable."""
    if options.rescore:
        found = rescored(group, criterion, statistics, damping=damping, at_once=options.rescore)
        return _comparable(found, group, options)
    scores = [
        _member_scores(group, member, criterion, statistics, damping, options, tables)
        for member in group.members
        if _is_asked(member, options.members)
    ]
    # One by itself keeps all its bits.
    found = scores[0] if len(scores) == 1 else COMBINE[options.combine](torch.stack(scores))
    return _comparable(found, group, options)


def _member_scores(
    group: Group,
    member: Member,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    damping: float,
    options: Units,
    tables: Tables | None,
) -> Tensor:
    """The scores [units] by one matrix."""
    by_channel = options.channels != "whole" and member.width > 1
    reader = replace(reader_of(group, statistics), seed=options.seed)
    if by_channel:
        member = replace(member, units=member.units * member.width, width=1)
        reader = replace(reader, units=reader.units * reader.width, width=1)
    of_units = [name for name in criterion.features if FEATURES[name].shape != "element"]
    if by_channel and of_units and reader.units != member.units:
        raise StatisticsError(
            f"criterion {criterion.text}: '{member.linear.name}' makes {member.units} channels "
            f"of {group.name}, and {reader.units} are read, so {of_units[0]} says nothing of each; "
            "use members: consumer, or channels: whole"
        )
    scores = _scored(
        criterion, member, reader, statistics, damping, tables, name=group.name, kind=group.called
    )
    return COMBINE[options.channels](scores.reshape(group.units, -1).T) if by_channel else scores


def _scored(
    criterion: Criterion,
    member: Member,
    reader: Reader,
    statistics: Mapping[str, Statistics],
    damping: float,
    tables: Tables | None,
    *,
    name: str,
    kind: str,
) -> Tensor:
    """The scores [units] by one matrix, of whose weights and of whose reader the formula is.

    Args:
        name: what faults are told of.
        kind: what a unit is called there.
    """
    weight, known = member.linear.weight, statistics.get(member.linear.name)

    def value(of: str) -> Tensor:
        if FEATURES[of].shape == "element":
            return member.oriented(feature(of, weight, known, damping=damping))
        return unit_feature(of, reader, damping=damping)

    part = member.oriented(weight)
    if tables is None:
        values = {of: value(of) for of in criterion.features}
        return score_units(criterion, part, values, group=name, kind=kind)
    # Several members may lie in one fused matrix.
    place = (member.linear.name, member.start, reader.units, reader.seed, damping)
    scores = tables.value(criterion, place, value)
    refuse_unusable(scores, criterion, part, name, kind=kind)
    return scores[:, 0]


def channel_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Channels,
    tables: Tables | None = None,
) -> Tensor:
    """The scores [channels] of the residual stream, by the matrices on it.

    What a channel hands on is what matrices that read it saw: the output of a norm.

    Raises:
        ScoreError, StatisticsError: as `score_units` and `unit_feature`.
    """
    chosen = [member for member in group.members if _is_on_stream(member, options.members)]
    scores = [
        _channel_scores(group, member, criterion, statistics, damping, options.seed, tables)
        for member in chosen
    ]
    return scores[0] if len(scores) == 1 else COMBINE[options.combine](torch.stack(scores))


def _is_on_stream(member: Member, word: str) -> bool:
    if word == "inputs":
        return member.role == "consumer" and not member.is_again
    return word == "all" or word == {"consumer": "readers", "producer": "writers"}[member.role]


def _channel_scores(
    group: Group,
    member: Member,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    damping: float,
    seed: int,
    tables: Tables | None,
) -> Tensor:
    """The scores [channels] by one matrix."""
    linear = member.linear
    known = statistics.get(linear.name)
    reader = Reader(linear.weight, known, member.units, 1, group.cost, group.name, seed)
    return _scored(
        criterion, member, reader, statistics, damping, tables, name=linear.name, kind=group.kind
    )


def direction_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Directions,
    tables: Tables | None = None,
) -> Tensor:
    """The scores [directions] of the residual stream in one place.

    What a direction hands on is what the norm there makes of the stream along it: the square of `A`
    is its eigenvalue, a sequence.

    Raises:
        ScoreError, StatisticsError: as `score_units` and `unit_feature`.
    """
    known, member = statistics.get(group.name), group.members[0]
    weight = member.linear.weight
    reader = Reader(weight, known, group.units, 1, group.cost, group.name, options.seed)
    return _scored(
        criterion, member, reader, statistics, damping, tables, name=group.name, kind=group.kind
    )


def depth_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Depth,
    tables: Tables | None = None,
) -> Tensor:
    """The score [1] of one part of the depth.

    Raises:
        ScoreError, StatisticsError: as `score_depth`.
    """
    given = {**group.cost, "noise": float(noise(group.name, 1, options.seed))}
    if "MS" in criterion.features and "milliseconds" not in given:
        raise StatisticsError(f"how many milliseconds {group.name} takes is not known")
    known = statistics.get(group.name)
    return score_depth(criterion, known, given, group=group.name, kind=group.kind)


def expert_scores(
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    *,
    damping: float,
    options: Experts,
    tables: Tables | None = None,
) -> Tensor:
    """The scores [experts] of one mixture.

    Raises:
        ScoreError, StatisticsError: as `score_units` and `expert_feature`.
    """
    layer = group.mixture
    assert layer is not None  # groups of experts have one; for the type checker
    weights = {"up": layer.up, "down": layer.down, "router": layer.router_weight}
    known = statistics.get(group.name)
    mixture = Mixture(weights, known, group.cost, group.name, options.seed)
    values = {name: expert_feature(name, mixture) for name in criterion.features}
    scores = score_units(criterion, layer.router_weight, values, group=group.name, kind=group.kind)
    if options.guard == "none":
        return scores
    # Beside mixtures may stand linear maps, where other recipes look at those.
    seen = {name: one.sums for name, one in statistics.items() if _LARGEST in one.sums}
    guarded = is_super(group.name, {name: sums[_LARGEST] for name, sums in seen.items()})
    return scores.masked_fill(guarded.to(scores.device), torch.finfo(scores.dtype).max)


def is_super(name: str, largest: Mapping[str, Tensor]) -> Tensor:
    """Which experts of a mixture are super experts, bool [experts].

    Args:
        name: of the mixture.
        largest: the largest activations [sequences, experts] of all mixtures, in the order of the
            model.

    Source: Lasby et al. 2025, REAP, arXiv:2510.13999.
    """
    peaks = {key: values.amax(0) for key, values in largest.items()}
    every = torch.cat(list(peaks.values()))
    bound = torch.maximum(every.quantile(0.995), every.max() / 10)
    is_early = list(peaks).index(name) < 0.75 * len(peaks)
    return (peaks[name] > bound) & is_early


def _is_asked(member: Member, word: str) -> bool:
    return word == "all" or word == {"consumer": "consumer", "producer": "producers"}[member.role]
