from __future__ import annotations

import numpy as np
import pytest
import torch

from prunezero.errors import StatisticsError
from prunezero.formula.feature_row import MADE_FROM
from prunezero.formula.features import features_of_domain
from prunezero.formula.vocabulary import FEATURES, SIGNALS
from prunezero.scoring.feature_values import depth_feature, feature, needed_sums
from prunezero.scoring.statistics import (
    BLOCK_SUMS,
    ROUTING_SUMS,
    SUMS,
    Statistics,
    contribution,
)

MATRIX, UNIT = features_of_domain("matrix"), features_of_domain("unit")
DEPTH = features_of_domain("block")
ATTENTION = {*features_of_domain("kv_column"), *features_of_domain("link")}
OUT, IN = 3, 2
WEIGHT = torch.tensor([[1.0, -2.0], [0.0, 4.0], [3.0, -4.0]])
# Two sequences of two tokens.
INPUTS = torch.tensor([[[1.0, 2.0], [3.0, -2.0]], [[0.0, 4.0], [2.0, 0.0]]])
GRADIENTS = (torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.5, 3.0]]), torch.full((OUT, IN), -2.0))


def filled() -> Statistics:
    statistics = Statistics.empty(SUMS, OUT, IN)
    outputs = INPUTS @ WEIGHT.T
    for place, gradient in enumerate(GRADIENTS):
        statistics.add_inputs(INPUTS[place])
        statistics.add_outputs(outputs[place])
        statistics.add_output_gradients(outputs[place] / 8, inputs=INPUTS[place])
        statistics.add_gradient(gradient)
        statistics.add_input_gradients(INPUTS[place] - 1, inputs=INPUTS[place])
    return statistics


def expected_features() -> dict[str, np.ndarray]:
    """Every feature from its definition, in numpy."""
    weight = WEIGHT.double().numpy()
    x = INPUTS.reshape(-1, IN).double().numpy()
    y = x @ weight.T
    gram = x.T @ x / 2
    inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(IN))
    g = np.stack([gradient.double().numpy() for gradient in GRADIENTS])
    return {
        "W": weight,
        "R1": np.abs(weight).sum(1, keepdims=True),
        "C1": np.abs(weight).sum(0, keepdims=True),
        "R2": np.sqrt((weight**2).sum(1, keepdims=True)),
        "C2": np.sqrt((weight**2).sum(0, keepdims=True)),
        "X": np.sqrt((x**2).sum(0, keepdims=True) / 2),
        "X_ms": (x**2).mean(0, keepdims=True),
        "X_rms": np.sqrt((x**2).mean(0, keepdims=True)),
        "X_mean": x.mean(0, keepdims=True),
        "X_var": x.var(0, keepdims=True),
        "Y": np.sqrt((y**2).sum(0)[:, None] / 2),
        "G": np.sqrt((g**2).sum(0)),
        "G1": np.abs(g).sum(0),
        "S": g.sum(0),
        "F": np.sqrt(np.einsum("to,ti->oi", (y / 8) ** 2, x**2)),
        "D": np.sqrt(((y / 8) ** 2).mean(0))[:, None],
        "H": np.diag(gram)[None],
        "V": np.diag(inverse)[None],
        "U": np.diag(np.linalg.cholesky(inverse).T)[None],
    }


# The stream behind a part of the depth, and nats per predicted token without it.
BEHIND = INPUTS.flip(2) + 1.0
LOSSES = torch.tensor([[1.0, 2.5], [4.0, 0.5]])
GIVEN = {"parameters": 12.0, "flops": 20.0, "milliseconds": 1.5, "noise": 0.25}


def expected_of_depth() -> dict[str, float]:
    """Every feature of a part of the depth from its definition, in numpy."""
    x, y = (values.double().numpy() for values in (INPUTS, BEHIND))
    cosines = (x * y).sum(2) / np.linalg.norm(x, axis=2) / np.linalg.norm(y, axis=2)
    return {
        "BI": 1 - cosines.mean(),
        "ANG": np.arccos(cosines[:, -1]).mean() / np.pi,
        "REL": (np.linalg.norm(y - x, axis=2) / np.linalg.norm(x, axis=2)).mean(),
        "NLL": 2.0,
        "KL": 0.5,
        "PARAMS": 12.0,
        "FLOPS": 20.0,
        "MS": 1.5,
        "RND": 0.25,
    }


@pytest.mark.parametrize("name", DEPTH)
def test_a_feature_of_the_depth_equals_its_definition_in_numpy(name: str) -> None:
    statistics = Statistics.empty(BLOCK_SUMS, 1, 1)
    for before, behind, losses in zip(INPUTS, BEHIND, LOSSES, strict=True):
        statistics.add(contribution("stream", behind, BLOCK_SUMS, inputs=before))
        statistics.add(contribution("losses", losses[:, None], BLOCK_SUMS))
        statistics.add(contribution("divergences", losses[:, None] / 4, BLOCK_SUMS))
    value = depth_feature(name, statistics, GIVEN)
    assert value.dtype == torch.float32 and value.shape == (1, 1)
    np.testing.assert_allclose(float(value), expected_of_depth()[name], rtol=1e-6)
    if FEATURES[name].sums:
        with pytest.raises(StatisticsError, match="was not collected"):
            depth_feature(name, None, GIVEN)


def test_every_feature_of_the_vocabulary_has_a_value_and_no_other() -> None:
    assert set(expected_features()) == set(MATRIX)
    assert set(expected_of_depth()) == set(DEPTH)
    of_experts = features_of_domain("expert")
    assert {*MATRIX, *UNIT, *DEPTH, *ATTENTION, *of_experts} == set(FEATURES)


def test_a_row_reads_the_weight_and_sums_or_the_factor_alone() -> None:
    allowed = {*MADE_FROM, *SUMS, *BLOCK_SUMS, *ROUTING_SUMS}
    for row in FEATURES.values():
        assert row.inputs == ("upper",) or {*row.inputs} <= allowed - {"upper"}, row.name
        sums = BLOCK_SUMS if "block" in row.domains else SUMS
        sums = ROUTING_SUMS if row.domains == ("expert",) else sums
        assert {*row.sums} <= {*sums} and row.cost in SIGNALS
        assert row.of_attention == (row.name in ATTENTION)
        if not row.of_attention:
            assert (row.cost == "none") == (not row.sums and not row.of_training)


@pytest.mark.parametrize("name", sorted(MATRIX))
def test_a_feature_equals_its_definition_in_numpy(name: str) -> None:
    value = feature(name, WEIGHT, filled())
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), expected_features()[name], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(MATRIX))
def test_a_feature_has_the_shape_that_the_vocabulary_says(name: str) -> None:
    shapes = {"element": (OUT, IN), "row": (OUT, 1), "column": (1, IN), "scalar": ()}
    assert tuple(feature(name, WEIGHT, filled()).shape) == shapes[FEATURES[name].shape]


@pytest.mark.parametrize("name", sorted(MATRIX))
def test_a_feature_needs_no_more_sums_than_the_vocabulary_names(name: str) -> None:
    all_sums = filled()
    some = {wanted: all_sums.sums[wanted] for wanted in FEATURES[name].sums}
    few = Statistics(all_sums.tokens, all_sums.sequences, some)
    assert torch.equal(feature(name, WEIGHT, few), feature(name, WEIGHT, all_sums))


def test_the_gram_matrix_is_the_sum_of_outer_products_over_tokens() -> None:
    x = INPUTS.reshape(-1, IN).numpy()
    np.testing.assert_allclose(filled().sums["gram"].numpy(), x.T @ x)


def test_a_batch_of_sequences_counts_like_its_sequences_one_by_one() -> None:
    at_once = Statistics.empty(["input_square_sum"], OUT, IN)
    at_once.add_inputs(INPUTS)
    assert (at_once.tokens, at_once.sequences) == (4, 2)
    assert torch.equal(feature("X", WEIGHT, at_once), feature("X", WEIGHT, filled()))


@pytest.mark.parametrize("name", sorted(SUMS))
def test_counts_are_right_whichever_sum_is_collected_alone(name: str) -> None:
    statistics = Statistics.empty([name], OUT, IN)
    for place, gradient in enumerate(GRADIENTS):
        statistics.add_inputs(INPUTS[place])
        statistics.add_outputs(INPUTS[place] @ WEIGHT.T)
        statistics.add_gradient(gradient)
    assert (statistics.tokens, statistics.sequences) == (4, 2)


def test_adding_to_statistics_from_disk_goes_on_counting() -> None:
    first = filled()
    restored = Statistics(first.tokens, first.sequences, dict(first.sums))
    restored.add_inputs(INPUTS)
    assert (restored.tokens, restored.sequences) == (8, 4)


def test_half_precision_inputs_are_summed_without_overflow() -> None:
    statistics = Statistics.empty(["input_square_sum", "gram"], OUT, IN)
    statistics.add_inputs(torch.full((1, 8, IN), 60000.0, dtype=torch.float16))
    assert statistics.sums["input_square_sum"].tolist() == [8 * 60000.0**2] * 2
    assert torch.isfinite(statistics.sums["gram"]).all()


def test_a_dead_channel_has_a_finite_norm_of_zero() -> None:
    statistics = Statistics.empty(["input_square_sum", "input_sum"], OUT, IN)
    statistics.add_inputs(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    for name in ("X", "X_rms", "X_var"):
        assert feature(name, WEIGHT, statistics)[0, 0] == 0
    assert feature("X_var", WEIGHT, statistics)[0, 1] == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_change_nothing(wrong: float) -> None:
    statistics = Statistics.empty(["input_sum"], OUT, IN)
    statistics.add_inputs(INPUTS)
    before = statistics.sums["input_sum"].clone()
    with pytest.raises(StatisticsError, match="inputs of model.layers.3.mlp.up_proj hold NaN"):
        statistics.add_inputs(torch.tensor([[wrong, 1.0]]), layer="model.layers.3.mlp.up_proj")
    assert torch.equal(statistics.sums["input_sum"], before)


def test_a_contribution_may_be_shared_by_layers_that_read_the_same_tensor() -> None:
    shared = contribution("inputs", INPUTS, ["gram", "output_square_sum"])
    assert set(shared.values) == {"gram"}
    query, key = Statistics.empty(["gram"], 3, IN), Statistics.empty(["gram"], 5, IN)
    query.add(shared)
    key.add(shared)
    assert torch.equal(query.sums["gram"], key.sums["gram"])


def test_a_missing_sum_is_named() -> None:
    with pytest.raises(StatisticsError, match="'input_square_sum' was not collected"):
        feature("X", WEIGHT, None)
    with pytest.raises(StatisticsError, match="'gradient_square_sum' was not collected"):
        feature("G", WEIGHT, Statistics.empty(["input_sum"], OUT, IN))


def test_statistics_without_a_token_are_refused() -> None:
    with pytest.raises(StatisticsError, match="saw no calibration"):
        feature("X", WEIGHT, Statistics.empty(SUMS, OUT, IN))


def test_statistics_of_another_layer_are_refused_with_both_shapes() -> None:
    with pytest.raises(StatisticsError, match=r"\[1, 2\], which does not fit .* \[4, 7\]"):
        feature("X", torch.ones(4, 7), filled())


def test_unknown_words_are_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(StatisticsError, match="did you mean 'X_mean'"):
        feature("X_meen", WEIGHT, filled())
    with pytest.raises(StatisticsError, match="did you mean 'gram'"):
        Statistics.empty(["grm"], OUT, IN)


def test_needed_sums_are_those_of_all_features_together() -> None:
    class Formula:
        features = ("W", "X")

    assert needed_sums(["W", "R1"]) == frozenset()
    assert needed_sums([Formula(), "G"]) == {"input_square_sum", "gradient_square_sum"}
    with pytest.raises(StatisticsError, match="'Q' is not a known feature"):
        needed_sums(["Q"])


def test_a_sum_over_tokens_gradients_needs_the_inputs() -> None:
    statistics = Statistics.empty(["token_gradient_square_sum"], OUT, IN)
    with pytest.raises(StatisticsError, match="output gradients of o_proj also need its inputs"):
        statistics.add_output_gradients(torch.ones(4, OUT), layer="o_proj")
