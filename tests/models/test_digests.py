"""A fingerprint is of all bytes: of tensors, of files, and of what the cache keeps of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError
from prunezero.files import file_digests
from prunezero.files.digests import file_digest, tensor_digest, tensor_digests
from prunezero.files.file_digests import digest_of_file, is_sealed, seal
from prunezero.models.loading import gguf
from prunezero.models.loading.load import wrap_model
from prunezero.models.loading.shards import Shards
from tests.models.test_gguf import DATA, entry, header, tensor
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer


def test_the_digest_of_a_tensor_is_sha256_of_its_shape_dtype_and_every_byte() -> None:
    numbers = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.sha256(b"(2, 3) torch.float32" + numbers.numpy().tobytes()).hexdigest()
    assert tensor_digest(numbers) == expected
    assert tensor_digest(numbers.T.contiguous().T) == expected
    others = [numbers.reshape(3, 2), numbers.view(torch.int32), numbers.to(torch.bfloat16)]
    assert len({expected, *map(tensor_digest, others)}) == 4


def test_names_that_share_numbers_have_one_digest_and_views_their_own() -> None:
    numbers = torch.arange(6.0)
    found = tensor_digests({"a": numbers, "b": numbers, "first": numbers[:3], "last": numbers[3:]})
    assert found["a"] == found["b"] == tensor_digest(numbers.clone())
    assert found["first"] == tensor_digest(torch.tensor([0.0, 1.0, 2.0])) != found["last"]


@pytest.mark.parametrize("place", [0, 1, 4097, -1])
def test_every_single_number_of_a_model_decides_its_fingerprint(place: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
    before = tiny_model(**sizes)
    changed = tiny_model(**sizes).model
    weight = changed.model.layers[1].mlp.down_proj.weight
    weight.view(-1)[place] += 2**-20
    assert wrap_model(changed, tiny_tokenizer(), name="it").fingerprint != before.fingerprint


def test_how_attention_is_computed_decides_the_fingerprint_of_a_model() -> None:
    model = tiny_model()
    model.model.set_attn_implementation("eager")
    assert wrap_model(model.model, tiny_tokenizer(), name="it").fingerprint != model.fingerprint


def test_a_buffer_that_no_checkpoint_holds_decides_the_fingerprint_of_a_model() -> None:
    model = tiny_model()
    model.model.model.rotary_emb.inv_freq.mul_(0.5)
    assert wrap_model(model.model, tiny_tokenizer(), name="it").fingerprint != model.fingerprint


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_every_byte_of_a_streamed_checkpoint_decides_its_fingerprint(
    name: str, tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    found = {Shards(folder).fingerprint()}
    size = (folder / name).stat().st_size
    for place in (size // 2, size - 7):
        flip_a_bit(folder / name, place)
        found.add(Shards(folder).fingerprint())
    assert len(found) == 3


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files rest as soon as they are written."""
    monkeypatch.setattr(file_digests, "SECONDS_AT_REST", -1.0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read."""
    found: list[Path] = []

    def reading(path: Path) -> str:
        found.append(path)
        return file_digest(path)

    monkeypatch.setattr(file_digests, "file_digest", reading)
    return found


def test_a_file_that_rests_is_read_once(at_rest: None, read: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    digests = {digest_of_file(path) for _ in range(3)}
    assert digests == {hashlib.sha256(b"abc").hexdigest()}
    assert read == [path]


def test_a_file_that_was_just_written_is_not_remembered(read: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    digest_of_file(path)
    digest_of_file(path)
    assert read == [path, path]


def test_an_edit_in_place_is_seen_though_the_time_of_the_file_was_set_back(
    at_rest: None, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    before, times = digest_of_file(path), path.stat()
    flip_a_bit(path, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert digest_of_file(path) != before


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff\n", b"0 0 \n"])
def test_a_damaged_memory_of_a_file_costs_a_reading(
    damage: bytes, at_rest: None, read: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    before = digest_of_file(path)
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    memory.write_bytes(damage)
    assert digest_of_file(path) == before
    assert len(read) == 2


def test_a_sealed_folder_is_known_until_a_file_is_changed_added_or_taken(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    assert not is_sealed(folder)
    seal(folder)
    assert is_sealed(folder)
    flip_a_bit(folder / "a", 0)
    assert not is_sealed(folder)
    flip_a_bit(folder / "a", 0)
    (folder / "b").touch()
    assert not is_sealed(folder)
    (folder / "b").unlink()
    assert is_sealed(folder)
    (folder / "a").unlink()
    assert not is_sealed(folder)


def unpack_the_bytes(path: Path, folder: Path, tensors: object) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(path.read_bytes())


def test_a_gguf_file_edited_in_place_is_unpacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_unpack", unpack_the_bytes)
    path = tmp_path / "model.gguf"
    path.write_bytes(header() + entry() + tensor() + DATA)
    before = gguf.unpacked_gguf(path)
    flip_a_bit(path, -9)
    after = gguf.unpacked_gguf(path)
    assert after != before
    assert (after / "model.safetensors").read_bytes() == path.read_bytes()


def test_a_damaged_unpacked_folder_is_made_anew_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_unpack", unpack_the_bytes)
    path = tmp_path / "model.gguf"
    path.write_bytes(header() + entry() + tensor() + DATA)
    folder = gguf.unpacked_gguf(path)
    assert gguf.unpacked_gguf(path) == folder
    flip_a_bit(folder / "model.safetensors", 30)
    with pytest.warns(UserWarning, match="is damaged and is made anew"):
        assert gguf.unpacked_gguf(path) == folder
    assert (folder / "model.safetensors").read_bytes() == path.read_bytes()
    assert gguf.unpacked_gguf(path) == folder
    assert len(list(folder.parent.iterdir())) == 1


def test_a_gguf_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack_while_it_changes(path: Path, folder: Path, tensors: object) -> None:
        unpack_the_bytes(path, folder, tensors)
        flip_a_bit(path, -1)

    monkeypatch.setattr(gguf, "_unpack", unpack_while_it_changes)
    path = tmp_path / "model.gguf"
    path.write_bytes(header() + entry() + tensor() + DATA)
    with pytest.raises(ModelError, match="was changed while it was read; run the command again"):
        gguf.unpacked_gguf(path)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
