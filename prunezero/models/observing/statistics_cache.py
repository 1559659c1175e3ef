"""Which sums over the dense model are already on disk?

One folder per model and text, in it one safetensors file per sum and block with the tensors of its
layers, so that a criterion that needs one more sum collects just that one, and a block can be read
and written without the others. A file holds a digest of each of its tensors, and a checksum of
those: a flipped bit would be a wrong mask that nobody sees.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import PruneZeroWarning, StatisticsError, reason
from prunezero.files.atomic import replace_whole
from prunezero.files.checked_lines import line_of, record_of
from prunezero.files.digests import joined_digest, tensor_digest, tensor_digests
from prunezero.models.anatomy.linears import Linear, by_block
from prunezero.models.loading.language_model import LanguageModel
from prunezero.scoring.statistics import SUMS, Statistics

# Raise it when a sum changes its meaning: older files are then never read.
FORMAT_VERSION = 3
DEFAULT_LIMIT_GIB = 8.0


def cache_folder(
    cache: Path,
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    text_fingerprint: str,
) -> Path:
    """The folder for these sums: its name changes with whatever could change one of them."""
    import transformers

    parts = [
        language_model.fingerprint,
        str(language_model.dtype),
        language_model.device.type,
        text_fingerprint,
        tensor_digest(batches),
        *(f"{layer.name} {tuple(layer.weight.shape)}" for layer in layers),
        torch.__version__,
        transformers.__version__,
        str(FORMAT_VERSION),
    ]
    return cache / "statistics" / joined_digest(parts)


def read_sums(
    folder: Path, layers: Sequence[Linear], names: frozenset[str]
) -> dict[str, dict[str, Statistics]]:
    """The named sums that the folder holds: statistics by sum name, then by layer name.

    A file that is not to the last bit what was written is collected anew, with a warning.
    """
    found = {}
    for name in sorted(names):
        parts = list(_parts(folder, layers, name))
        if all(part is not None for part in parts):
            found[name] = {layer: one for part in parts if part for layer, one in part.items()}
    if found:
        note_use(folder)
    return found


def whole_sums(
    folder: Path, layers: Sequence[Linear], names: frozenset[str]
) -> tuple[frozenset[str], set[str]]:
    """Which of the named sums the folder holds, every bit as it was written.

    Each file is read and let go again; one that is damaged costs a warning. With them come the
    names of layers whose sums were filled up.
    """
    whole, filled = set[str](), set[str]()
    for name in sorted(names):
        is_whole = True
        for part in _parts(folder, layers, name):
            is_whole &= part is not None
            filled |= {layer for layer, one in (part or {}).items() if one.is_filled}
        whole |= {name} if is_whole else set()
    return frozenset(whole), filled


def read_block(
    folder: Path, inside: Sequence[Linear], names: frozenset[str]
) -> dict[str, Statistics]:
    """The named sums of the layers of one block, by layer name, all of which are there.

    Raises:
        StatisticsError: a file is gone, or is not what was written any more.
    """
    parts = []
    for name in sorted(names):
        path = _path(folder, name, inside[0].block)
        try:
            parts.append(_read(path, name, inside))
        # Whatever a damaged file makes a reader do.
        except Exception as error:
            raise StatisticsError(
                f"{path} was damaged or deleted while it was in use ({reason(error, path)}); run "
                "the same command again, which makes it anew, with a larger PRUNEZERO_CACHE_GIB "
                "where several runs share the cache"
            ) from error
    note_use(folder)
    return {layer.name: joined([part[layer.name] for part in parts]) for layer in inside}


def joined(parts: Sequence[Statistics]) -> Statistics:
    """One layer's sums of several passes over the same text."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        sums |= part.sums
    tokens = max((part.tokens for part in parts), default=0)
    sequences = max((part.sequences for part in parts), default=0)
    filled = any(part.is_filled for part in parts)
    return Statistics(tokens, sequences, sums, is_filled=filled)


def note_use(folder: Path) -> None:
    """Mark the moment of a folder's last use; a cache that cannot be written can still be read."""
    with suppress(OSError):
        os.utime(folder)


def _parts(
    folder: Path, layers: Sequence[Linear], name: str
) -> Iterator[dict[str, Statistics] | None]:
    """One sum of block after block by layer name; None where it has to be collected."""
    for block, inside in by_block(layers).items():
        path = _path(folder, name, block)
        if not path.is_file():
            yield None
            return
        try:
            yield _read(path, name, inside)
        # Whatever a damaged file makes a reader do.
        except Exception as error:
            warnings.warn(
                f"{path} is damaged and is made anew ({reason(error)})",
                PruneZeroWarning,
                stacklevel=4,
            )
            yield None
            return


def _path(folder: Path, name: str, block: int) -> Path:
    return folder / f"{name}.{block}.safetensors"


def _read(path: Path, name: str, layers: Sequence[Linear]) -> dict[str, Statistics]:
    """The sums of the layers, on their devices.

    Raises:
        ValueError: a tensor is not what was written.
        Exception: whatever else a damaged file makes a reader do.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        noted = _noted(file.metadata(), path)
        tensors = {layer.name: file.get_tensor(layer.name) for layer in layers}
    digests = tensor_digests(tensors)
    statistics = {}
    for layer in layers:
        # Files that are older say nothing of what was filled up.
        tokens, sequences, digest, *filled = noted[layer.name]
        if digests[layer.name] != digest:
            raise ValueError(f"tensor '{layer.name}' is not what was written")
        on_device = tensors[layer.name].to(layer.weight.device)
        statistics[layer.name] = Statistics(
            tokens, sequences, {name: on_device}, is_filled=filled == [True]
        )
    return statistics


def _noted(metadata: Mapping[str, str], path: Path) -> dict[str, list[Any]]:
    """Tokens, sequences, the digest of the tensor, and whether it was filled up, by layer name."""
    noted = record_of(metadata["noted"].encode())
    if noted is None or noted["place"] != _place(path):
        raise ValueError("what it says of its tensors is not what was written there")
    return noted["layers"]


def _place(path: Path) -> str:
    """Which sum of which model and text a file holds."""
    return f"{path.parent.name}/{path.name}"


def write_sums(
    folder: Path,
    layers: Sequence[Linear],
    statistics: Mapping[str, Statistics],
    names: frozenset[str],
) -> None:
    """Write one file per named sum and block, with a digest of each tensor.

    Each is complete or not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(names):
        for block, inside in by_block(layers).items():
            _write(
                _path(folder, name, block), name, {one.name: statistics[one.name] for one in inside}
            )


def _write(path: Path, name: str, statistics: Mapping[str, Statistics]) -> None:
    tensors = {layer: row.sums[name].cpu() for layer, row in statistics.items()}
    digests = tensor_digests(tensors)
    noted = {
        layer: [row.tokens, row.sequences, digests[layer], *[True] * row.is_filled]
        for layer, row in statistics.items()
    }
    line = line_of({"place": _place(path), "layers": noted})
    metadata = {"noted": line.decode().rstrip("\n")}
    # safetensors refuses tensors that share storage, which copies of one sum may do.
    tensors = {layer: tensor.contiguous().clone() for layer, tensor in tensors.items()}
    replace_whole(path, partial(_save, tensors, metadata))


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)


def limit_size(folder: Path) -> None:
    """Delete the folders used longest ago until all fit $PRUNEZERO_CACHE_GIB; `folder` stays.

    What nobody here has written is neither counted nor deleted.
    """
    limit_bytes = _limit_gib() * 2**30
    used = []
    for other in folder.parent.iterdir():
        # Another process may be at the same.
        with suppress(OSError):
            if _is_ours(other):
                used.append((other.stat().st_mtime, other, _bytes(other)))
    total = sum(size for _, _, size in used)
    for _, oldest, size in sorted(used):
        if total <= limit_bytes:
            return
        if oldest != folder:
            shutil.rmtree(oldest, ignore_errors=True)
            total -= size


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder that `cache_folder` named, with nothing but sums in it."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch("[0-9a-f]{32}", folder.name):
        return False
    names = [path.name.removeprefix(".").split(".")[0] for path in folder.iterdir()]
    return all(name in SUMS for name in names)


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
