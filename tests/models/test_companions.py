"""What stands beside the weights of a source stands beside those of the product, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.biases import open_biases
from prunezero.models.loading.load import load_model
from prunezero.models.saving.companions import companions, edit_configuration, places_of_companions
from prunezero.models.saving.save import save_model
from tests.tiny_models import save_tiny_model, tiny_batches

BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "Licence.txt",
    "NOTICE",
    "README.md",
    "USE_POLICY.md",
)
WEIGHTS_AND_OTHERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "training_args.bin",
    "modeling_mine.py",
    "corpus.txt",
    ".gitattributes",
)


def as_transformers_4_wrote_it(folder: Path) -> Path:
    """A tiny Llama with the spellings of transformers 4, and white space of its own."""
    save_tiny_model("llama", folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}
    config |= {"transformers_version": "4.57.6", "mine": "é"}
    (folder / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": words["bos_token"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    return folder


def test_what_loaders_and_lawyers_read_is_a_companion_and_weights_and_code_are_not(
    tmp_path: Path,
) -> None:
    for name in BESIDE + WEIGHTS_AND_OTHERS:
        (tmp_path / name).write_text(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    found = [path.as_posix() for path in companions(tmp_path)]
    assert found == sorted([*BESIDE, "additional_chat_templates/tools.jinja"])


def test_files_of_ours_put_those_of_the_source_aside(tmp_path: Path) -> None:
    for name in ("README.md", "README.source.md", "LICENSE"):
        (tmp_path / name).write_text(name)
    assert places_of_companions(tmp_path) == {
        name: name for name in ("README.md", "README.source.md", "LICENSE")
    }
    assert places_of_companions(tmp_path, ours=["README.md", "LICENSE", "report.json"]) == {
        "README.md": "README.source2.md",
        "README.source.md": "README.source.md",
        "LICENSE": "LICENSE.source",
    }


def test_a_folder_of_transformers_4_keeps_its_spellings(tmp_path: Path) -> None:
    source = as_transformers_4_wrote_it(tmp_path / "source")
    (source / "README.md").write_text("theirs")
    model = load_model(str(source), device="cpu")
    made = save_model(model, tmp_path / "made", files={"README.md": "ours"})
    assert (made / "README.source.md").read_text() == "theirs"
    assert (made / "README.md").read_text() == "ours"
    for path in source.iterdir():
        if path.name != "README.md":
            assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    again = load_model(str(made), device="cpu").model
    assert again.config.rope_parameters["rope_theta"] == 500000
    with torch.no_grad():
        assert torch.equal(again(tiny_batches()).logits, model.model(tiny_batches()).logits)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_opened_biases_are_the_only_change_of_configuration_and_files(
    shard: str, tmp_path: Path
) -> None:
    source = as_transformers_4_wrote_it(tmp_path / "source")
    network = AutoModelForCausalLM.from_pretrained(source).half()
    config = (source / "config.json").read_bytes()
    network.save_pretrained(source, max_shard_size=shard)
    (source / "config.json").write_bytes(config)
    if shard == "20KB":
        (source / "model.safetensors").unlink()
    model = load_model(str(source), device="cpu")
    layers = find_linears(model.model)
    open_biases(model, layers)
    for layer in layers:
        assert layer.bias is not None
        layer.bias.fill_(0.25)
    made = save_model(model, tmp_path / "made")
    settings, known = (json.loads((at / "config.json").read_text()) for at in (made, source))
    assert settings == {**known, "attention_bias": True, "mlp_bias": True}
    assert [key for key in settings if key in known] == list(known)
    saved = {n: t for file in made.glob("*.safetensors") for n, t in load_file(file).items()}
    assert saved["model.layers.1.mlp.up_proj.bias"].dtype == torch.float16
    names = {path.name for path in made.iterdir()}
    assert names == {path.name for path in source.iterdir()}
    if shard == "20KB":
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == saved.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    plain = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(tiny_batches()).logits, model.model(tiny_batches()).logits)


def test_a_key_inside_a_part_of_the_configuration_is_changed_there(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"bias": false, "text_config": {"b": 1, "attention_bias": false}}')
    edit_configuration(tmp_path, {"attention_bias": True}, part="text_config")
    changed = {"bias": False, "text_config": {"b": 1, "attention_bias": True}}
    assert json.loads(path.read_text()) == changed


def test_a_model_of_the_hub_is_saved_as_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    revision = "0" * 40
    snapshot = save_tiny_model("llama", hub / "models--some--model" / "snapshots" / revision)
    (hub / "models--some--model" / "refs").mkdir()
    (hub / "models--some--model" / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_model("some/model", device="cpu")
    made = save_model(model, tmp_path / "made")
    for path in snapshot.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    assert AutoConfig.from_pretrained(made).vocab_size == model.model.config.vocab_size
