"""A pruned model on disk: weights, card, recipe and report in one plain transformers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunezero.errors import OutputError
from prunezero.models.saving import SavedSparsity, count_sparsity, save_model, stored_layers
from prunezero.models.units import Layer
from prunezero.pruning.bench import Bench
from prunezero.pruning.compare import finite_row
from prunezero.pruning.recipe import Recipe
from prunezero.report.card import model_card
from prunezero.scoring.masking import count_zeros


def companions(model: str, recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What stands beside the weights of a pruned model, text by file name.

    Args:
        model: the dense model's name, as the user wrote it.
        rows: results of the dense and of the pruned model.
    """
    plain = [finite_row(row) for row in rows]
    results = [{**row, "method": row["recipe"], "model": model} for row in plain]
    return {
        "README.md": model_card(
            model, recipe.criterion, results, criteria=recipe.criteria, recipe=recipe.to_yaml()
        ),
        "recipe.yaml": recipe.to_yaml(),
        "report.json": json.dumps({"rows": plain}, indent=2, allow_nan=False) + "\n",
    }


def save_pruned(
    bench: Bench,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    layers: Sequence[Layer],
    folder: Path,
) -> SavedSparsity:
    """Save the model on the bench, and count its zeros again from the files.

    Args:
        rows: results of the dense and of the pruned model.

    Raises:
        OutputError: the folder cannot be written, or the files do not hold what is in memory.
    """
    files = companions(bench.language_model.name, recipe, rows)
    save_model(bench.language_model, folder, files=files)
    saved = count_sparsity(folder, stored_layers(bench.language_model, layers, folder))
    in_memory = sum(count_zeros(layer.weight) for layer in layers)
    if saved.zeros != in_memory or saved.negative_zeros:
        raise OutputError(
            f"{folder} holds {saved.zeros} zeros ({saved.negative_zeros} of them negative) but the "
            f"model has {in_memory}; please report this"
        )
    return saved
