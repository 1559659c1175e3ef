"""A pruned folder is its source with fewer numbers, whoever writes it and whatever computed it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prunezero.models.loading import load_model
from prunezero.models.saving import save_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipe import Recipe
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
    return Recipe.load("wanda").model_copy(update={"ignore": ("re:no such layer|dt_proj",)})


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
