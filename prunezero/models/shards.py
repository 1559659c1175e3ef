"""Which tensors do the files of a checkpoint hold, and how is one read without the rest?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError

# The dtypes that weights are stored in where they are not quantized, by their safetensors names.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# Two checkpoints of one architecture have equal headers; so much of each file tells them apart.
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says about one tensor."""

    file: str
    """path of the file in the folder, with / between its parts"""
    dtype: str
    """as safetensors spells it, for example BF16"""
    shape: tuple[int, ...]
    """its size along each axis"""

    @property
    def bytes(self) -> int:
        """Size of its numbers; only for the dtypes of `STORED_DTYPES`."""
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def files_of_tensors(folder: Path) -> dict[str, str]:
    """Path of a file inside the folder by tensor name: one safetensors file, or those of its index.

    Where both are there it is the one file, which transformers reads.

    Raises:
        ModelError: there is no such file, one is damaged, or the index leads out of the folder.
    """
    if (folder / SINGLE).is_file():
        return dict.fromkeys(Shard(folder / SINGLE).tensors(), SINGLE)
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"'{folder}' holds no saved model: {SINGLE} is missing")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = index["weight_map"]
        # transformers asks for it.
        if not files or not isinstance(index["metadata"], dict):
            raise ValueError("it names no tensor, or its metadata are none")
        return {name: _inside(file) for name, file in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{path} is no index of safetensors files ({reason}); get the file again"
        ) from error


def _inside(file: Any) -> str:
    """The path of a file as an index may name it: below its own folder."""
    path = PurePosixPath(str(file))
    is_below = not path.is_absolute() and ".." not in path.parts
    if not isinstance(file, str) or not is_below or path.suffix != ".safetensors":
        raise ValueError(f"{file!r} is no safetensors file in its folder")
    return str(path)


class Shards:
    """The tensors of a folder of safetensors files, read one by one when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of `model.safetensors`, or of the files that its index names.

        Raises:
            ModelError: a file is missing or damaged, lacks a tensor that the index says it has, or
                holds one that another file holds too.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        files = files_of_tensors(folder)
        for file in sorted(set(files.values())):
            for name, stored in Shard(folder / file, file).tensors().items():
                if name in self.tensors:
                    raise ModelError(
                        f"the files '{self.tensors[name].file}' and '{file}' in '{folder}' both "
                        f"hold the tensor '{name}'; get the files again"
                    )
                self.tensors[name] = stored
        lacking = sorted(
            name
            for name, file in files.items()
            if name not in self.tensors or self.tensors[name].file != file
        )
        if lacking:
            raise ModelError(
                f"the files in '{folder}' lack {len(lacking)} tensors of their index, "
                f"'{lacking[0]}' in '{files[lacking[0]]}' among them; get the files again"
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
    file: str = ""
    """what its tensors call it; its name if empty"""

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
                found[name] = StoredTensor(self.file or self.path.name, part.get_dtype(), shape)
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
        # A path that no file can have, or a file without a byte.
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ModelError(
                f"{self.path} is damaged or missing ({reason}); get the file again"
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
        raise OutputError(f"'{path}' cannot be written ({error})") from error
