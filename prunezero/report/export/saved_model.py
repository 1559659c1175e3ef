"""A pruned model on disk: weights, card, recipe and report in one plain transformers folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import Linear, block_prefix
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import refuse_other_logits, sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.shards import Shards
from prunezero.models.loading.source import Source, names_in_files
from prunezero.models.saving.companions import places_of_companions
from prunezero.models.saving.save import SavedSparsity, count_sparsity, save_model, stored_layers
from prunezero.pruning.compare import finite_row
from prunezero.pruning.costs import Costs, model_costs
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.streamed import FILES_BESIDE
from prunezero.pruning.testbed import Testbed
from prunezero.report.export.card import ZEROS_TAKE_ROOM, model_card
from prunezero.scoring.masking import count_zeros


def files_beside(
    language_model: LanguageModel,
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    costs: Costs | None = None,
    *,
    dense_costs: Costs | None = None,
) -> dict[str, str]:
    """What we put beside the weights of a pruned model, text by the names of `FILES_BESIDE`.

    Args:
        language_model: its name and source count; the card keeps the licence of that.
        rows: results of the dense and of the pruned model.
        costs: what the pruned model takes; None where it is not in memory as a whole.
        dense_costs: what the dense model takes, where the pruned one is really smaller.
    """
    model = language_model.name
    plain = [finite_row(row) for row in rows]
    results = [{**row, "method": row["recipe"], "model": model} for row in plain]
    licence, note = _terms(language_model.source)
    told = {"costs": costs, "dense_costs": dense_costs}
    report = {"rows": plain} | {key: asdict(one) for key, one in told.items() if one is not None}
    return {
        "README.md": model_card(
            model,
            recipe.criterion,
            results,
            criteria=recipe.criteria,
            recipe=recipe.to_yaml(),
            license_id=licence,
            note=note,
            size=_size(costs, dense_costs),
            unit=recipe.unit.word,
        ),
        "recipe.yaml": recipe.to_yaml(),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
    }


def _size(costs: Costs | None, dense: Costs | None) -> str:
    """What pruning made of the size of a model, in a sentence or two."""
    if costs is None or dense is None:
        return ZEROS_TAKE_ROOM
    less = 1 - costs.parameters / dense.parameters
    return (
        f"This model is smaller than the dense one: {costs.parameters:,} parameters of "
        f"{dense.parameters:,} ({less:.1%} fewer), {costs.flops / 1e6:,.1f} million floating-point "
        f"operations for each token of {dense.flops / 1e6:,.1f}. It holds no zeros in the place of "
        "what went, and any version of transformers that loads the dense model loads it."
    )


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
    costs = model_costs(testbed.language_model, testbed.windows("validation")[:1])
    files = files_beside(testbed.language_model, recipe, rows, costs)
    save_model(testbed.language_model, folder, files=files)
    saved = count_sparsity(folder, stored_layers(testbed.language_model, layers, folder))
    in_memory = sum(count_zeros(layer.weight) for layer in layers)
    if saved.zeros != in_memory or saved.negative_zeros:
        raise OutputError(
            f"{folder} holds {saved.zeros} zeros ({saved.negative_zeros} of them negative) but the "
            f"model has {in_memory}; please report this"
        )
    return saved


@dataclass(frozen=True)
class SavedUnits:
    """What a folder holds of a model that is really smaller."""

    costs: Costs
    """of the saved model"""
    dense: Costs
    """of the model before"""
    stored: int
    """numbers in the files, counted there"""


def save_smaller(
    testbed: Testbed,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    smaller: Selection,
    folder: Path,
) -> SavedUnits:
    """Save the model on the testbed without the units that went, once it is sure to be the same.

    Args:
        rows: results of the dense and of the pruned model, whose units are zeros in memory.
        smaller: units that stay.

    Raises:
        ModelError: no configuration has such widths, or the smaller model computes otherwise.
        OutputError: the folder cannot be written, or the files do not hold what they should.
    """
    model = testbed.language_model
    window = testbed.windows("validation")[:1]
    dense = model_costs(model, window)
    refuse_other_logits(model, smaller, window.to(model.device))
    with sliced(model, smaller):
        costs = model_costs(model, window)
    files = files_beside(model, recipe, rows, costs, dense_costs=dense)
    save_model(model, folder, files=files, smaller=smaller)
    return SavedUnits(costs, dense, _stored(model, smaller, folder))


def _stored(model: LanguageModel, smaller: Selection, folder: Path) -> int:
    """Numbers in the files of a saved model, whose smaller tensors were looked at.

    Raises:
        OutputError: one is not of the size that it should be.
    """
    tensors = Shards(folder).tensors
    with sliced(model, smaller):
        names = names_in_files(model.model, tensors)
        inside = f"{block_prefix(model.model)}."
        for name, parameter in model.model.named_parameters():
            wanted = list(parameter.shape)
            have = list(tensors[names[name]].shape) if name in names else None
            if name.startswith(inside) and have != wanted:
                raise OutputError(
                    f"{folder} holds '{name}' with shape {have}, not {wanted}; please report this"
                )
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
