"""A recipe whose layers are not all ranked by one formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError, RecipeError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import check_recipe, dense_sums, layer_sums
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import tiny_batches, tiny_model

BATCHES = tiny_batches(8, 24)
OWN = {"down_proj": "abs(W)*X", "k_proj": "W**2*G**2"}


def recipe(criteria: dict[str, str] | None = None, **choices: Any) -> Recipe:
    fields = {"name": "mine", "criterion": "abs(W)", "criteria": criteria or {}, **choices}
    return Recipe.model_validate(fields)


def pruned(chosen: Recipe) -> dict[str, torch.Tensor]:
    """The weights of the tiny model after it, by layer name."""
    model = tiny_model()
    layers = find_linears(model.model)
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    prune(model, chosen, 0.5, statistics=known, windows=BATCHES)
    return {layer.name: layer.weight.clone() for layer in layers}


@pytest.mark.parametrize("update", ["none", "obs", "admm"])
@pytest.mark.parametrize("choices", [{}, {"pattern": "2:4"}, {"compare": "16 columns"}])
def test_each_layer_is_pruned_as_if_its_formula_were_that_of_all(
    update: str, choices: dict[str, Any]
) -> None:
    # On dense statistics, layers know nothing of each other; k shares its sweep with q and v.
    mixed = pruned(recipe(OWN, update=update, **choices))
    alone = {
        text: pruned(recipe(criterion=text, update=update, **choices))
        for text in ("abs(W)", *OWN.values())
    }
    differing = 0
    for name, weight in mixed.items():
        own = OWN.get(name.rsplit(".", 1)[-1], "abs(W)")
        assert torch.equal(weight, alone[own][name]), name
        differing += not torch.equal(weight, alone["abs(W)"][name])
    assert differing >= 2


def test_where_all_layers_compete_the_scores_of_all_formulas_are_one_ranking() -> None:
    usual = pruned(recipe(compare="model"))
    fewer = pruned(recipe({"down_proj": "0.5*abs(W)"}, compare="model"))

    def zeros(weights: dict[str, torch.Tensor], ending: str = "") -> int:
        return sum(int((w == 0).sum()) for name, w in weights.items() if name.endswith(ending))

    assert zeros(fewer) == zeros(usual)
    assert zeros(fewer, "down_proj") > zeros(usual, "down_proj")


def test_its_file_keeps_the_formulas(tmp_path: Path) -> None:
    chosen = recipe(OWN)
    chosen.save(tmp_path / "mine.yaml")
    again = Recipe.load(tmp_path / "mine.yaml")
    assert again == chosen
    assert again.criterion_of("model.layers.0.mlp.down_proj") == Criterion.parse("abs(W)*X")
    assert again.criterion_of("model.layers.0.mlp.up_proj") == Criterion.parse("abs(W)")
    assert again.text == "abs(W); down_proj: abs(W)*X; k_proj: W**2*G**2"
    assert "criteria" not in recipe().to_yaml()


def test_it_needs_what_all_its_formulas_look_at() -> None:
    assert layer_sums(recipe()) == frozenset()
    assert layer_sums(recipe(OWN)) == {"input_square_sum", "gradient_square_sum"}
    assert recipe().signal == "none" and recipe(OWN).signal == "gradients"


def test_its_row_of_results_names_them() -> None:
    testbed = tiny_testbed()
    chosen = recipe({"down_proj": "abs(W)*X"})
    layers = find_linears(testbed.language_model.model)
    runner = RecipeRunner(testbed, testbed.statistics(layers, dense_sums([chosen])))
    row = runner.row(chosen, 0.5, ("validation",))
    assert row["formula"] == "abs(W)" and row["criteria"] == "down_proj: abs(W)*X"
    words = [criterion.complexity for criterion in chosen.formulas]
    assert row["complexity"] == sum(words) and row["signal"] == "activations"
    assert runner.dense_row(("validation",)).keys() >= {"formula", "criteria"}


@pytest.mark.parametrize(
    ("criteria", "error", "message"),
    [
        ({"down": "abs(W)*X"}, ModelError, "recipe mine: criteria: .*'down' matches no layer"),
        ({"down_proj": "W", "mlp.down_proj": "W**2"}, RecipeError, "both match layer .*down_proj"),
    ],
)
def test_formulas_of_no_layer_or_of_one_layer_twice_are_refused(
    criteria: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_recipe(tiny_model(), recipe(criteria), 0.5)


def test_one_that_ranks_nothing_in_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="criterion R1 is the same for all weights of a row"):
        recipe({"down_proj": "R1"})
    assert recipe({"down_proj": "R1"}, compare="layer").formulas[1].shape == "row"
