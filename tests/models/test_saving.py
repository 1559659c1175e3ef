from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.loading.shards import SINGLE as FILE
from prunezero.models.saving.save import check_writable, save_model
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_gives_equal_logits_in_plain_transformers(
    family: str, tmp_path: Path
) -> None:
    model, ids = tiny_model(family), tiny_batches()
    for layer in find_linears(model.model):
        layer.weight[:, ::2] = -0.0
    save_model(model, tmp_path / "pruned")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.model(ids).logits)
    for layer in find_linears(plain):
        assert not layer.weight[:, ::2].any()
        assert not torch.signbit(layer.weight[:, ::2]).any()
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("Ab c")["input_ids"] == [
        36,
        69,
        3,
        70,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_the_fingerprint_it_had(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"), dtype="float32", device="cpu")
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_too_small_for_the_computation_stay_where_nothing_was_removed(
    dtype: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_model(tiny_model("qwen3"), source)
    tiny = {name: tensor.double() for name, tensor in load_file(source / FILE).items()}
    for tensor in tiny.values():
        tensor.view(-1)[:2] = torch.tensor([1e-300, -0.0], dtype=torch.float64)
    save_file(tiny, source / FILE, metadata={"format": "pt"})
    model = load_model(str(source), dtype=dtype, device="cpu")
    pruned = find_linears(model.model)[0]
    pruned.weight[:, ::2] = 0.0
    save_model(model, tmp_path / "pruned")
    saved = load_file(tmp_path / "pruned" / FILE)
    assert not saved[f"{pruned.name}.weight"][:, ::2].any()
    for name in saved.keys() - {f"{pruned.name}.weight"}:
        assert torch.equal(saved[name].view(torch.int64), tiny[name].view(torch.int64)), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_model(tiny_model("llama", tie_word_embeddings=True), tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"), dtype="float32", device="cpu").model
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_files_are_written_beside_the_model(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "new" / "saved", files={"recipe.yaml": "name: wanda\n"})
    folder = tmp_path / "new" / "saved"
    assert (folder / "recipe.yaml").read_text() == "name: wanda\n"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [other.name for other in folder.parent.iterdir()] == ["saved"]


def test_faulty_generation_settings_do_not_stop_a_save(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.generation_config.temperature = 0.3
    model.model.generation_config.do_sample = False
    with pytest.warns(UserWarning, match="generation settings are left out"):
        save_model(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert model.model.generation_config.temperature == 0.3


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="is not empty; choose a folder that is new or empty"):
        save_model(tiny_model(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(tiny_model(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_place_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "file" / "below")


def test_a_save_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["~nobody-of-that-name/x", "x" * 300])
def test_a_folder_that_cannot_exist_is_refused_in_one_sentence(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(folder)
