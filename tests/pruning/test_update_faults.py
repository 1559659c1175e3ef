"""What cannot be mended: numbers that are not finite, matrices without inverse, equal scores."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from prunezero.errors import FactorizationError, PruneZeroError, ScoreError, StatisticsError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from tests.pruning.test_update import BATCHES, recipe, statistics_for
from tests.tiny_models import tiny_batches, tiny_model


def test_fewer_tokens_than_inputs_are_damped_and_mended() -> None:
    model = tiny_model("llama", hidden_size=256)
    prune(model, Recipe.load("sparsegpt"), 0.5, windows=tiny_batches(4, 16))
    for layer in find_linears(model.model):
        assert bool(torch.isfinite(layer.weight).all())
        assert int((layer.weight == 0).sum()) * 2 == layer.weight.numel()


@pytest.mark.parametrize("name", ["sparsegpt", "admm", "swaps", "dsnot"])
def test_inputs_that_are_not_finite_name_the_layer_that_reads_them(name: str) -> None:
    for kind, number, reader in (
        ("q_proj", float("nan"), "o_proj"),
        ("up_proj", 1e35, "down_proj"),
    ):
        model = tiny_model("llama")
        find_linears(model.model, targets=[f"re:1.*{kind}"])[0].weight[3] = number
        with pytest.raises(StatisticsError, match=rf"layers\.1.*{reader}.* hold NaN or infinite"):
            prune(model, Recipe.load(name), 0.5, windows=BATCHES)


def with_last_weight(number: float) -> LanguageModel:
    """A model whose very last layer, which no other reads, holds a bad weight."""
    model = tiny_model("llama")
    find_linears(model.model)[-1].weight[2, 3] = number
    return model


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "choices", [{"update": "obs"}, {"update": "admm"}, {"update": "obs", "compare": "8 columns"}]
)
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_layer(
    number: float, choices: dict[str, Any]
) -> None:
    with pytest.raises(ScoreError, match=r"model\.layers\.1\.mlp\.down_proj"):
        prune(
            with_last_weight(number),
            recipe(statistics="sequential", **choices),
            0.5,
            windows=BATCHES,
        )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_bad_weight_is_refused_where_the_formula_does_not_look_at_weights(number: float) -> None:
    chosen = recipe("X", statistics="sequential", update="obs", compare="8 columns")
    with pytest.raises(PruneZeroError, match=r"model\.layers\.1\.mlp\.down_proj"):
        prune(with_last_weight(number), chosen, 0.5, windows=BATCHES)


@pytest.mark.parametrize("compare", ["layer", "8 columns"])
def test_a_formula_that_ranks_nothing_is_refused_before_and_during_a_sweep(compare: str) -> None:
    chosen = recipe("layer_max(abs(W))", compare=compare, update="obs", statistics="sequential")
    with pytest.raises(ScoreError, match=r"layers\.0.*same score"):
        prune(tiny_model(), chosen, 0.5, windows=BATCHES)


@pytest.mark.parametrize(
    "choices",
    [
        {"update": "obs"},
        {"update": "obs", "compare": "8 columns"},
        {"update": "none"},
        {"pattern": "2:4", "permute": "assignment"},
    ],
)
def test_a_gram_matrix_that_cannot_be_factored_names_its_layer(choices: dict[str, Any]) -> None:
    model = tiny_model("llama")
    chosen = recipe("W**2 / U**2", **choices)
    known = statistics_for(model, chosen)
    name = "model.layers.0.self_attn.o_proj"
    gram = known[name].sums["gram"]
    gram -= 2 * gram.diagonal().max() * torch.eye(len(gram))
    with pytest.raises(FactorizationError, match=rf"{re.escape(name)}.*not positive definite"):
        prune(model, chosen, 0.5, statistics=known)
