"""How are safetensors files written again, with other numbers in the same places?

Headers are copied, so names, order, dtypes, shapes and metadata stay as they are, but for tensors
that became smaller, got another name or went. Tensors are put in their places one by one in any
order, from memory or straight from the source, so memory holds one of them at a time; what is not
put yet is zero.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, reason
from prunezero.models.loading.shards import INDEX, SINGLE, Shards, StoredTensor

_CHUNK_BYTES = 2**24
# Some systems of files have no such call.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Where the numbers of a file begin, so that memory maps of it are aligned.
_ALIGNMENT = 8


@dataclass(frozen=True)
class _File:
    """One file to write."""

    head: bytes
    """all that stands before the numbers"""
    places: Mapping[str, tuple[int, int]]
    """first byte and number of bytes by tensor name, counted from the end of the head"""
    source_head_bytes: int
    """what stands before the numbers in the source"""
    source_places: Mapping[str, tuple[int, int]]
    """places in the source"""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + max((sum(place) for place in self.places.values()), default=0)


class Mirror:
    """The safetensors files of a checkpoint in another folder, in the making."""

    def __init__(
        self,
        source: Shards,
        folder: Path,
        *,
        added: Mapping[str, StoredTensor] | None = None,
        reshaped: Mapping[str, StoredTensor] | None = None,
        renamed: Mapping[str, str | None] | None = None,
    ) -> None:
        """Plan the files; nothing is written yet.

        Args:
            source: whose files are written again.
            folder: where.
            added: more tensors by name, each at the end of the file that it names.
            reshaped: tensors of the source, by name, that have another shape now.
            renamed: other names of tensors of the source; None where one goes. Whoever puts a
                tensor in its place calls it by the name in the source.

        Raises:
            ModelError: a file of the source is damaged.
        """
        self.folder = folder
        self._source = source
        self._added = dict(added or {})
        self._reshaped = dict(reshaped or {})
        self._renamed = dict(renamed or {})
        self._files: dict[str, _File] = {}
        for file in dict.fromkeys(stored.file for stored in source.tensors.values()):
            more = {name: one for name, one in self._added.items() if one.file == file}
            other = {name: one for name, one in self._reshaped.items() if one.file == file}
            planned = _planned(source.folder / file, more, other, self._renamed)
            # Of a file whose tensors all go nothing is left.
            if planned.places:
                self._files[file] = planned
        self._file_of = {name: one.file for name, one in {**source.tensors, **self._added}.items()}
        self._index = None if set(self._files) == {SINGLE} else source.folder / INDEX
        self._unsynced: set[str] = set()

    def begin(self) -> None:
        """Write headers and the index, and take the room that the numbers will need.

        Raises:
            OutputError: the folder cannot be written, or the disk is too small.
        """
        for name, file in self._files.items():
            with self._writing(name):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as opened:
                    opened.write(file.head)
                    _reserve(opened, file.size)
        self._write_index()

    def is_begun(self) -> bool:
        """Whether `begin` came to its end here, for the same source."""
        for name, file in self._files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != file.size:
                return False
            with path.open("rb") as opened:
                if opened.read(len(file.head)) != file.head:
                    return False
        return self._index is None or (self.folder / INDEX).is_file()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Args:
            name: as in the source, or of an added tensor.
            tensor: of the shape and dtype that the header says.

        Raises:
            OutputError: the file cannot be written.
        """
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._place(name) as (target, size):
            assert len(numbers) == size, name
            target.write(numbers.data)

    def copy(self, name: str) -> None:
        """Put a tensor of the source in its place, bytes as they are.

        Raises:
            OutputError: a file cannot be read or written.
        """
        file = self._files[self._file_of[name]]
        start, left = file.source_places[name]
        origin = self._source.folder / self._file_of[name]
        with self._place(name) as (target, _), origin.open("rb") as source:
            source.seek(file.source_head_bytes + start)
            while left:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise OSError(f"'{origin}' has become shorter")
                target.write(chunk)
                left -= len(chunk)

    def sync(self) -> None:
        """Return once all that was put so far would outlast a failure of the machine.

        Raises:
            OutputError: the disk says no.
        """
        for name in sorted(self._unsynced):
            with self._writing(name), (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def _write_index(self) -> None:
        if self._index is None:
            return
        with self._writing(INDEX):
            content = self._index.read_bytes()
            stored = self._source.tensors
            less = sum(stored[name].bytes - one.bytes for name, one in self._reshaped.items())
            less += sum(stored[name].bytes for name, now in self._renamed.items() if now is None)
            changed = _with_changes(content, self._added, less, self._renamed)
            (self.folder / INDEX).write_bytes(changed)

    @contextmanager
    def _place(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A file, open where the numbers of a tensor belong, and their bytes."""
        path = self._file_of[name]
        file = self._files[path]
        start, size = file.places[name]
        with self._writing(path), (self.folder / path).open("r+b") as opened:
            opened.seek(len(file.head) + start)
            yield opened, size
        self._unsynced.add(path)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"'{self.folder / name}' cannot be written ({reason(error)})"
            ) from error


def _planned(
    path: Path,
    added: Mapping[str, StoredTensor],
    reshaped: Mapping[str, StoredTensor],
    renamed: Mapping[str, str | None],
) -> _File:
    """A file as it will be, from the header of the one that it is written after."""
    try:
        with path.open("rb") as file:
            first = file.read(8)
            text = file.read(int.from_bytes(first, "little"))
        header = json.loads(text)
        places = {
            name: (entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is damaged or missing ({reason(error)}); get the file again"
        ) from error
    sources = dict(places)
    for name in [name for name in places if renamed.get(name, name) is None]:
        del header[name], places[name]
    has_gaps = bool(reshaped) or len(places) < len(sources)
    if has_gaps:
        _close_up(header, places, reshaped)
    end = max((sum(place) for place in places.values()), default=0)
    for name, one in added.items():
        header[name] = _entry(one, end)
        places[name] = end, one.bytes
        end += one.bytes
    is_changed = has_gaps or bool(added) or not renamed.keys().isdisjoint(places)
    header = {renamed.get(name, name): entry for name, entry in header.items()}
    head = _head(header) if is_changed else first + text
    return _File(head, places, len(first) + len(text), sources)


def _close_up(
    header: dict[str, Any],
    places: dict[str, tuple[int, int]],
    reshaped: Mapping[str, StoredTensor],
) -> None:
    """Let tensors follow one another without a gap, in their order, some in another shape."""
    end = 0
    for name, (_, size) in sorted(places.items(), key=lambda place: place[1]):
        if name in reshaped:
            header[name] = _entry(reshaped[name], end)
            size = reshaped[name].bytes
        else:
            header[name]["data_offsets"] = [end, end + size]
        places[name] = end, size
        end += size


def _entry(tensor: StoredTensor, start: int) -> dict[str, Any]:
    offsets = [start, start + tensor.bytes]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}


def _head(header: Mapping[Any, Any]) -> bytes:
    """A header as safetensors writes it: its length, JSON, and spaces up to the numbers.

    Source: https://github.com/huggingface/safetensors#format
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _with_changes(
    content: bytes,
    added: Mapping[str, StoredTensor],
    less: int,
    renamed: Mapping[str, str | None],
) -> bytes:
    """An index that names more tensors, of `less` bytes less, or others; else the bytes stay."""
    if not added and not less and not renamed:
        return content
    index = json.loads(content)
    files = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
    index["weight_map"] = {name: file for name, file in files.items() if name is not None}
    index["weight_map"] |= {name: one.file for name, one in added.items()}
    known = index.get("metadata")
    if isinstance(known, dict) and isinstance(known.get("total_size"), int):
        known["total_size"] += sum(one.bytes for one in added.values()) - less
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file of this size; where the system can, its room on the disk is taken."""
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT_RESERVE:
            raise
        file.truncate(size)
