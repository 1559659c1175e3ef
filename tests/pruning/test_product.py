"""A pruned folder is its source with fewer numbers, whoever writes it and whatever computed it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.models.saving.save import save_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.streamed import prune_streamed
from tests.tiny_models import CONFIGURATIONS, tiny_batches, tiny_tokenizer

WINDOWS = tiny_batches(2, 16)
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_HEADS = {**_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
_WIDE = {**_HEADS, "intermediate_size": 64}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_HYBRID = {
    **_GROUPED,
    "num_hidden_layers": 4,
    "hybrid_override_pattern": "M-*-",
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
# By the name of the configuration in transformers.
MORE: dict[str, dict[str, Any]] = {
    "Qwen2Config": _GROUPED,
    "Gemma2Config": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Phi3Config": _GROUPED,
    "GPTNeoXConfig": _WIDE,
    "Olmo2Config": _GROUPED,
    "BloomConfig": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "NemotronHConfig": _HYBRID,
    "MambaConfig": {**_SIZES, "state_size": 8, "time_step_rank": 4},
}
LAYOUTS = [*CONFIGURATIONS, *MORE]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_source(layout: str, folder: Path, dtype: torch.dtype, shard: str = "20KB") -> Path:
    """A tiny checkpoint of several files, as transformers writes it."""
    import transformers

    known = CONFIGURATIONS.get(layout)
    configuration = known() if known else getattr(transformers, layout)(**MORE[layout])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    network.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def wanda() -> Recipe:
    # Mamba multiplies by the weight of dt_proj without calling it.
    return Recipe.load("wanda").model_copy(update={"ignore": ("dt_proj",)})


def in_memory(source: Path, output: Path, recipe: Recipe, dtype: str) -> Path:
    model = load_model(str(source), dtype=dtype, device="cpu")
    prune(model, recipe, 0.5, windows=WINDOWS)
    return save_model(model, output, files={"recipe.yaml": recipe.to_yaml()})


def streamed(source: Path, output: Path, recipe: Recipe, dtype: str) -> Path:
    done = prune_streamed(source, recipe, 0.5, output, windows=WINDOWS, dtype=dtype, device="cpu")
    return done.folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def numbers(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """File and bits by tensor name, in the order of the files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                tensor = file.get_tensor(name)
                found[name] = path.name, tensor
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def assert_source_with_fewer_numbers(made: Path, source: Path) -> None:
    """All is as in the source, but for half of the numbers of some matrices, which are +0.0."""
    before, after = numbers(source), numbers(made)
    assert list(after) == list(before)
    changed = 0
    for name, (file, old) in before.items():
        assert after[name][0] == file and after[name][1].dtype == old.dtype
        differs = bits(after[name][1]) != bits(old)
        assert not bits(after[name][1])[differs].any(), name
        changed += int(differs.sum())
    assert changed > 1000
    weights = {name for name in digests(source) if name.endswith(".safetensors")}
    others = {key: value for key, value in digests(made).items() if key not in weights}
    others.pop("recipe.yaml")
    assert others == {key: value for key, value in digests(source).items() if key not in weights}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_memory_and_streamed_write_the_same_bytes_whatever_the_dtypes(
    layout: str, dtype: str, tmp_path: Path
) -> None:
    source = save_source(layout, tmp_path / "source", DTYPES[dtype])
    recipe = wanda() if layout == "MambaConfig" else Recipe.load("wanda")
    for computed in ("auto", "bfloat16"):
        one = in_memory(source, tmp_path / f"memory {computed}", recipe, computed)
        other = streamed(source, tmp_path / f"streamed {computed}", recipe, computed)
        assert digests(one) == digests(other)
        assert_source_with_fewer_numbers(one, source)


def edited(folder: Path, **changes: list[tuple[Any, float]]) -> Path:
    """A checkpoint of one file with some numbers set, by tensor name with __ for dots."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, places in changes.items():
        for place, number in places:
            tensors[name.replace("__", ".")][place] = number
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def test_zeros_that_pruning_makes_are_positive_and_others_stay_as_they_are(tmp_path: Path) -> None:
    source = edited(
        save_source("llama", tmp_path / "source", torch.float32, "1GB"),
        model__layers__0__mlp__up_proj__weight=[(np.s_[:, :20], -0.0), ((0, 25), 9.0)],
        model__layers__1__mlp__up_proj__weight=[((0, 0), -0.0)],
        model__norm__weight=[(3, -0.0)],
    )
    recipe = Recipe.load("wanda").model_copy(update={"ignore": ("layers.1.mlp.up_proj",)})
    one = in_memory(source, tmp_path / "memory", recipe, "auto")
    other = streamed(source, tmp_path / "streamed", recipe, "auto")
    assert digests(one) == digests(other)
    saved = load_file(one / "model.safetensors")
    assert torch.signbit(saved[NORM]).sum() == 1
    assert torch.signbit(saved[UP.replace("0", "1")][0, 0])
    assert saved[UP][0, 25] == 9.0
    assert not torch.signbit(saved[UP][saved[UP] == 0]).any()


def test_a_number_too_small_for_the_computation_does_not_come_back_as_kept(tmp_path: Path) -> None:
    source = edited(
        save_source("llama", tmp_path / "source", torch.float32, "1GB"),
        model__layers__0__mlp__up_proj__weight=[(0, 1e-44)],
    )
    made = in_memory(source, tmp_path / "memory", Recipe.load("wanda"), "bfloat16")
    assert not load_file(made / "model.safetensors")[UP][0].any()


def test_mended_numbers_are_rounded_once_and_both_ways_alike(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source", torch.bfloat16, "1GB")
    recipe = Recipe.load("sparsegpt")
    one = in_memory(source, tmp_path / "memory", recipe, "float32")
    assert digests(one) == digests(streamed(source, tmp_path / "streamed", recipe, "float32"))
    # What was measured is what was saved.
    model = load_model(str(source), dtype="float32", device="cpu")
    prune(model, recipe, 0.5, windows=WINDOWS)
    saved = load_file(one / "model.safetensors")
    for layer in find_linears(model.model):
        assert torch.equal(layer.weight, saved[f"{layer.name}.weight"].float())


def test_a_changed_number_that_the_stored_dtype_cannot_hold_is_told(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source", torch.float16)
    model = load_model(str(source), dtype="float32", device="cpu")
    find_linears(model.model)[0].weight[0, 0] = 1e5
    with pytest.raises(ModelError, match="q_proj.weight' holds numbers that float16"):
        save_model(model, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_moved_channels_keep_all_bits_or_are_refused(tmp_path: Path) -> None:
    recipe = Recipe.load("ria_permuted")
    source = save_source("llama", tmp_path / "source", torch.float16, "1GB")
    model = load_model(str(source), dtype="float32", device="cpu")
    known = calibrate(model, WINDOWS, find_linears(model.model), dense_sums([recipe]))
    prune(model, recipe, statistics=known, windows=WINDOWS)
    made = save_model(model, tmp_path / "made")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, made))
    assert after[UP].dtype == torch.float16 and not torch.equal(after[UP] != 0, before[UP] != 0)
    assert set(after[UP].unique().tolist()) <= {0.0, *before[UP].unique().tolist()}
    narrow = load_model(str(source), dtype="bfloat16", device="cpu")
    known = calibrate(narrow, WINDOWS, find_linears(narrow.model), dense_sums([recipe]))
    prune(narrow, recipe, statistics=known, windows=WINDOWS)
    with pytest.raises(ModelError, match="bfloat16 does not hold all numbers of its files"):
        save_model(narrow, tmp_path / "narrow")


def test_tensors_that_are_stored_without_the_prefix_of_the_model_keep_their_names(
    tmp_path: Path,
) -> None:
    source = save_source("gpt2", tmp_path / "source", torch.float32, "1GB")
    file = source / "model.safetensors"
    short = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt", "from": "somewhere"})
    one = in_memory(source, tmp_path / "memory", Recipe.load("wanda"), "auto")
    assert digests(one) == digests(
        streamed(source, tmp_path / "streamed", Recipe.load("wanda"), "auto")
    )
    assert_source_with_fewer_numbers(one, source)
    with safe_open(one / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "from": "somewhere"}


def test_files_in_folders_and_tensors_that_nobody_uses_are_mirrored(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source", torch.bfloat16)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    old = index["weight_map"][UP]
    index["weight_map"] = {
        name: f"parts/{file}" if file == old else file for name, file in index["weight_map"].items()
    }
    tensors = load_file(source / old)
    (source / old).unlink()
    (source / "parts").mkdir()
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **more}, source / "parts" / old, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = Recipe.load("wanda")
    one = in_memory(source, tmp_path / "memory", recipe, "auto")
    assert digests(one) == digests(streamed(source, tmp_path / "streamed", recipe, "auto"))
    assert digests(one).keys() == {*digests(source), "recipe.yaml"}
    saved = load_file(one / "parts" / old)
    assert torch.equal(saved[next(iter(more))], torch.ones(4))
    assert (saved[UP] == 0).float().mean() == 0.5
