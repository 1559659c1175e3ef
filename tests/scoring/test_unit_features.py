"""Features of units equal their definitions in numpy, for units of one channel and of several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import StatisticsError
from prunezero.formula.feature_row import UNIT_TERMS
from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.scoring.statistics import SUMS, Statistics
from prunezero.scoring.unit_features import Reader, unit_feature

OF_UNITS = [name for name in features_of_domain("unit") if FEATURES[name].shape == "row"]
OF_TRAINING = [name for name in OF_UNITS if FEATURES[name].of_training]
ROWS = [name for name in OF_UNITS if name not in OF_TRAINING]
OUT, IN, TOKENS, SEQUENCES = 5, 6, 24, 3
DAMPING = 0.01
COST = {"parameters": 7.0, "flops": 14.0, "kv bytes": 3.0, "milliseconds": 0.125, "slope": 0.375}
COSTS = {
    "PARAMS": "parameters",
    "FLOPS": "flops",
    "KV_BYTES": "kv bytes",
    "MS": "milliseconds",
    "SLOPE": "slope",
}

Array = np.ndarray[Any, Any]


def text(seed: int = 0) -> tuple[Array, Array]:
    """Correlated inputs with a mean, and gradients at them: [sequences, tokens, in]."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(IN, IN))
    x = generator.normal(size=(SEQUENCES, TOKENS, IN)) @ mixing + generator.normal(size=IN)
    return x, generator.normal(size=x.shape)


def reader(width: int, x: Array, e: Array) -> Reader:
    statistics = Statistics.empty(SUMS, OUT, IN)
    for inputs, gradients in zip(x, e, strict=True):
        seen = torch.from_numpy(inputs)
        statistics.add_inputs(seen)
        statistics.add_input_gradients(torch.from_numpy(gradients), inputs=seen)
    # As exact as the sums of text in float64 would be.
    rows = torch.from_numpy(x.reshape(-1, IN))
    statistics.sums["gram"] = rows.T @ rows
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(OUT, IN)))
    return Reader(weight, statistics, IN // width, width, COST, "layers.0.mlp")


def parts(values: Array, width: int) -> list[Array]:
    """The channels of each unit, along the last axis."""
    return [values[..., start : start + width] for start in range(0, IN, width)]


def lost_output(weight: Array, x: Array, unit: slice, *, refit: bool, bias: bool) -> float:
    """The squared change of outputs without a unit, per sequence, by a least-squares solver.

    Damping counts as rows of the text: the root of it on the diagonal, in the scale of the sums.
    """
    rows = x.reshape(-1, IN)
    ones = np.ones((len(rows), 1 if bias else 0))
    seen = rows - (rows.mean(0) if bias else 0)
    added = DAMPING * (seen**2).sum(0).mean() if refit else 0.0
    rows = np.concatenate([rows, np.sqrt(added) * np.eye(IN)])
    ones = np.concatenate([ones, np.zeros((IN, ones.shape[1]))])
    target = rows @ weight.T
    gone = np.zeros(IN, dtype=bool)
    gone[unit] = True
    stays = rows[:, ~gone]
    if not refit:
        target, stays = rows[:, gone] @ weight[:, gone].T, stays[:, :0]
    known = np.concatenate([stays, ones], axis=1)
    if known.shape[1]:
        target = target - known @ np.linalg.lstsq(known, target, rcond=None)[0]
    return float((target**2).sum()) / SEQUENCES


def expected(name: str, width: int, weight: Array, x: Array, e: Array) -> list[float]:
    units = range(IN // width)
    slices = [slice(unit * width, (unit + 1) * width) for unit in units]
    flat = x.reshape(-1, IN)
    losses = {
        "L00": (False, False),
        "L0b": (False, True),
        "Lr0": (True, False),
        "Lrb": (True, True),
    }
    if name in losses:
        refit, bias = losses[name]
        return [lost_output(weight, x, one, refit=refit, bias=bias) for one in slices]
    if name in COSTS:
        return [COST[COSTS[name]]] * len(units)
    # The factor on a unit is one for all its channels.
    masks = [(x * e)[..., one].sum((1, 2)) for one in slices]
    magnitudes = np.abs(x).mean(1)
    found = {
        "A": [np.sqrt((flat[:, one] ** 2).sum() / SEQUENCES) for one in slices],
        "A_mean": [flat[:, one].sum(1).mean() for one in slices],
        "A_var": [flat[:, one].var(0).sum() for one in slices],
        "A1": [np.linalg.norm(magnitudes[:, one].mean(0)) for one in slices],
        "A2": [np.linalg.norm(magnitudes[:, one]) for one in slices],
        "M": [mask.sum() for mask in masks],
        "M1": [np.abs(mask).sum() for mask in masks],
        "M2": [(mask**2).sum() for mask in masks],
    }
    return [float(value) for value in found[name]]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(set(ROWS) - {"RND"}))
def test_a_feature_of_units_equals_its_definition(name: str, width: int) -> None:
    x, e = text()
    read = reader(width, x, e)
    value = unit_feature(name, read, damping=DAMPING)
    assert value.dtype == torch.float32 and tuple(value.shape) == (IN // width, 1)
    wanted = expected(name, width, read.weight.numpy(), x, e)
    np.testing.assert_allclose(value[:, 0].numpy(), wanted, rtol=2e-6)


def test_a_feature_needs_no_more_sums_than_the_vocabulary_names() -> None:
    read = reader(2, *text())
    everything = read.statistics
    assert everything is not None
    for name in ROWS:
        some = {wanted: everything.sums[wanted] for wanted in FEATURES[name].sums}
        few = Statistics(everything.tokens, everything.sequences, some)
        alone = Reader(read.weight, few, read.units, read.width, COST, read.group)
        assert torch.equal(
            unit_feature(name, alone, damping=DAMPING), unit_feature(name, read, damping=DAMPING)
        )


def test_terms_of_units_in_training_are_read_as_they_are_handed_over() -> None:
    assert len(OF_TRAINING) == len(UNIT_TERMS)
    terms = torch.arange(15, dtype=torch.float64).reshape(5, 3)
    seen = Statistics(0, 0, {}, dict(zip(UNIT_TERMS, terms, strict=True)))
    read = Reader(torch.ones(2, 6), seen, 3, 2)
    for name, row in zip(OF_TRAINING, terms, strict=True):
        assert torch.equal(unit_feature(name, read, damping=DAMPING), row[:, None].float())
        with pytest.raises(
            StatisticsError, match="known while they train alone; use schedule: per"
        ):
            unit_feature(name, Reader(torch.ones(2, 6), None, 3, 2, group="mlp"), damping=DAMPING)


def test_losses_fall_with_what_may_make_up_for_a_unit() -> None:
    read = reader(2, *text(3))
    losses = {name: unit_feature(name, read, damping=1e-9) for name in ("L00", "L0b", "Lr0", "Lrb")}
    assert bool((losses["Lrb"] <= losses["Lr0"] * (1 + 1e-6)).all())
    assert bool((losses["Lr0"] <= losses["L00"]).all() and (losses["L0b"] <= losses["L00"]).all())


def test_random_numbers_differ_between_groups_and_not_between_runs() -> None:
    one = Reader(torch.zeros(2, 8), None, 8, group="layers.0.mlp")
    other = Reader(torch.zeros(2, 8), None, 8, group="layers.1.mlp")
    values = [unit_feature("RND", read, damping=DAMPING) for read in (one, one, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_sums_of_another_matrix_are_refused_by_name() -> None:
    read = reader(1, *text())
    with pytest.raises(
        StatisticsError, match=r"what layers\.0\.mlp hands on has 6 channels, not 8"
    ):
        unit_feature("A", Reader(read.weight, read.statistics, 8, 1, COST, read.group), damping=0.1)
    with pytest.raises(StatisticsError, match="was not collected"):
        unit_feature("M2", Reader(read.weight, None, 6), damping=0.1)
