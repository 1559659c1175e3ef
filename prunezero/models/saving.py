"""How does a pruned model reach the disk, and how sparse is what was written?"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError
from prunezero.models.language_model import LanguageModel, quiet
from prunezero.models.shards import files_of_tensors


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
    """The folder, once it is sure that a model can be saved there; ask before long work.

    Raises:
        OutputError: it exists and is not empty, or its parent cannot be written.
    """
    try:
        path = Path(folder).expanduser()
        if path.exists() and not path.is_dir():
            raise OutputError(f"'{folder}' is a file; choose a folder that is new or empty")
        if path.is_dir() and any(path.iterdir()):
            raise OutputError(
                f"folder '{folder}' is not empty; choose a folder that is new or empty"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: the disk may be read-only, or full.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise OutputError(
            f"folder '{folder}' cannot be written ({reason}); choose another folder"
        ) from error
    return path


def save_model(
    language_model: LanguageModel, folder: str | Path, *, files: Mapping[str, str] | None = None
) -> Path:
    """Write configuration, tokenizer and safetensors, loadable by plain transformers.

    The folder appears complete or not at all. Every -0.0 in the model becomes +0.0 first, in memory
    too. Tied weights stay tied.

    Args:
        language_model: pruned or dense.
        folder: new or empty.
        files: more text files to put beside, text by file name.

    Raises:
        OutputError: the folder is not empty or cannot be written.
    """
    path = check_writable(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for parameter in language_model.model.parameters():
            # Adding +0.0 turns -0.0 into +0.0 and leaves every other number alone.
            parameter.detach().add_(0.0)
        with quiet():
            _save_network(language_model.model, unfinished)
            language_model.tokenizer.save_pretrained(unfinished)
        for name, text in (files or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        # mkdtemp makes folders that only their owner may enter.
        unfinished.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"folder '{folder}' cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _save_network(model: Any, folder: Path) -> None:
    """Weights and configuration; faults of the generation settings stop nothing."""
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        settings = getattr(model, "generation_config", None)
        if settings is None:
            raise
        # Sampling settings that transformers refuses to write say nothing about the weights.
        reason = " ".join(str(error).split())
        warnings.warn(f"generation settings are left out: {reason}", stacklevel=3)
        model.generation_config = type(settings)()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = settings


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def count_sparsity(folder: str | Path, layer_names: Iterable[str]) -> SavedSparsity:
    """Count the zeros of the named layers in the safetensors files of a folder, one by one.

    Raises:
        ModelError: the folder has no safetensors files, a file is damaged, or a layer is missing.
    """
    zeros = negative_zeros = total = 0
    for weight in _saved_weights(Path(folder), list(layer_names)):
        is_zero = weight == 0
        zeros += int(is_zero.sum())
        negative_zeros += int((is_zero & torch.signbit(weight)).sum())
        total += weight.numel()
    return SavedSparsity(zeros, negative_zeros, total)


def _saved_weights(folder: Path, layer_names: list[str]) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    files = files_of_tensors(folder)
    for layer in layer_names:
        name = f"{layer}.weight"
        if name not in files:
            raise ModelError(f"the saved model in '{folder}' has no weight '{name}'")
        path = folder / files[name]
        try:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged: weight '{name}' cannot be read ({error})"
            ) from error
