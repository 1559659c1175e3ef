"""Layers of different sizes compute what zeros do, in memory and from a folder of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy import attention
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import SMALLER, sliced, slices_of
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model
from prunezero.models.loading.shards import Shards
from prunezero.models.saving.read_back import refuse_other_reading
from prunezero.models.saving.save import save_model
from prunezero.models.unequal.families import class_files
from tests.models.test_mlp import groups_of
from tests.tiny_models import tiny_batches
from tests.unequal import (
    ALL,
    OF_FIXED_WIDTH,
    WITHOUT_MLP,
    kv_groups,
    unequal,
    unequal_model,
)

CHOICES = ("neurons", "heads", "both", "attention", "mlp")
CASES = [
    (layout, what)
    for layout in ALL
    for what in CHOICES
    if what in ("neurons", "attention") or layout not in OF_FIXED_WIDTH
]
LOADED = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(sys.argv[1])
    with torch.no_grad():
        logits = model(ids).logits
    new = [
        model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=use)[0].tolist()
        for use in (True, False)
    ]
    model.set_attn_implementation("eager")
    ways = {one.config._attn_implementation for one in model.modules() if hasattr(one, "config")}
    found[folder] = {"logits": logits, "new": new, "ways": ways}
torch.save(found, sys.argv[1])
"""


def prepared(layout: str, what: str) -> tuple[LanguageModel, Selection]:
    model = unequal_model(layout)
    if what in ("attention", "mlp"):
        # A bias that nothing takes over would be lost with the whole part.
        for linear in find_linears(model.model):
            if linear.bias is not None:
                linear.bias.zero_()
    return model, unequal(model, what)


def generated(model: Any, ids: Tensor) -> list[list[int]]:
    return [
        model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=use)[0].tolist()
        for use in (True, False)
    ]


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("layout", ALL)
def test_a_model_with_unequal_layers_computes_what_the_zeroed_one_does(
    layout: str, what: str
) -> None:
    if what == "mlp" and layout in WITHOUT_MLP:
        pytest.skip("its MLP is no module of its own")
    model, selection = prepared(layout, what)
    ids, network = tiny_batches(2), model.model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dense, config = network(ids).logits, network.config.to_dict()
    with zeroed(model, selection):
        simulated = network(ids).logits
    with sliced(model, selection):
        smaller = network(ids).logits
        cached, anew = generated(network, ids)
        left = sum(one.numel() for one in network.parameters())
    torch.testing.assert_close(smaller, simulated, rtol=1e-5, atol=1e-5)
    assert cached == anew
    assert float((simulated - dense).abs().max()) > 1e-3
    assert left < sum(one.numel() for one in network.parameters())
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(network(ids).logits, dense) and network.config.to_dict() == config


@pytest.mark.parametrize(("layout", "what"), CASES)
def test_a_saved_folder_is_read_back_without_running_its_files(
    layout: str, what: str, tmp_path: Path
) -> None:
    model, selection = prepared(layout, what)
    ids = tiny_batches(2)
    with sliced(model, selection):
        expected = model.model(ids).logits
        tokens = generated(model.model, ids)
    save_model(model, tmp_path / "out", smaller=selection)
    for file in ("configuration_pruned.py", "modeling_pruned.py"):
        assert "prunezero" not in (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text("raise SystemExit('foreign code was run')")
    found = load_model(str(tmp_path / "out"), device="cpu")
    assert float((found.model(ids).logits - expected).abs().max()) == 0.0
    assert generated(found.model, ids) == tokens
    stored = Shards(tmp_path / "out").tensors
    assert sum(torch.Size(one.shape).numel() for one in stored.values()) == sum(
        one.numel() for one in found.model.parameters()
    )


def test_a_fresh_process_loads_every_family_by_the_files_of_the_folder(tmp_path: Path) -> None:
    expected: dict[str, tuple[Tensor, list[list[int]]]] = {}
    ids = tiny_batches(2)
    for layout in ALL:
        what = "attention" if layout in OF_FIXED_WIDTH else "both"
        model, selection = prepared(layout, what)
        folder = str(tmp_path / layout)
        save_model(model, folder, smaller=selection)
        with sliced(model, selection):
            expected[folder] = model.model(ids).logits, generated(model.model, ids)
    torch.save(ids, tmp_path / "ids.pt")
    words = [sys.executable, "-c", LOADED, str(tmp_path / "ids.pt"), *expected]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "ids.pt")
    assert found.keys() == expected.keys() and len(found) >= 8
    for folder, (logits, tokens) in expected.items():
        assert float((found[folder]["logits"] - logits).abs().max()) == 0.0, folder
        assert found[folder]["new"] == tokens, folder
        assert found[folder]["ways"] == {"eager"}, folder


def test_a_configuration_says_only_what_differs_and_has_a_type_of_its_own(tmp_path: Path) -> None:
    model, selection = prepared("llama", "attention")
    model.model.save_pretrained(tmp_path / "dense")
    model.tokenizer.save_pretrained(tmp_path / "dense")
    model = load_model(str(tmp_path / "dense"), device="cpu")
    selection = unequal(model, "attention")
    save_model(model, tmp_path / "out", smaller=selection)
    before = json.loads((tmp_path / "dense" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["per_layer_config"] == {
        "0": {"intermediate_size": 42, "skip": ["attention"]},
        "1": {"intermediate_size": 48},
    }
    assert after["model_type"] == "pruned_llama"
    assert after["auto_map"]["AutoModelForCausalLM"] == "modeling_pruned.PrunedLlamaForCausalLM"
    # A usual class would build all of the attention that went, without a word.
    changed = {"architectures", "auto_map", "model_type", "per_layer_config"}
    assert {key for key in after if after[key] != before.get(key)} <= changed
    stored = Shards(tmp_path / "out").tensors
    assert not [name for name in stored if name.startswith("model.layers.0.self_attn")]
    assert "model.layers.0.input_layernorm.weight" in stored


def test_shards_and_their_index_lack_what_went(tmp_path: Path) -> None:
    model, _ = prepared("mistral", "attention")
    model.model.bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    model.tokenizer.save_pretrained(tmp_path / "dense")
    model = load_model(str(tmp_path / "dense"), dtype="float32", device="cpu")
    selection = unequal(model, "attention")
    save_model(model, tmp_path / "out", smaller=selection)
    dense, smaller = Shards(tmp_path / "dense"), Shards(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == smaller.tensors.keys()
    assert index["metadata"]["total_size"] == sum(one.bytes for one in smaller.tensors.values())
    gone = dense.tensors.keys() - smaller.tensors.keys()
    assert gone == {f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkvo"}
    with sliced(model, selection) as slices:
        for name, tensor in smaller.tensors.items():
            cut = slices.cuts.get(name)
            whole = dense.read(name)
            kept = whole if cut is None else cut.of(whole)
            assert tensor.dtype == "BF16"
            assert torch.equal(smaller.read(name).view(torch.int16), kept.view(torch.int16))


def test_a_model_with_unequal_layers_can_be_pruned_and_saved_again(tmp_path: Path) -> None:
    model, selection = prepared("qwen3", "mlp")
    save_model(model, tmp_path / "first", smaller=selection)
    again = load_model(str(tmp_path / "first"), device="cpu")
    (group,) = groups_of(again)
    assert (group.block, group.units) == (1, 64)
    fewer = Selection((group,), (torch.arange(64) > 5,))
    with sliced(again, fewer):
        expected = again.model(tiny_batches(1)).logits
    save_model(again, tmp_path / "second", smaller=fewer)
    told = json.loads((tmp_path / "second" / "config.json").read_text())
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    # All layers that have an MLP are alike.
    assert told["intermediate_size"] == 58
    assert told["per_layer_config"] == {"0": {"skip": ["mlp"]}, "1": heads}
    # Zeros alone change no size, and the classes come along.
    save_model(load_model(str(tmp_path / "second"), device="cpu"), tmp_path / "third")
    for folder in ("second", "third"):
        assert refuse_other_reading(tmp_path / folder, again, tiny_batches(1), expected) == 0.0
        assert (tmp_path / folder / "modeling_pruned.py").is_file()


@pytest.mark.parametrize("layout", OF_FIXED_WIDTH)
def test_heads_that_no_configuration_can_say_are_refused_by_name(
    layout: str, tmp_path: Path
) -> None:
    model, selection = prepared(layout, "heads")
    assert "no configuration of" in slices_of(model, selection).fault
    with pytest.raises(ModelError, match=f"no configuration of {layout} gives its layers"):
        save_model(model, tmp_path / "out", smaller=selection)
    assert not (tmp_path / "out").exists()


def test_heads_that_go_alike_everywhere_keep_a_plain_class_where_that_takes_them(
    tmp_path: Path,
) -> None:
    """A Llama says that the hidden size, 32 here, is a multiple of the heads, of which 3 stay."""
    ids = tiny_batches(1)
    for layout, is_plain in (("mistral", True), ("llama", False)):
        model = unequal_model(layout, num_key_value_heads=4)
        groups = kv_groups(model)
        selection = Selection(tuple(groups), (torch.arange(4) > 0,) * len(groups))
        with sliced(model, selection) as slices:
            expected = model.model(ids).logits
            told = {"num_attention_heads": 3, "num_key_value_heads": 3}
            assert slices.setting == ({**told, "head_dim": 8} if is_plain else {})
            assert slices.layers == ({} if is_plain else {0: told, 1: told})
        save_model(model, tmp_path / layout, smaller=selection)
        assert (tmp_path / layout / "modeling_pruned.py").is_file() != is_plain
        assert json.loads((tmp_path / layout / "config.json").read_text())["head_dim"] == 8
        assert refuse_other_reading(tmp_path / layout, model, ids, expected) == 0.0


def test_what_would_lose_a_bias_or_is_no_part_is_not_left_out() -> None:
    model = unequal_model("gpt2")
    with pytest.raises(ModelError, match=r"'transformer\.h\.0\.attn\.c_proj' has a bias that"):
        slices_of(model, unequal(model, "attention"))
    other, selection = prepared("opt", "mlp")
    with pytest.raises(ModelError, match="it is no part that can be left out; keep one unit"):
        slices_of(other, selection)


def test_what_differs_does_not_become_smaller_for_good_in_memory() -> None:
    model, selection = prepared("llama", "neurons")
    with pytest.raises(ModelError, match="no configuration of llama gives its layers the widths"):
        SMALLER.remove(model, selection)


def test_a_folder_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model, selection = prepared("llama", "neurons")
    ids = tiny_batches(1)
    dense = model.model(ids).logits
    save_model(model, tmp_path / "out", smaller=selection)
    with pytest.raises(ModelError, match="computes something else than the model that was saved"):
        refuse_other_reading(tmp_path / "out", model, ids, dense)


def test_the_files_of_a_class_are_short_and_plain() -> None:
    for layout, is_rotated, count in (
        ("pruned_llama", True, 3),
        ("pruned_llama", False, 2),
        ("pruned_gpt2", False, 2),
        ("pruned_mixtral", False, 3),
    ):
        files = class_files(layout, is_rotated=is_rotated)
        assert len(files) == count
        for text in files.values():
            compile(text, layout, "exec")
            assert "prunezero" not in text and "pickle" not in text
            assert len(text.splitlines()) <= 140


def test_a_setting_that_was_not_there_is_not_there_afterwards() -> None:
    model = unequal_model("qwen2")
    config = model.model.config
    groups = attention.kv_groups(find_linears(model.model), model)
    before = dict(vars(config))
    assert "head_dim" not in before
    kept = tuple(torch.arange(group.units) > 0 for group in groups)
    with sliced(model, Selection(tuple(groups), kept)):
        assert config.head_dim == 8
    assert dict(vars(config)) == before
