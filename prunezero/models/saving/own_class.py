"""How is a model saved whose layers differ, so that plain transformers loads it?

Beside the weights stand config.json with the sizes of single layers, and the two Python files of
the classes that read it, or three where the residual stream has several bases or the model has
mixtures of experts; `trust_remote_code=True` loads such a folder. The type of the model has a name
of its own, for the usual class of transformers would build all layers at full size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import block_prefix
from prunezero.models.editing.slices import Slices
from prunezero.models.saving.companions import edit_configuration
from prunezero.models.unequal.families import (
    PREFIX,
    class_files,
    is_own_type,
    own_settings,
    parts_of,
    register,
    usual_type,
)


def refuse_without_class(model: Any) -> None:
    """Refuse a model whose layers differ and for which no class of its own can be written.

    Raises:
        ModelError: it is part of a larger model, of a type without a usual class, or calls its
            layers by an unusual name.
    """
    from transformers import CONFIG_MAPPING

    kind = usual_type(model.config.model_type)
    register(f"{PREFIX}{kind}")
    is_part = model.config.get_text_config() is not model.config
    is_odd = block_prefix(model).rpartition(".")[2] != parts_of(kind).layer_list
    if is_part or is_odd or f"{PREFIX}{kind}" not in CONFIG_MAPPING:
        raise ModelError(
            f"layers of this {type(model).__name__} would differ in size, and no class of its own "
            f"can be written for type '{kind}'; keep tensors at full size, with zeros (--padded), "
            "or choose compare: group without targets"
        )


def write_own_class(folder: Path, model: Any, slices: Slices, tokenizer: Any) -> None:
    """Make a saved folder one whose layers have settings of their own.

    Args:
        folder: with weights, config.json and tokenizer.
        model: at full size.
        slices: its `layers` are what single layers have, its `own` what all have.
        tokenizer: whose class is noted where its own files do not name it.

    Raises:
        ModelError: as `refuse_without_class`.
        OSError: a file cannot be read or written.
    """
    refuse_without_class(model)
    model_type = f"{PREFIX}{usual_type(model.config.model_type)}"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changes = {**own_settings(model_type), **slices.own}
    plan = slices.shortening
    before = (settings.get("per_layer_config") or {}) if plan is None else plan.layers
    changes["per_layer_config"] = _merged(before, slices.layers)
    if slices.head_size is not None:
        changes["head_dim"] = slices.head_size
    if not _names_tokenizer(folder):
        changes["tokenizer_class"] = type(tokenizer).__name__
    edit_configuration(folder, changes)
    write_class_files(folder)


def write_class_files(folder: Path) -> None:
    """Put the Python files of its classes into a folder whose layers differ; else do nothing.

    Raises:
        OSError: a file cannot be read or written.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_own_type(told.get("model_type")):
        is_rotated = bool(told.get("rotated"))
        for name, text in class_files(told["model_type"], is_rotated=is_rotated).items():
            (folder / name).write_text(text, encoding="utf-8")


def _merged(
    before: Mapping[Any, Mapping[str, Any]], layers: Mapping[int, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Settings of single layers, those that an earlier pruning left among them."""
    known = {int(key): dict(one) for key, one in before.items()}
    for index, changes in layers.items():
        own = known.setdefault(index, {})
        skip = sorted({*own.get("skip", ()), *changes.get("skip", ())})
        known[index] = {**own, **changes, **({"skip": skip} if skip else {})}
    return {str(index): known[index] for index in sorted(known)}


def _names_tokenizer(folder: Path) -> bool:
    try:
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(told.get("tokenizer_class"))
