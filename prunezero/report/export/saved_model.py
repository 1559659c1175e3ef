"""A pruned model on disk: weights, card, recipe and report in one plain transformers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.source import Source
from prunezero.models.saving.companions import places_of_companions
from prunezero.models.saving.save import SavedSparsity, count_sparsity, save_model, stored_layers
from prunezero.pruning.compare import finite_row
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.streamed import FILES_BESIDE
from prunezero.pruning.testbed import Testbed
from prunezero.report.export.card import model_card
from prunezero.scoring.masking import count_zeros


def files_beside(
    language_model: LanguageModel, recipe: Recipe, rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What we put beside the weights of a pruned model, text by the names of `FILES_BESIDE`.

    Args:
        language_model: its name and source count; the card keeps the licence of that.
        rows: results of the dense and of the pruned model.
    """
    model = language_model.name
    plain = [finite_row(row) for row in rows]
    results = [{**row, "method": row["recipe"], "model": model} for row in plain]
    licence, note = _terms(language_model.source)
    return {
        "README.md": model_card(
            model,
            recipe.criterion,
            results,
            criteria=recipe.criteria,
            recipe=recipe.to_yaml(),
            license_id=licence,
            note=note,
        ),
        "recipe.yaml": recipe.to_yaml(),
        "report.json": json.dumps({"rows": plain}, indent=2, allow_nan=False) + "\n",
    }


def _terms(source: Source | None) -> tuple[str, str]:
    """The licence that the source's card names, and a line on where that card is kept."""
    places = {} if source is None else places_of_companions(source.folder, ours=FILES_BESIDE)
    if source is None or "README.md" not in places:
        return "", ""
    note = f"The card of the dense model is kept as `{places['README.md']}`; its terms hold here."
    try:
        text = (source.folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        licence = front.get("license", "")
    # Whatever somebody's card holds.
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError, RecursionError):
        licence = ""
    return (licence if isinstance(licence, str) else ""), note


def save_pruned(
    testbed: Testbed,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    layers: Sequence[Linear],
    folder: Path,
) -> SavedSparsity:
    """Save the model on the testbed, and count its zeros again from the files.

    Args:
        rows: results of the dense and of the pruned model.

    Raises:
        OutputError: the folder cannot be written, or the files do not hold what is in memory.
    """
    files = files_beside(testbed.language_model, recipe, rows)
    save_model(testbed.language_model, folder, files=files)
    saved = count_sparsity(folder, stored_layers(testbed.language_model, layers, folder))
    in_memory = sum(count_zeros(layer.weight) for layer in layers)
    if saved.zeros != in_memory or saved.negative_zeros:
        raise OutputError(
            f"{folder} holds {saved.zeros} zeros ({saved.negative_zeros} of them negative) but the "
            f"model has {in_memory}; please report this"
        )
    return saved
