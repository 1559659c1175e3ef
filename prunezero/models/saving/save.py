"""How does a pruned model reach the disk, and how sparse is what was written?"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, PruneZeroWarning, reason
from prunezero.files.atomic import follow_umask
from prunezero.files.places import try_folder
from prunezero.models.anatomy.linears import Linear, block_prefix, find_linears
from prunezero.models.editing.biases import note_opened_biases
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slices import Slices
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel, quiet
from prunezero.models.loading.layouts import names_in_files, pieces_in_files
from prunezero.models.loading.shards import STORED_DTYPES, Shards, StoredTensor
from prunezero.models.loading.source import Source, holds, stack_of
from prunezero.models.saving.companions import copy_companions, edit_configuration
from prunezero.models.saving.expert_files import place_now, renamed_experts
from prunezero.models.saving.mirror import Mirror
from prunezero.models.saving.own_class import refuse_without_class, write_own_class
from prunezero.models.unequal.families import is_own_type


@dataclass(frozen=True)
class SavedSparsity:
    """Weights counted in the files of a saved model."""

    zeros: int
    """weights that are exactly zero, with either sign"""
    negative_zeros: int
    """those of them that are -0.0"""
    total: int
    """weights of the counted layers"""

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return self.zeros / self.total


def check_writable(folder: str | Path) -> Path:
    """The folder, once it is sure that a model can be saved there, with its parent made.

    Raises:
        OutputError: it exists and is not empty, or cannot be written.
    """
    path = try_folder(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def saved_bytes(language_model: LanguageModel) -> int:
    """Bytes that the weights of a model will take on the disk, about."""
    if language_model.source is not None:
        return language_model.source.shards.bytes
    return sum(parameter.nbytes for parameter in language_model.model.parameters())


def save_model(
    language_model: LanguageModel,
    folder: str | Path,
    *,
    files: Mapping[str, str] | None = None,
    smaller: Selection | None = None,
) -> Path:
    """Write a folder that opens wherever the model's own files opened.

    It mirrors those files: the same names, order, dtypes and metadata of tensors, and the same
    companions. A number that is still that of the file is written to its last bit, another one
    rounded once to the dtype of its file; of what was changed no zero is -0.0.

    A model that was handed over in memory has no such files: it is written by its own
    save_pretrained, after every -0.0 in it became +0.0. The folder appears complete or not at all.

    Args:
        language_model: pruned or dense.
        folder: new or empty.
        files: more text files to put beside, text by file name. A file of the source with such a
            name is kept beside as `NAME.source.ENDING`.
        smaller: units that stay; what is saved lacks the others, with smaller tensors and a
            configuration that says so, by classes of its own where layers differ (`own_class.py`).
            The model in memory keeps its size.

    Raises:
        OutputError: the folder is not empty or cannot be written.
        ModelError: the model no longer fits its files, or these are damaged; or no configuration
            has the widths that are left.
    """
    path = check_writable(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with sliced(language_model, smaller or Selection()) as slices:
            slices.refuse_faults()
            if slices.needs_own_class:
                refuse_without_class(language_model.model)
            source = language_model.source
            if source is None:
                _save_by_library(language_model, unfinished)
            else:
                _save_as_source(language_model, source, unfinished, files or {}, slices)
            model = language_model.model
            if slices.needs_own_class or is_own_type(model.config.model_type):
                write_own_class(unfinished, model, slices, language_model.tokenizer)
        for name, text in (files or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        follow_umask(unfinished)
        if path.exists():
            path.rmdir()
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"folder '{folder}' cannot be written ({reason(error, path)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _save_by_library(language_model: LanguageModel, folder: Path) -> None:
    for parameter in language_model.model.parameters():
        # Adding +0.0 turns -0.0 into +0.0 and leaves every other number alone.
        parameter.detach().add_(0.0)
    with quiet():
        _save_network(language_model.model, folder)
        language_model.tokenizer.save_pretrained(folder)


def _save_as_source(
    language_model: LanguageModel,
    source: Source,
    folder: Path,
    ours: Collection[str],
    slices: Slices,
) -> None:
    model = language_model.model
    tensors = model.state_dict()
    check_names(language_model)
    added = [*_new_biases(model, source), *_new_by_rotation(model, source, slices)]
    renamed = _renamed(model, source, slices) | renamed_experts(source, slices.cuts)
    parts = {name: cut.of for name, cut in slices.cuts.items() if name in source.names}
    made = frozenset[str]() if slices.rotation is None else slices.rotation.made
    made &= source.names.keys()
    reshaped = {
        source.names[name]: replace(
            source.shards.tensors[source.names[name]],
            shape=tuple(tensors[slices.name_now(name) or name].shape),
        )
        for name in (*parts, *made)
    }
    mirror = Mirror(
        source.shards,
        folder,
        added={one.name: one.stored for one in added},
        reshaped=reshaped,
        renamed=renamed,
    )
    mirror.begin()
    model_names = {stored: name for name, stored in source.names.items()}
    for stored, tensor in source.shards.tensors.items():
        if renamed.get(stored, stored) is None:
            continue
        if stored in source.pieces and tensor.dtype in STORED_DTYPES:
            piece = source.pieces[stored]
            place = place_now(slices.cuts.get(piece.name), piece.index)
            assert place is not None  # what goes has no name any more; for the type checker
            mirror.write(stored, source.saved_piece(stored, tensors[piece.name][place]))
        elif stored in model_names and tensor.dtype in STORED_DTYPES:
            name = model_names[stored]
            now = slices.name_now(name) or name
            if name in made:
                mirror.write(stored, source.made_anew(name, tensors[now]))
            else:
                mirror.write(stored, source.saved(name, tensors[now], parts.get(name)))
        else:
            mirror.copy(stored)
    for one in added:
        mirror.write(one.name, one.values.to(STORED_DTYPES[one.stored.dtype]) + 0.0)
    mirror.sync()
    copy_companions(source.folder, folder, ours=ours)
    note_opened_biases(model.config, folder)
    if slices.setting:
        _note_setting(model.config, slices, folder)


def _renamed(model: Any, source: Source, slices: Slices) -> dict[str, str | None]:
    """The new names of tensors in the files, by the old ones; None where one goes.

    Tensors of a block that the model does not use go with it.

    Raises:
        ModelError: blocks get other numbers, and the files call them otherwise than the model does.
    """
    if slices.shortening is None:
        names = source.names.items()
        return {stored: None for name, stored in names if slices.name_now(name) is None}
    prefix = f"{block_prefix(model)}."
    inside = {name: stored for name, stored in source.names.items() if name.startswith(prefix)}
    if all(slices.name_now(name) == name for name in inside):
        return {}
    starts = set()
    for name, stored in inside.items():
        ending = name.removeprefix(prefix)
        if not stored.endswith(ending):
            raise ModelError(
                f"the files hold '{name}' as '{stored}', so its block cannot get another number "
                "there; save the model once by its own save_pretrained, and prune that folder"
            )
        starts.add(stored.removesuffix(ending))
    found: dict[str, str | None] = {}
    for stored in source.shards.tensors:
        for start in starts:
            if stored.startswith(start):
                ending = stored.removeprefix(start)
                now = slices.name_now(prefix + ending)
                found[stored] = None if now is None else start + now.removeprefix(prefix)
    return found


def _note_setting(configuration: Any, slices: Slices, folder: Path) -> None:
    """Say in a folder's config.json how large its layers are, and change nothing else.

    Raises:
        ModelError: transformers reads something else from it.
    """
    from transformers import AutoConfig

    is_part = configuration.get_text_config() is not configuration
    told = dict(slices.setting)
    part = "text_config" if is_part else ""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A file may say the same by the words of other families.
    for word, key in configuration.get_text_config().attribute_map.items():
        if key in told and word in (raw[part] if part else raw):
            told[word] = told[key]
    if slices.shortening is not None and is_own_type(configuration.model_type):
        # Layers that are no longer there may have no settings of their own.
        told["per_layer_config"] = {str(now): own for now, own in slices.shortening.layers.items()}
    edit_configuration(folder, told, part=part)
    with quiet():
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    for key, value in slices.setting.items():
        if getattr(found, key) != value:
            raise ModelError(
                f"config.json of '{configuration.model_type}' says {key} {getattr(found, key)} "
                f"even when it is told {value}, so a smaller model cannot be saved beside it; load "
                "the model once, save it by its own save_pretrained, and prune that folder"
            )


@dataclass(frozen=True)
class _New:
    """A tensor that the files of the model lack: a bias that was opened, or made by a rotation."""

    name: str
    """in the files"""
    stored: StoredTensor
    """beside its weight, in the dtype of that"""
    values: Tensor
    """its numbers"""


def _new_biases(model: Any, source: Source) -> list[_New]:
    found = []
    for name, bias in model.named_parameters():
        weight = source.names.get(f"{name.removesuffix('.bias')}.weight", "")
        if name.endswith(".bias") and name not in source.names and weight.endswith(".weight"):
            near = source.shards.tensors[weight]
            stored = StoredTensor(near.file, near.dtype, tuple(bias.shape))
            found.append(_New(f"{weight.removesuffix('weight')}bias", stored, bias.detach()))
    return found


def _new_by_rotation(model: Any, source: Source, slices: Slices) -> list[_New]:
    """Matrices from basis to basis, and an output head that shared the table of embeddings."""
    if slices.rotation is None:
        return []
    beside = dict(slices.rotation.names)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    named = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    if named[id(head)] not in source.names:
        beside[named[id(head)]] = named[id(embeddings)]
    found = []
    for name, near in beside.items():
        place, values = source.shards.tensors[source.names[near]], model.get_parameter(name)
        # Names in the files may begin otherwise than those of the model.
        start = source.names[near].removesuffix(near) if source.names[near].endswith(near) else ""
        stored = StoredTensor(place.file, place.dtype, tuple(values.shape))
        found.append(_New(f"{start}{name}", stored, values.detach()))
    return found


def check_names(language_model: LanguageModel, *, moves: bool = False) -> None:
    """Refuse a model whose pruned layers could not be put back into its files.

    Args:
        moves: channels will change places, so that numbers cannot be compared with the files.

    Raises:
        ModelError: a layer is not one tensor of the files as it is, or the dtype of the computation
            is too narrow for what moves.
    """
    source, name = language_model.source, language_model.name
    if source is None:
        return
    for layer in find_linears(language_model.model):
        stored = source.dtype_of(f"{layer.name}.weight")
        if stored is None:
            raise ModelError(
                f"the files of model '{name}' hold '{layer.name}' in another layout than the "
                "model has it, so it cannot be put back; save it once by its own save_pretrained, "
                "and prune that folder"
            )
        if (moves or source.moved) and not holds(language_model.dtype, stored):
            is_enough = holds(torch.float32, stored)
            way = "load the model with dtype" if is_enough else "convert the source to"
            raise ModelError(
                f"the recipe moves channels of '{layer.name}', and {language_model.dtype_word} "
                f"does not hold all numbers of its files, which are {str(stored)[6:]}; {way} "
                "float32"
            )


def _save_network(model: Any, folder: Path) -> None:
    """Weights and configuration; faults of the generation settings stop nothing."""
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        settings = getattr(model, "generation_config", None)
        if settings is None:
            raise
        # Sampling settings that transformers refuses to write say nothing about the weights.
        warnings.warn(
            f"generation settings are left out: {reason(error)}", PruneZeroWarning, stacklevel=3
        )
        model.generation_config = type(settings)()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = settings


@dataclass(frozen=True)
class StoredMatrix:
    """Where files hold a weight, or a part of its rows."""

    name: str
    """of the tensor"""
    index: int | None = None
    """of the matrix in it, where it is a stack of several"""


def stored_layers(
    language_model: LanguageModel, layers: Iterable[Linear], folder: str | Path
) -> list[StoredMatrix]:
    """Where the weights of layers are in the files of a folder that the model was saved to.

    Raises:
        ModelError: the folder has no safetensors files, or a file is damaged.
    """
    source = language_model.source
    if source is None:
        shards, model = Shards(Path(folder)), language_model.model
        names = names_in_files(model, shards.tensors)
        source = Source(shards, names, pieces_in_files(model, shards.tensors))
    found = []
    for layer in layers:
        weight = f"{layer.name}.weight"
        stack, index = stack_of(weight)
        if stack in source.names:
            found.append(StoredMatrix(source.names[stack], index))
        else:
            found += [StoredMatrix(name) for name in source.stored_as(weight) or [weight]]
    return found


def count_sparsity(folder: str | Path, layers: Iterable[StoredMatrix | str]) -> SavedSparsity:
    """Count the zeros of some layers in the safetensors files of a folder, one by one.

    Args:
        layers: see `stored_layers`; or names as in the files, without the ending ".weight".

    Raises:
        ModelError: the folder has no safetensors files, a file is damaged, or a layer is missing.
    """
    zeros = negative_zeros = total = 0
    shards = Shards(Path(folder))
    matrices: dict[str, list[int | None]] = {}
    for layer in layers:
        one = StoredMatrix(f"{layer}.weight") if isinstance(layer, str) else layer
        matrices.setdefault(one.name, []).append(one.index)
    for name, indices in matrices.items():
        if name not in shards.tensors:
            raise ModelError(f"the saved model in '{folder}' has no weight '{name}'")
        stored = shards.read(name)
        for index in indices:
            weight = stored if index is None else stored[index]
            is_zero = weight == 0
            zeros += int(is_zero.sum())
            negative_zeros += int((is_zero & torch.signbit(weight)).sum())
            total += weight.numel()
    return SavedSparsity(zeros, negative_zeros, total)
