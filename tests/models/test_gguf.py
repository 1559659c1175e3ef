from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from prunezero.errors import ModelError
from prunezero.models.loading.gguf_header import check_header


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def header(entries: int = 1, tensors: int = 1, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


def entry(kind: int = 4, value: bytes = b"\1\0\0\0") -> bytes:
    return text("general.alignment") + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(dimensions: tuple[int, ...] = (4, 2), offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return (
        text("weight") + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", 0, offset)
    )


DATA = bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        header() + entry() + tensor() + DATA,
        header() + entry(8, text("llama")) + tensor() + DATA,
        header() + entry(9, array(8, 2, text("a") + text("b"))) + tensor() + DATA,
        header(version=2) + entry(9, array(5, 3, bytes(12))) + tensor() + DATA,
    ],
)
def test_a_sound_header_passes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    check_header(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "fewer than 24 bytes"),
        (header(magic=b"GGML") + entry() + tensor() + DATA, "does not start with 'GGUF'"),
        (header(version=7) + entry() + tensor() + DATA, "version 7 is not 2 or 3"),
        (header(entries=2**40) + DATA, "cannot hold 1099511627776 metadata entries"),
        (header(tensors=2**40) + DATA, "cannot hold 1099511627776 tensors"),
        (header() + entry(9, array(8, 2**40)) + DATA, "cannot hold 1099511627776 texts"),
        (header() + entry(9, array(5, 2**40)) + DATA, "ends before the 4398046511104 bytes"),
        (header() + entry(9, array(9, 4, bytes(16))) + tensor() + DATA, "9 is not a type"),
        (header() + entry(77) + tensor() + DATA, "77 is not a type"),
        (header() + struct.pack("<Q", 2**63) + DATA, "ends before"),
        (header() + entry() + tensor((2**40, 2**20)) + DATA, "outside the file"),
        (header() + entry() + tensor(offset=2**40) + DATA, "outside the file"),
        (header() + entry() + tensor((1,) * 9) + DATA, "has 9 dimensions"),
        (header() + entry(), "ends before the 8 bytes"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused_at_once(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=message):
        check_header(tmp_path / "model.gguf")
    assert time.perf_counter() - started < 5


def test_a_file_written_by_the_gguf_package_passes(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["<s>", "</s>", "prune"])
    writer.add_tensor("output.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "model.gguf")
