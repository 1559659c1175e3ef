"""Every way in has every check: one file, shards, streamed, a hub id, a .gguf file."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.files.file_digests import is_sealed
from prunezero.models.loading import gguf
from prunezero.models.loading.load import load_model
from prunezero.models.streaming.streamed_model import StreamedModel
from tests.tiny_gguf import write_gguf
from tests.tiny_models import save_tiny_model, tiny_network, tiny_tokenizer

Tensors = dict[str, Tensor]
Settings = dict[str, Any]
UP = "model.layers.1.mlp.up_proj.weight"


def tiny_llama() -> tuple[Tensors, Settings]:
    network = tiny_network("llama", tie_word_embeddings=False)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return tensors, {**network.config.to_dict(), "architectures": ["LlamaForCausalLM"]}  # type: ignore[operator, union-attr]


def write_folder(folder: Path, tensors: Tensors, settings: Settings, *, files: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(folder)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"m-{place % files}.safetensors" for place, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def loaded(name: str | Path) -> Any:
    return load_model(str(name), dtype="float32", device="cpu")


def streamed(folder: Path) -> Any:
    return StreamedModel(folder, dtype="float32", device="cpu")


def by_hub_id(place: Path, tensors: Tensors, settings: Settings) -> Any:
    import transformers.utils.hub as hub

    repository = place / "models--some--model"
    write_folder(repository / "snapshots" / ("a" * 40), tensors, settings, files=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.constants, "HF_HUB_CACHE", str(place))
        return loaded("some/model")


def as_gguf(place: Path, tensors: Tensors, settings: Settings) -> Any:
    return loaded(write_gguf(place / "model.gguf", tensors, settings))


WAYS: dict[str, Callable[[Path, Tensors, Settings], Any]] = {
    "one file": lambda place, *held: loaded(write_folder(place / "m", *held)),
    "shards": lambda place, *held: loaded(write_folder(place / "m", *held, files=3)),
    "streamed": lambda place, *held: streamed(write_folder(place / "m", *held)),
    "streamed shards": lambda place, *held: streamed(write_folder(place / "m", *held, files=3)),
    "hub id": by_hub_id,
    "gguf": as_gguf,
}


def a_weight_is_missing(tensors: Tensors, settings: Settings) -> None:
    del tensors[UP]


def a_weight_has_another_name(tensors: Tensors, settings: Settings) -> None:
    tensors[UP.replace("up", "app")] = tensors.pop(UP)


def a_block_is_not_described(tensors: Tensors, settings: Settings) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(64, 32)


def a_weight_is_nan(tensors: Tensors, settings: Settings) -> None:
    tensors[UP][3, 4] = torch.nan


def an_embedding_is_infinite(tensors: Tensors, settings: Settings) -> None:
    tensors["model.embed_tokens.weight"][3, 4] = -torch.inf


def a_weight_is_packed(tensors: Tensors, settings: Settings) -> None:
    tensors[UP] = torch.ones(64, 32, dtype=torch.int8)


def a_weight_has_another_shape(tensors: Tensors, settings: Settings) -> None:
    tensors[UP] = torch.ones(60, 32)


FAULTS: dict[Callable[[Tensors, Settings], None], str] = {
    a_weight_is_missing: "lack 1 weights, '.*up_proj.weight' among them; they would be random",
    a_weight_has_another_name: "lack 1 weights",
    a_block_is_not_described: "hold 1 tensors of blocks that its configuration does not describe",
    a_weight_is_nan: "'model.layers.1.mlp.up_proj.weight' holds NaN or infinite numbers",
    an_embedding_is_infinite: "'model.embed_tokens.weight' holds NaN or infinite numbers",
    a_weight_is_packed: "quantized or packed format",
    a_weight_has_another_shape: r"has shape \[60, 32\] in its file but \[64, 32\]",
}
# By setting and value: none of them may cost the time or memory that it asks for.
SIZES = (
    ("num_hidden_layers", 3),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 2.0),
    ("num_hidden_layers", True),
    ("vocab_size", 10**8),
    ("hidden_size", 2**30),
    ("hidden_size", -32),
    ("intermediate_size", 10**8),
    ("num_attention_heads", "4"),
)
REFUSALS = (
    "lack|must be a whole number|is no whole number|asks for more weights|only 21 tensors|"
    "but 'token_embd.weight' has"
)


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_model_comes_in(way: str, tmp_path: Path) -> None:
    tensors, settings = tiny_llama()
    # What older versions stored beside the weights, and the model computes by itself.
    beside = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if way == "gguf":
        beside = {"rope_freqs.weight": torch.ones(4)}
    model = WAYS[way](tmp_path, {**tensors, **beside}, settings)
    if way.startswith("streamed"):
        with model.outside(with_head=True), model.block(0), model.block(1):
            network = model.language_model.model
            numbers = {key: one.clone() for key, one in network.state_dict().items()}
    else:
        numbers = model.model.state_dict()
    assert numbers.keys() == tensors.keys()
    # The format stores rows of queries and keys in another order, which transformers turns back.
    turned = ("q_proj", "k_proj") if way == "gguf" else ()
    for name, number in numbers.items():
        assert any(word in name for word in turned) or torch.equal(number, tensors[name])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_refused_on_every_way_in(
    fault: Callable[[Tensors, Settings], None], way: str, tmp_path: Path
) -> None:
    tensors, settings = tiny_llama()
    fault(tensors, settings)
    with pytest.raises(ModelError, match=FAULTS[fault]) as caught:
        WAYS[way](tmp_path, tensors, settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/models/*"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("key", "value"), SIZES)
def test_sizes_that_the_files_do_not_hold_are_refused_before_anything_is_allocated(
    key: str, value: Any, way: str, tmp_path: Path
) -> None:
    tensors, settings = tiny_llama()
    settings[key] = value
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ModelError, match=REFUSALS) as caught:
        WAYS[way](tmp_path, tensors, settings)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert time.process_time() - begin < 3


def rename_file(folder: Path, was: str, now: str) -> None:
    """Let the index call a file otherwise; the file itself is moved where that is in the folder."""
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(f'"{was}"', json.dumps(now)))
    if ".." not in now and not now.startswith("/"):
        (folder / now).parent.mkdir(exist_ok=True)
        (folder / was).rename(folder / now)


FOLDERS = {"in memory": loaded, "streamed": streamed}


@pytest.mark.parametrize("way", FOLDERS)
def test_an_index_means_the_file_that_it_names_in_a_folder_below(way: str, tmp_path: Path) -> None:
    tensors, settings = tiny_llama()
    folder = write_folder(tmp_path, tensors, settings, files=2)
    others = {name: tensor + 1 for name, tensor in tensors.items()}
    write_folder(tmp_path / "others", others, settings, files=2)
    rename_file(folder, "m-0.safetensors", "parts/m-0.safetensors")
    (tmp_path / "others" / "m-0.safetensors").rename(folder / "m-0.safetensors")
    model = FOLDERS[way](folder)
    if way == "streamed":
        with model.outside(with_head=True), model.block(0), model.block(1):
            network = model.language_model.model
            numbers = {key: one.clone() for key, one in network.state_dict().items()}
    else:
        numbers = model.model.state_dict()
    assert all(torch.equal(numbers[name], tensor) for name, tensor in tensors.items())


def an_index_leads_to_the_root(folder: Path) -> None:
    rename_file(folder, "m-0.safetensors", str(folder / "m-0.safetensors"))


def an_index_leads_upwards(folder: Path) -> None:
    rename_file(folder, "m-0.safetensors", f"../{folder.name}/m-0.safetensors")


def an_index_names_a_pickle(folder: Path) -> None:
    rename_file(folder, "m-0.safetensors", "pytorch_model.bin")


def an_index_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def an_index_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": [1]}')


def an_index_takes_a_tensor_from_another_file(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][UP] = "m-0.safetensors"
    assert json.loads(path.read_text())["weight_map"][UP] == "m-1.safetensors"
    path.write_text(json.dumps(index))


def a_tensor_stands_in_two_files(folder: Path) -> None:
    tensors, _ = tiny_llama()
    both = load_file(folder / "m-0.safetensors") | {UP: tensors[UP]}
    save_file(both, folder / "m-0.safetensors", metadata={"format": "pt"})


def a_file_is_cut_short(folder: Path) -> None:
    file = folder / "m-0.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def a_file_is_empty(folder: Path) -> None:
    (folder / "m-0.safetensors").write_bytes(b"")


def a_file_is_missing(folder: Path) -> None:
    (folder / "m-0.safetensors").unlink()


def a_file_is_a_folder(folder: Path) -> None:
    a_file_is_missing(folder)
    (folder / "m-0.safetensors").mkdir()


def tensors_overlap(folder: Path) -> None:
    file = folder / "m-0.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def the_configuration_names_another_file(folder: Path) -> None:
    path = folder / "config.json"
    other = {"transformers_weights": "m-0.safetensors"}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))


FAULTS_OF_FILES: dict[Callable[[Path], None], str] = {
    an_index_leads_to_the_root: "is no safetensors file in its folder",
    an_index_leads_upwards: "is no safetensors file in its folder",
    an_index_names_a_pickle: "is no safetensors file in its folder",
    an_index_is_no_json: "is no index of safetensors files",
    an_index_is_a_list: "is no index of safetensors files",
    an_index_takes_a_tensor_from_another_file: "lack 1 tensors of their index, '.*up_proj.weight'",
    a_tensor_stands_in_two_files: "both hold the tensor 'model.layers.1.mlp.up_proj.weight'",
    a_file_is_cut_short: "m-0.safetensors is damaged or missing",
    a_file_is_empty: "m-0.safetensors is damaged or missing",
    a_file_is_missing: "m-0.safetensors is damaged or missing",
    a_file_is_a_folder: "m-0.safetensors is damaged or missing",
    tensors_overlap: "m-0.safetensors is damaged or missing",
    the_configuration_names_another_file: "names its weights by transformers_weights",
}


@pytest.mark.parametrize("way", FOLDERS)
@pytest.mark.parametrize("fault", FAULTS_OF_FILES, ids=lambda fault: fault.__name__)
def test_files_that_are_not_what_their_index_says_are_refused(
    fault: Callable[[Path], None], way: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "m", *tiny_llama(), files=2)
    fault(folder)
    with pytest.raises(ModelError, match=FAULTS_OF_FILES[fault]) as caught:
        FOLDERS[way](folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["one file", "streamed", "gguf"])
def test_a_tensor_outside_the_blocks_that_is_not_used_is_told(way: str, tmp_path: Path) -> None:
    tensors, settings = tiny_llama()
    with pytest.warns(UserWarning, match="hold 1 tensors that it does not use, 'value.weight'"):
        WAYS[way](tmp_path, {**tensors, "value.weight": torch.ones(3)}, settings)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    for way in (loaded, streamed):
        with pytest.raises(ModelError, match="comes with an adapter.*merge it"):
            way(folder)


def test_what_an_older_version_unpacked_of_a_gguf_file_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf", *tiny_llama())
    now = gguf.unpacked_gguf(path)
    monkeypatch.setattr(gguf, "FORMAT_VERSION", gguf.FORMAT_VERSION - 1)
    assert gguf.unpacked_gguf(path) != now


def test_an_unpacked_gguf_says_its_rotary_base_and_tokenizer_as_transformers_4_reads_them(
    tmp_path: Path,
) -> None:
    folder = gguf.unpacked_gguf(write_gguf(tmp_path / "model.gguf", *tiny_llama()))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] in ("LlamaTokenizer", "PreTrainedTokenizerFast")
    assert is_sealed(folder)
