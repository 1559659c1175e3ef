"""Which values of units do the features of the vocabulary stand for?

A unit hands on `width` channels, which one matrix reads, its reader. Features of units follow from
the sums of the reader, cut by units, from its columns, and from what a unit costs, by the torch
text of their rows.

The four removal losses L00, L0b, Lr0 and Lrb are exact for one unit under what may follow its
removal (nothing, a bias, a least-squares refit of the columns that stay, both); Kurtic et al. 2023,
ZipLM, arXiv:2302.04089, gives the third, An et al. 2024, FLAP, arXiv:2312.11983, the second.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.errors import StatisticsError
from prunezero.formula.feature_row import UNIT_TERMS
from prunezero.formula.features import FEATURES
from prunezero.scoring.second_order import damped_inverse
from prunezero.scoring.statistics import SUMS, Statistics, sum_of
from prunezero.scoring.torch_text import feature_function

# What is measured of a group before its units are scored, and not counted.
_MEASURED = {
    "milliseconds": "how many milliseconds a unit of {} takes",
    "slope": "how far the model moves for a unit of {}",
}


@dataclass(frozen=True)
class Reader:
    """The matrix that reads what the units of a group hand on."""

    weight: Tensor
    """[out, in]: `width` neighbouring columns for each unit, from the first on"""
    statistics: Statistics | None
    """of what it read"""
    units: int
    """how many units"""
    width: int = 1
    """columns of a unit"""
    cost: Mapping[str, float] | None = None
    """of one unit, by measure"""
    group: str = ""
    """name of the group"""
    seed: int = 0
    """of the noise"""


def unit_feature(name: str, reader: Reader, *, damping: float) -> Tensor:
    """The value of a feature of units, float32 [units, 1].

    Args:
        name: a key of `FEATURES`, of the domain "unit" and of one value for each row.
        damping: share of the mean Gram diagonal that is added before an inversion, at least.

    Raises:
        StatisticsError: a sum was not collected, is empty or of another shape, or nothing can be
            inverted.
    """
    row = FEATURES[name]
    values = {read: _input(read, reader, damping) for read in row.inputs}
    value = feature_function(name)(**values)
    if value.shape != (reader.units, 1):
        raise StatisticsError(
            f"feature {name} has shape {list(value.shape)}, which does not fit {reader.units} "
            f"units of {reader.group}; the statistics belong to another layer or model"
        )
    return value.to(reader.weight.device)


def noise(group: str, units: int, seed: int) -> Tensor:
    """Numbers [units] from 0 to 1 that look random, and are the same in every run.

    Args:
        group: name of the group, whose units have other numbers than those of others.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(group.encode(), seed))
    return torch.rand(units, generator=generator)


def _input(name: str, reader: Reader, damping: float) -> Tensor | int:
    """What the torch text of a feature reads."""
    known, shape = reader.statistics, (reader.units, reader.width)
    if name in ("tokens", "sequences"):
        count: int = getattr(known, name, 0)
        if count < 1:
            raise StatisticsError(f"{reader.group} saw no calibration {name[:-1]}")
        return count
    if name == "reader":
        columns = reader.weight.detach()[:, : reader.units * reader.width]
        return columns.double().T.reshape(*shape, -1)
    if name == "noise":
        return noise(reader.group, reader.units, reader.seed)
    if name in UNIT_TERMS:
        return _term(name, reader)
    if name in ("inverse", "centred_inverse"):
        return _inverse(reader, damping, is_centred=name == "centred_inverse")
    if name in _MEASURED and name not in (reader.cost or {}):
        raise StatisticsError(f"{_MEASURED[name].format(reader.group)} is not known")
    if name not in SUMS:
        cost = (reader.cost or {}).get(name.replace("_", " "), 0.0)
        return torch.full((reader.units,), cost, dtype=torch.float64)
    value = sum_of(known, name)
    if value.shape[-1] < reader.units * reader.width:
        raise StatisticsError(
            f"the sum '{name}' of what {reader.group} hands on has {value.shape[-1]} channels, "
            f"not {reader.units * reader.width}; the statistics belong to another layer or model"
        )
    if name == "gram":
        return diagonal_blocks(value, *shape).double()
    return value[..., : reader.units * reader.width].reshape(*value.shape[:-1], *shape)


def _term(name: str, reader: Reader) -> Tensor:
    """What is known of units whose weights train, [units]."""
    known = {} if reader.statistics is None else reader.statistics.of_training
    if name not in known:
        raise StatisticsError(
            f"how the weights of units of {reader.group} move is known while they train alone; use "
            "schedule: periods"
        )
    found: Tensor = known[name]
    return found


def diagonal_blocks(matrix: Tensor, units: int, width: int) -> Tensor:
    """The parts [units, width, width] of a matrix [in, in] along its diagonal."""
    count = units * width
    parts = matrix[:count, :count].reshape(units, width, units, width)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _inverse(reader: Reader, damping: float, *, is_centred: bool) -> Tensor:
    """Blocks of the inverse of the damped Gram matrix per sequence, float64; remembered."""
    known = reader.statistics
    key = ("inverse", damping, is_centred, reader.units)
    if known is None or key not in known.memo:
        inverse = full_inverse(reader, damping, is_centred=is_centred)
        assert known is not None  # full_inverse refused it; for the type checker
        known.memo[key] = diagonal_blocks(inverse, reader.units, reader.width)
    blocks: Tensor = known.memo[key]
    return blocks


def full_inverse(reader: Reader, damping: float, *, is_centred: bool) -> Tensor:
    """The inverse of the damped Gram matrix per sequence, float64 [in, in].

    Args:
        damping: share of the mean diagonal that is added, at least.
        is_centred: whether of inputs without their mean, which a bias takes over.

    Raises:
        StatisticsError, FactorizationError: as `inverse_factor`.
    """
    gram = sum_of(reader.statistics, "gram")
    known = reader.statistics
    assert known is not None  # sum_of refused it; for the type checker
    if is_centred:
        gram = centred(gram, sum_of(known, "input_sum"), known.tokens)
    return damped_inverse(gram, damping, sequences=known.sequences, layer=reader.group)


def centred(gram: Tensor, total: Tensor, tokens: int) -> Tensor:
    """The Gram matrix [in, in] of inputs without their mean, float64.

    Args:
        total: sum of the inputs over tokens, [in].
    """
    if tokens < 1:
        raise StatisticsError("the sum 'input_sum' is empty: the layer saw no calibration token")
    return gram.double() - torch.outer(total.double(), total.double()) / tokens
