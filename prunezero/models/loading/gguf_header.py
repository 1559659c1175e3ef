"""What does the header of a .gguf file say, and can it be true for a file of its size?"""

from __future__ import annotations

import mmap
import re
import struct
from math import prod
from pathlib import Path

from prunezero.errors import ModelError, reason

# Bytes of the fixed-size metadata types, by their number in the format; 8 is text, 9 an array.
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
# Of these, whole numbers; and the types of tensors that hold such.
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_WHOLE_TENSORS = (24, 25, 26, 27)
# Sizes that the metadata gives, and the tensors that show them: name, and place of the dimension.
_SHOWN = {
    "embedding_length": ("token_embd.weight", 0),
    "vocab_size": ("token_embd.weight", 1),
    "context_length": ("position_embd.weight", 1),
}
_OTHER_SIZES = ("block_count", "feed_forward_length", "attention.head_count")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_MOST_DIMENSIONS = 4
# Names are shorter; other texts may be long.
_NAME_BYTES = 256
# No format stores more numbers than this in one byte.
_MOST_NUMBERS_PER_BYTE = 8


def check_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of a file's tensors by name, that of rows last, if its header can be true.

    Raises:
        ModelError: not a GGUF file, another version, counts and sizes that the file cannot hold, or
            others than its tensors have.
    """
    header = read_header(path)
    try:
        header.compare()
    except ValueError as error:
        raise ModelError(f"'{path}' is not a sound GGUF file: {reason(error)}") from error
    return header.tensors


def read_header(path: Path) -> Header:
    """What the header of a file says.

    Raises:
        ModelError: not a GGUF file, another version, or counts and sizes that the file cannot hold.
    """
    if path.stat().st_size < 24:
        raise ModelError(f"'{path}' is not a GGUF file: it has fewer than 24 bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return Header(data)
        except (ValueError, struct.error) as error:
            raise ModelError(f"'{path}' is not a sound GGUF file: {reason(error)}") from error


class Header:
    """What a header says, read from front to back, and never past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        """Read it.

        Raises:
            ValueError, struct.error: it cannot be true for a file of this size.
        """
        self.data = data
        self.place = 0
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, int | str | None] = {}
        if self._skip(4) != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, entries = self._number("<Q"), self._number("<Q")
        # An entry takes at least 13 bytes, a tensor's description at least 32.
        self._refuse_more(entries, 13, "metadata entries")
        self._refuse_more(tensors, 32, "tensors")
        for _ in range(entries):
            key = self._text()
            kind = self._number("<I")
            if kind == _ARRAY:
                self._skip_array()
            else:
                self.values[key] = self._value(kind)
        for _ in range(tensors):
            self._read_tensor()

    @property
    def architecture(self) -> str:
        """As the format spells it, such as llama; empty where it is not said."""
        return str(self.values.get("general.architecture") or "")

    def compare(self) -> None:
        """Compare sizes and counts of the metadata with the tensors.

        Raises:
            ValueError: one is no whole number above 0, or not what the tensors show.
        """
        sizes = {key: self.values.get(f"{self.architecture}.{key}", 1) for key in _OTHER_SIZES}
        sizes |= {
            key: self.values[f"{self.architecture}.{key}"]
            for key in _SHOWN
            if f"{self.architecture}.{key}" in self.values
        }
        for key, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{self.architecture}.{key} is no whole number above 0")
            name, axis = _SHOWN.get(key, ("", 0))
            shape = self.tensors.get(name, ())
            if axis < len(shape) and shape[axis] != size:
                raise ValueError(
                    f"{self.architecture}.{key} is {size}, but '{name}' has the sizes {list(shape)}"
                )
        blocks = {int(found[1]) for found in map(_BLOCK.match, self.tensors) if found}
        count = self.values.get(f"{self.architecture}.block_count", 1)
        known = 1 + max(blocks) if blocks else len(self.tensors)
        if isinstance(count, int) and count > known:
            raise ValueError(
                f"{self.architecture}.block_count is {count}, but it lacks the weights of all "
                f"blocks after {known}; get the file again"
            )

    def _read_tensor(self) -> None:
        name = self._text()
        dimensions = self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        numbers = prod(shape)
        if self._number("<I") in _WHOLE_TENSORS:
            raise ValueError(
                f"'{name}' holds whole numbers, a quantized or packed format; prune a "
                "full-precision file, then quantize"
            )
        offset = self._number("<Q")
        if offset > len(self.data) or numbers > _MOST_NUMBERS_PER_BYTE * len(self.data):
            raise ValueError(f"a tensor of {numbers} numbers at {offset} is outside the file")
        if name in self.tensors:
            raise ValueError(f"it holds the tensor '{name}' twice")
        self.tensors[name] = shape

    def _value(self, kind: int) -> int | str | None:
        """A value that is a whole number or text; None for others, which sizes never are."""
        if kind == _TEXT:
            return self._text()
        if kind in _WHOLE:
            return self._number(_WHOLE[kind])
        self._skip(self._size(kind))
        return None

    def _skip_array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _TEXT:
            self._skip(count * self._size(kind))
            return
        self._refuse_more(count, 8, "texts in an array")
        for _ in range(count):
            self._skip(self._number("<Q"))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{kind} is not a type of metadata")
        return _SIZES[kind]

    def _text(self) -> str:
        """A text, of a long one the beginning."""
        return self._skip(self._number("<Q"), kept=_NAME_BYTES).decode(errors="replace")

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._skip(struct.calcsize(form)))[0])

    def _skip(self, count: int, *, kept: int = 8) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"it ends before the {count} bytes at {self.place}")
        start = self.place
        self.place += count
        return self.data[start : min(self.place, start + kept)]

    def _refuse_more(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > len(self.data) - self.place:
            raise ValueError(f"it cannot hold {count} {what}")
