"""Which tensors do the files of a checkpoint hold, and how is one read without the rest?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, reason
from prunezero.models.saving import files_of_tensors

# The dtypes that weights are stored in where they are not quantized, by their safetensors names.
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Two checkpoints of one architecture have equal headers; so much of each file tells them apart.
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says about one tensor."""

    file: str
    """name of the file in the folder"""
    dtype: str
    """as safetensors spells it, for example BF16"""
    shape: tuple[int, ...]
    """its size along each axis"""

    @property
    def bytes(self) -> int:
        """Size of its numbers; only for the dtypes of `STORED_DTYPES`."""
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


class Shards:
    """The tensors of a folder of safetensors files, read one by one when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of `model.safetensors`, or of the files that its index names.

        Raises:
            ModelError: a file is missing or damaged, or lacks a tensor that the index promises.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        files = files_of_tensors(folder)
        for file in sorted(set(files.values())):
            self.tensors |= Shard(folder / file).tensors()
        lacking = sorted(files.keys() - self.tensors.keys())
        if lacking:
            raise ModelError(
                f"the files in '{folder}' lack {len(lacking)} tensors of their index, "
                f"'{lacking[0]}' among them; get the files again"
            )

    def read(self, name: str) -> Tensor:
        """A copy of the named tensor on the CPU, in its stored dtype.

        Raises:
            ModelError: the file is damaged.
        """
        return Shard(self.folder / self.tensors[name].file).read(name)

    def fingerprint(self) -> str:
        """Hexadecimal digest over names, sizes and headers of the files, and samples of each."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted({stored.file for stored in self.tensors.values()}):
            path = self.folder / file
            size = path.stat().st_size
            digest.update(f"{file} {size}".encode())
            with path.open("rb") as opened:
                header_bytes = int.from_bytes(opened.read(8), "little")
                digest.update(opened.read(header_bytes))
                for place in range(SAMPLES):
                    opened.seek(place * size // SAMPLES)
                    digest.update(opened.read(SAMPLE_BYTES))
        return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    """where it is"""

    def tensors(self) -> dict[str, StoredTensor]:
        """What its header says, by tensor name.

        Raises:
            ModelError: the file is missing or damaged.
        """
        found = {}
        with self._open() as file:
            for name in file.keys():
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                found[name] = StoredTensor(self.path.name, part.get_dtype(), shape)
        return found

    def read(self, name: str) -> Tensor:
        """A copy of the named tensor on the CPU, in its stored dtype.

        Raises:
            ModelError: the file is missing or damaged.
        """
        # Opened for each tensor: pages of a file that stays open count as memory of this process.
        with self._open() as file:
            return file.get_tensor(name).clone()

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self.path} is damaged or missing ({reason(error, self.path)}); get the file "
                "again"
            ) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is complete or not there.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(dict(tensors), unfinished, metadata={"format": "pt"})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"'{path}' cannot be written ({reason(error, path)})") from error
