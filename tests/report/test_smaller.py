"""A model without its neurons reaches the disk, and plain transformers loads it, really smaller."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.load import load_model
from prunezero.models.saving import save as saving
from prunezero.models.saving.save import save_model
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import check_recipe, dense_sums
from prunezero.pruning.testbed import Testbed
from prunezero.report.export.saved_model import SavedUnits, note_gguf, save_smaller
from tests.models.test_mlp import noisy
from tests.searching.testbed import SETTINGS, tiny_testbed, tiny_text
from tests.tiny_gguf import write_gguf
from tests.tiny_models import (
    BLOCKS,
    LAYOUTS,
    save_tiny_model,
    tiny_batches,
    tiny_network,
    tiny_tokenizer,
)

WANDA_SP = Recipe.load("wanda_sp")
WIDTHS = {"gpt2": ("n_inner", 103), "opt": ("ffn_dim", 52)}
LOADED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""


def bench(model: Any) -> Testbed:
    return Testbed(model, tiny_text(), SETTINGS)


def pruned(testbed: Testbed, chosen: Recipe = WANDA_SP) -> tuple[list[dict[str, Any]], Selection]:
    """The rows of the dense and the pruned model, which is kept, and what stays of it."""
    layers = check_recipe(testbed.language_model, chosen, 0.2)
    runner = RecipeRunner(testbed, testbed.statistics(layers, dense_sums([chosen])))
    rows = [runner.dense_row(("test",)), runner.row(chosen, 0.2, ("test",), keep=True)]
    assert runner.outcome is not None
    return rows, runner.outcome.selection


def saved(testbed: Testbed, folder: Path, chosen: Recipe = WANDA_SP) -> SavedUnits:
    rows, selection = pruned(testbed, chosen)
    return save_smaller(testbed, chosen, rows, selection, folder)


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("is_from_files", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_transformers_loads_the_smaller_model(
    layout: str, is_from_files: bool, tmp_path: Path
) -> None:
    testbed = tiny_testbed(layout)
    if is_from_files:
        noisy(testbed.language_model).model.save_pretrained(tmp_path / "dense")
        testbed.language_model.tokenizer.save_pretrained(tmp_path / "dense")
        testbed = bench(load_model(str(tmp_path / "dense"), device="cpu"))
        assert testbed.language_model.source is not None
    else:
        noisy(testbed.language_model)
    model, ids = testbed.language_model.model, tiny_batches(2)
    dense = model(ids).logits
    parameters = sum(one.numel() for one in model.parameters())
    told = saved(testbed, tmp_path / "out")
    simulated = model(ids).logits
    found = loaded(tmp_path / "out")
    torch.testing.assert_close(found(ids).logits, simulated, rtol=1e-5, atol=1e-5)
    assert float((simulated - dense).abs().max()) > 1e-3
    key, width = WIDTHS.get(layout, ("intermediate_size", 52))
    assert getattr(found.config, key) == width
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == width
    # One row of each producer with its bias, one column of the consumer, for each neuron.
    group = {"gpt2": 2 * 32 + 1, "opt": 2 * 32 + 1, "gpt_neox": 2 * 32 + 1}.get(layout, 3 * 32)
    gone = BLOCKS * (128 - 103 if layout == "gpt2" else 64 - 52) * group
    left = sum(one.numel() for one in found.parameters())
    assert parameters - left == gone
    assert (told.dense.parameters, told.costs.parameters) == (parameters, left)
    assert told.stored == sum(one.numel() for one in stored(tmp_path / "out").values())
    assert told.costs.flops < told.dense.flops
    # The model in memory keeps its size and its configuration.
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert torch.equal(model(ids).logits, simulated)
    cached, anew = (
        found.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, anew)


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    testbed, ids = tiny_testbed("phi3"), tiny_batches(2)
    noisy(testbed.language_model)
    saved(testbed, tmp_path / "out")
    torch.save(ids, tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", LOADED, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = testbed.language_model.model(ids).logits
    torch.testing.assert_close(torch.load(files[2]), expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_stay_keep_all_bits_of_their_files(tmp_path: Path) -> None:
    """Shards in bfloat16 with an index, computed in float32."""
    network: Any = tiny_network("llama", tie_word_embeddings=False).bfloat16()
    network.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    before = stored(tmp_path / "dense")
    files = sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors"))
    assert len(files) > 2
    testbed = bench(load_model(str(tmp_path / "dense"), dtype="float32", device="cpu"))
    rows, selection = pruned(testbed)
    save_smaller(testbed, WANDA_SP, rows, selection, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    expected = dict(before)
    for group, kept in selection:
        for member in group.members:
            name = f"{member.linear.name}.weight"
            rows_kept = before[name][kept] if member.axis == 0 else before[name][:, kept]
            expected[name] = rows_kept
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].view(torch.int16), value.contiguous().view(torch.int16))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in after.values())
    assert loaded(tmp_path / "out")(tiny_batches(1)).logits.isfinite().all()


def test_a_bias_that_takes_over_a_mean_is_saved_with_smaller_tensors(tmp_path: Path) -> None:
    chosen = validated(
        Recipe, {**Recipe.load("flap").model_dump(by_alias=True), "compare": "group"}, "mine"
    )
    save_tiny_model("llama", tmp_path / "dense")
    for testbed in (bench(load_model(str(tmp_path / "dense"), device="cpu")), tiny_testbed()):
        folder = tmp_path / testbed.language_model.name.replace("/", "-")
        saved(testbed, folder, chosen)
        found, ids = loaded(folder), tiny_batches(2)
        assert found.config.mlp_bias and found.config.intermediate_size == 52
        down = found.model.layers[1].mlp.down_proj
        assert down.bias.any() and down.weight.shape == (32, 52)
        assert found.model.layers[0].mlp.gate_proj.bias.shape == (52,)
        expected = testbed.language_model.model(ids).logits
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_report_and_the_card_tell_units_and_what_they_cost(tmp_path: Path) -> None:
    testbed = tiny_testbed()
    saved(testbed, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = report["rows"][1]
    assert row["sparsity_reached"] is None and row["removed"] == 12 / 64
    assert (row["unit"], row["units"], row["units_removed"]) == ("neuron", 128, 24)
    assert row["removed_of"] == "parameters of neurons"
    before, after = report["dense_costs"], report["costs"]
    assert before["parameters"] - after["parameters"] == 24 * 96
    assert before["flops"] - after["flops"] == 24 * 96 * 2
    assert before["kv_bytes"] == after["kv_bytes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the neurons with the lowest value of this formula are gone" in card
    assert f"{after['parameters']:,} parameters of {before['parameters']:,}" in card
    assert "Zeros do not make" not in card and "sparse" not in card.split("---")[1]
    assert report["saved"]["kind"] == "plain" and report["saved"]["largest_difference"] < 1e-5
    assert "trust_remote_code" not in card and "logits for 16 tokens compared" in card
    assert "18.75%" in card and Recipe.load(tmp_path / "out" / "recipe.yaml") == WANDA_SP


def test_widths_that_differ_are_saved_with_a_class_of_their_own(tmp_path: Path) -> None:
    testbed = tiny_testbed()
    chosen = validated(Recipe, {**WANDA_SP.model_dump(by_alias=True), "statistics": "dense"}, "it")
    uneven = validated(Recipe, {**chosen.model_dump(by_alias=True), "compare": "model"}, "uneven")
    noisy(testbed.language_model)
    rows, selection = pruned(testbed, uneven)
    counts = {int(kept.sum()) for kept in selection.kept}
    assert len(counts) > 1
    told = save_smaller(testbed, uneven, rows, selection, tmp_path / "out")
    assert (told.form.kind, told.form.largest_difference) == ("own_class", 0.0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["saved"]["kind"] == "own_class" and report["saved"]["largest_difference"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "differ by at most 0." in card
    left = sum(one.numel() for one in stored(tmp_path / "out").values())
    assert left == told.stored == told.costs.parameters < told.dense.parameters
    # At full size plain classes load any widths.
    save_model(testbed.language_model, tmp_path / "padded")
    ids = tiny_batches(1)
    expected = testbed.language_model.model(ids).logits
    torch.testing.assert_close(loaded(tmp_path / "padded")(ids).logits, expected)
    sizes = [prod(one.shape) for one in stored(tmp_path / "padded").values()]
    assert sum(sizes) == sum(one.numel() for one in testbed.language_model.model.parameters())


def test_the_card_and_the_report_tell_of_a_file_for_llama_cpp(tmp_path: Path) -> None:
    testbed = tiny_testbed()
    saved(testbed, tmp_path / "out")
    before = json.loads((tmp_path / "out" / "report.json").read_text())
    note_gguf(tmp_path / "out", tmp_path / "it.gguf")
    after = json.loads((tmp_path / "out" / "report.json").read_text())
    assert after == {**before, "gguf": "it.gguf"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.endswith("is `it.gguf`, a GGUF file of the architecture `deci`.\n")


def test_a_runner_has_the_dense_model_back_and_its_next_recipe_sees_all_of_it() -> None:
    testbed = tiny_testbed("opt")
    noisy(testbed.language_model)
    before = {name: one.clone() for name, one in testbed.language_model.model.state_dict().items()}
    layers = find_linears(testbed.language_model.model)
    runner = RecipeRunner(testbed, testbed.statistics(layers, dense_sums([WANDA_SP])))
    first, weights, again = (
        runner.row(Recipe.load(name), 0.2, ("test",))
        for name in ("neuron_magnitude", "magnitude", "neuron_magnitude")
    )
    after = testbed.language_model.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert first["test_perplexity"] == again["test_perplexity"]
    assert "unit" not in weights and weights["sparsity_reached"] is not None


def test_a_model_that_came_as_gguf_is_saved_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path / "cache"))
    network: Any = tiny_network("llama", tie_word_embeddings=False)
    settings = {**network.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    path = write_gguf(tmp_path / "model.gguf", network.state_dict(), settings)
    testbed = bench(load_model(str(path), device="cpu"))
    saved(testbed, tmp_path / "out")
    found, ids = loaded(tmp_path / "out"), tiny_batches(2)
    assert found.config.intermediate_size == 52
    expected = testbed.language_model.model(ids).logits
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_saved_smaller_model_can_be_pruned_again(tmp_path: Path) -> None:
    testbed = tiny_testbed("qwen3")
    saved(testbed, tmp_path / "first")
    again = bench(load_model(str(tmp_path / "first"), device="cpu"))
    rows, selection = pruned(again)
    assert [group.units for group in selection.groups] == [52, 52]
    save_smaller(again, WANDA_SP, rows, selection, tmp_path / "second")
    # A fifth of 52 is 10.
    assert loaded(tmp_path / "second").config.intermediate_size == 42
    assert (tmp_path / "second" / "report.source.json").exists()


def test_a_configuration_that_does_not_take_the_width_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "dense")
    testbed = bench(load_model(str(tmp_path / "dense"), device="cpu"))
    rows, selection = pruned(testbed)
    monkeypatch.setattr(saving, "edit_configuration", lambda *words, **named: None)
    with pytest.raises(ModelError, match="says intermediate_size 64 even when it is told 52"):
        save_smaller(testbed, WANDA_SP, rows, selection, tmp_path / "out")
    assert not (tmp_path / "out").exists()
