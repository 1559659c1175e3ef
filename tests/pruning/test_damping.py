"""The damping of a recipe reaches every feature that looks at an inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.score import score
from tests.scoring.reference import keep_rows
from tests.tiny_models import tiny_batches, tiny_model

FORMULA = Criterion.parse("abs(W)/U")
Array = np.ndarray[Any, Any]
LAYER = "model.layers.0.self_attn.q_proj"


def diagonal_of_factor(gram: torch.Tensor, sequences: int, damping: float) -> Array:
    matrix = gram.double().numpy() / sequences
    matrix = matrix + damping * np.diag(matrix).mean() * np.eye(len(matrix))
    return np.diag(np.linalg.cholesky(np.linalg.inv(matrix)).T)


@pytest.mark.parametrize("damping", [0.01, 0.8])
@pytest.mark.parametrize("changes", [{}, {"update": "bias"}, {"compare": "model"}])
def test_a_formula_is_pruned_by_with_the_damping_of_its_recipe(
    damping: float, changes: dict[str, str]
) -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    statistics = calibrate(model, tiny_batches(), layers, needed_sums([FORMULA]) | {"input_sum"})
    dense = {layer.name: layer.weight.clone() for layer in layers}
    recipe = Recipe.model_validate(
        {"name": "it", "criterion": FORMULA, "damping": damping, **changes}
    )
    prune(model, recipe, 0.5, statistics=statistics)
    known = statistics[LAYER]
    scores = np.abs(dense[LAYER].double().numpy()) / diagonal_of_factor(
        known.sums["gram"], known.sequences, damping
    )
    weight = next(layer.weight for layer in layers if layer.name == LAYER)
    if "compare" in changes:
        every = torch.cat(
            [
                score(FORMULA, dense[name], statistics[name], damping=damping).flatten()
                for name in dense
            ]
        )
        kept = scores > float(every.sort().values[len(every) // 2 - 1])
    else:
        kept = keep_rows(scores, "0.5")
    # At the threshold of a whole model rounding decides.
    assert ((weight != 0).numpy() != kept).sum() <= 2 * (recipe.compare == "model")
