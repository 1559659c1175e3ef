"""Which tensors do the files of a checkpoint hold, and how is one read without the rest?"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, reason
from prunezero.files.atomic import follow_umask
from prunezero.files.digests import joined_digest
from prunezero.files.file_digests import digests_of_files

# The dtypes that weights are stored in where they are not quantized, by their safetensors names.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_ABOUT_NUMBERS = ("config.json", "model.safetensors.index.json")


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
        raise ModelError(
            f"{path} is no index of safetensors files ({reason(error, path)}); get the file again"
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

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the numbers; None where it is none that weights are stored in."""
        sizes: Counter[str] = Counter()
        for stored in self.tensors.values():
            sizes[stored.dtype] += prod(stored.shape)
        return STORED_DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None

    @property
    def bytes(self) -> int:
        """Sizes of the files, together."""
        files = {stored.file for stored in self.tensors.values()}
        return sum((self.folder / file).stat().st_size for file in files)

    def read(self, name: str) -> Tensor:
        """A copy of the named tensor on the CPU, in its stored dtype.

        Raises:
            ModelError: the file is damaged.
        """
        return Shard(self.folder / self.tensors[name].file).read(name)

    def fingerprint(self) -> str:
        """Hexadecimal digest over names and bytes of the files, their index and configuration.

        Raises:
            ModelError: a file cannot be read.
        """
        names = sorted({stored.file for stored in self.tensors.values()})
        # What the numbers are for: a checkpoint of blocks that turn otherwise is another.
        names += [name for name in _ABOUT_NUMBERS if (self.folder / name).is_file()]
        try:
            digests = digests_of_files([self.folder / name for name in names])
        except OSError as error:
            raise ModelError(
                f"the files in '{self.folder}' cannot be read ({reason(error)})"
            ) from error
        return joined_digest(f"{name} {one}" for name, one in zip(names, digests, strict=True))


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
        # The last are of a path that no file can have.
        except (SafetensorError, OSError, ValueError) as error:
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
        follow_umask(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"'{path}' cannot be written ({reason(error, path)})") from error
