"""Which sums over the dense model are already on disk?

One folder per model and text, in it one safetensors file per sum with the tensors of all layers,
so that a criterion that needs one more sum collects just that one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunezero.errors import StatisticsError, reason
from prunezero.models.language_model import LanguageModel
from prunezero.models.units import Layer
from prunezero.scoring.statistics import SUMS, Statistics

# Raise it when a sum changes its meaning: older files are then never read.
FORMAT_VERSION = 1
DEFAULT_LIMIT_GIB = 8.0


def cache_folder(
    cache: Path,
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Layer],
    text_fingerprint: str,
) -> Path:
    """The folder for these sums: its name changes with whatever could change one of them."""
    import transformers

    ids = batches.cpu().contiguous().numpy().tobytes()
    parts = [
        language_model.fingerprint,
        str(language_model.dtype),
        language_model.device.type,
        text_fingerprint,
        str(tuple(batches.shape)),
        hashlib.blake2b(ids, digest_size=16).hexdigest(),
        *(f"{layer.name} {tuple(layer.weight.shape)}" for layer in layers),
        torch.__version__,
        transformers.__version__,
        str(FORMAT_VERSION),
    ]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return cache / "statistics" / key


def read_sums(
    folder: Path, layers: Sequence[Layer], names: frozenset[str]
) -> dict[str, dict[str, Statistics]]:
    """The named sums that the folder holds: statistics by sum name, then by layer name.

    A file that cannot be read is collected anew, with a warning.

    Raises:
        StatisticsError: a file can be read but is of other layers or shapes.
    """
    found: dict[str, dict[str, Statistics]] = {}
    for name in sorted(names):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            continue
        try:
            found[name] = _read(path, name, layers)
        except StatisticsError:
            raise
        # Whatever a damaged file makes a reader do.
        except Exception as error:
            warnings.warn(f"{path} is damaged and is made anew ({reason(error)})", stacklevel=3)
    if found:
        os.utime(folder)
    return found


def _read(path: Path, name: str, layers: Sequence[Layer]) -> dict[str, Statistics]:
    from safetensors import safe_open

    statistics = {}
    with safe_open(path, framework="pt") as file:
        counts = json.loads(file.metadata()["counts"])
        stored = set(file.keys())
        for layer in layers:
            if layer.name not in stored or layer.name not in counts:
                raise _refusal(path, f"has no tensor '{layer.name}'")
            size = dict(zip(("out", "in"), layer.weight.shape, strict=True))
            shape = [size[axis] for axis in SUMS[name].shape]
            tensor = file.get_tensor(layer.name)
            if list(tensor.shape) != shape or tensor.dtype != SUMS[name].dtype:
                have = f"{tensor.dtype} {list(tensor.shape)}"
                want = f"{SUMS[name].dtype} {shape}"
                raise _refusal(path, f"holds tensor '{layer.name}' as {have} instead of {want}")
            if not bool(torch.isfinite(tensor).all()):
                raise _refusal(path, f"holds NaN or infinite numbers in tensor '{layer.name}'")
            tokens, sequences = counts[layer.name]
            on_device = tensor.to(layer.weight.device)
            statistics[layer.name] = Statistics(tokens, sequences, {name: on_device})
    return statistics


def _refusal(path: Path, fault: str) -> StatisticsError:
    return StatisticsError(f"{path} {fault}; it belongs to another model, delete it and run again")


def write_sums(folder: Path, statistics: Mapping[str, Statistics], names: frozenset[str]) -> None:
    """Write one file per named sum; a file is complete or not there."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    counts = {layer: (row.tokens, row.sequences) for layer, row in statistics.items()}
    for name in sorted(names):
        tensors = {layer: row.sums[name].cpu() for layer, row in statistics.items()}
        # safetensors refuses tensors that share storage, which copies of one sum may do.
        tensors = {layer: tensor.contiguous().clone() for layer, tensor in tensors.items()}
        unfinished = folder / f".{name}.{os.getpid()}.tmp"
        save_file(tensors, unfinished, metadata={"counts": json.dumps(counts)})
        unfinished.replace(folder / f"{name}.safetensors")


def limit_size(folder: Path) -> None:
    """Delete the folders used longest ago until all fit $PRUNEZERO_CACHE_GIB; `folder` stays."""
    limit_bytes = _limit_gib() * 2**30
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    sizes = {other: _bytes(other) for other in [*others, folder]}
    for oldest in sorted(others, key=lambda other: other.stat().st_mtime):
        if sum(sizes.values()) <= limit_bytes:
            return
        shutil.rmtree(oldest, ignore_errors=True)
        del sizes[oldest]


def _limit_gib() -> float:
    written = os.environ.get("PRUNEZERO_CACHE_GIB", "")
    try:
        return float(written) if written else DEFAULT_LIMIT_GIB
    except ValueError as error:
        raise StatisticsError(
            f"PRUNEZERO_CACHE_GIB must be a number of GiB but is '{written}'"
        ) from error


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
