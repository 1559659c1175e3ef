"""A saved mixture of experts has the files of its source, with other numbers in the same places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.layouts import Piece
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import count_sparsity, save_model, stored_layers
from prunezero.pruning.prune import prune, settle
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.masking import count_zeros
from tests.tiny_models import tiny_batches
from tests.tiny_moe import MOE_FAMILIES, save_stacked, stacked_model

MAGNITUDE = Recipe.model_validate({"name": "mine", "criterion": "abs(W)"})
FILE = "model.safetensors"


def header(folder: Path) -> bytes:
    content = (folder / FILE).read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_pruned_model_is_saved_in_the_layout_of_its_source_and_read_again(
    family: str, tmp_path: Path
) -> None:
    source = save_stacked(family, tmp_path / "source")
    model = load_model(str(source))
    prune(model, MAGNITUDE, 0.5)
    layers = find_linears(model.model)
    saved = save_model(model, tmp_path / "saved")
    assert header(saved) == header(source)
    again = load_model(str(saved))
    for name, tensor in model.model.state_dict().items():
        assert same_bits(again.model.state_dict()[name], tensor), name
    ids = tiny_batches(2, 16)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, model.model(ids).logits)
    counted = count_sparsity(saved, stored_layers(model, layers, saved))
    assert counted.zeros == sum(count_zeros(layer.weight) for layer in layers)
    assert counted.total == sum(layer.weight.numel() for layer in layers)
    assert counted.negative_zeros == 0


def test_numbers_that_stay_are_those_of_the_file_to_the_last_bit(tmp_path: Path) -> None:
    source = save_stacked("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    model = load_model(str(source), dtype="float32")
    layers = find_linears(model.model, targets=["experts.3.gate_up_proj"])
    before = load_file(source / FILE)
    for layer in layers:
        layer.weight[:4] = 0.1
        layer.weight[90] = -0.0
    settle(model, layers)
    saved = save_model(model, tmp_path / "saved")
    after = load_file(saved / FILE)
    start = "model.layers.1.block_sparse_moe.experts.3"
    # The first rows are the gate's, of 48 rows, and row 90 is one of those behind.
    expected = {f"{start}.w1.weight": slice(0, 4), f"{start}.w3.weight": slice(42, 43)}
    expected |= {name.replace("layers.1", "layers.0"): rows for name, rows in expected.items()}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        changed = (tensor != before[name]).reshape(len(tensor), -1).any(1).nonzero()[:, 0].tolist()
        rows = expected.get(name)
        assert tensor.dtype == torch.bfloat16
        assert changed == ([] if rows is None else list(range(rows.start, rows.stop))), name
    assert (after[f"{start}.w1.weight"][:4] == torch.tensor(0.1).bfloat16()).all()
    assert not torch.signbit(after[f"{start}.w3.weight"][42]).any()
    # What is measured in memory is what is saved.
    assert (layers[0].weight[:4] == torch.tensor(0.1).bfloat16().float()).all()


def test_a_dense_model_is_saved_as_it_was(tmp_path: Path) -> None:
    source = save_stacked("qwen2_moe", tmp_path / "source", dtype=torch.bfloat16)
    saved = save_model(load_model(str(source)), tmp_path / "saved")
    assert (saved / FILE).read_bytes() == (source / FILE).read_bytes()


def test_shards_of_a_mixture_are_mirrored(tmp_path: Path) -> None:
    model = stacked_model("olmoe")
    model.model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    model.tokenizer.save_pretrained(tmp_path / "source")
    loaded = load_model(str(tmp_path / "source"))
    prune(loaded, MAGNITUDE, 0.5)
    saved = save_model(loaded, tmp_path / "saved")
    index = "model.safetensors.index.json"
    told = json.loads((saved / index).read_text())
    assert told == json.loads((tmp_path / "source" / index).read_text())
    assert len(set(told["weight_map"].values())) > 2
    again = load_model(str(saved)).model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert same_bits(again[name], tensor), name


def test_zeros_of_some_experts_are_counted_in_a_file_that_holds_stacks(tmp_path: Path) -> None:
    model = load_model(str(save_stacked("granitemoe", tmp_path / "source")))
    recipe = MAGNITUDE.model_copy(update={"targets": ("experts.1.down_proj",)})
    prune(model, recipe, 0.5)
    layers = find_linears(model.model, targets=recipe.targets)
    saved = save_model(model, tmp_path / "saved")
    counted = count_sparsity(saved, stored_layers(model, layers, saved))
    assert (counted.zeros, counted.total) == (2 * 32 * 24, 2 * 32 * 48)


def test_a_model_without_files_is_saved_by_its_library_and_its_zeros_are_found(
    tmp_path: Path,
) -> None:
    model = stacked_model("mixtral")
    prune(model, MAGNITUDE, 0.5)
    layers = find_linears(model.model)
    saved = save_model(model, tmp_path / "saved")
    counted = count_sparsity(saved, stored_layers(model, layers, saved))
    assert counted.zeros == sum(count_zeros(layer.weight) for layer in layers)
    assert counted.sparsity == 0.5


def test_a_piece_is_rows_of_one_matrix_of_a_stack() -> None:
    stack = torch.arange(3 * 4 * 2).reshape(3, 4, 2)
    piece = Piece("mlp.experts.gate_up_proj", index=2, part=1, parts=2)
    assert piece.matrix == "mlp.experts.2.gate_up_proj.weight"
    piece.of(stack).zero_()
    assert stack[2].tolist() == [[16, 17], [18, 19], [0, 0], [0, 0]]
