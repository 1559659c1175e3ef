"""Blocks read one by one give what the whole model gives, and leave nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunezero.errors import ModelError, OutputError
from prunezero.models.anatomy.linears import find_blocks, find_linears
from prunezero.models.evaluation import evaluate
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.loading.load import load_model, local_folder
from prunezero.models.loading.outline import without_weights
from prunezero.models.loading.shards import Shards, write_shard
from prunezero.models.observing.walk import BlockWalk
from prunezero.models.saving.resumable import ResumableCheckpoint
from prunezero.models.streaming import streamed_model as streaming
from prunezero.models.streaming.evaluation import evaluate_streamed, evaluation_bytes
from prunezero.models.streaming.memory import SPARE_BYTES, memory_need
from prunezero.models.streaming.streamed_model import StreamedModel
from tests.tiny_models import (
    BLOCKS,
    FAMILIES,
    HIDDEN,
    VOCABULARY,
    save_tiny_model,
    tiny_batches,
    tiny_network,
    tiny_tokenizer,
)


def save_sharded(family: str, folder: Path, *, dtype: torch.dtype, **changes: Any) -> Path:
    """A tiny checkpoint of several files."""
    network = tiny_network(family, **changes).to(dtype)
    network.save_pretrained(folder, max_shard_size="20KB")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def change_file(folder: Path, **changes: torch.Tensor | None) -> None:
    """Exchange tensors of a checkpoint of one file; None takes one away."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **{key.replace("__", "."): v for key, v in changes.items()}}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_over_streamed_blocks_equals_the_walk_over_the_loaded_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    folder = save_sharded(family, tmp_path / "model", dtype=getattr(torch, dtype))
    streamed = StreamedModel(folder, dtype=dtype, device="cpu")
    whole = load_model(str(folder), dtype=dtype, device="cpu")
    assert streamed.language_model.dtype == whole.dtype
    with streamed.outlined():
        layers = find_linears(streamed.language_model.model)
    known = find_linears(whole.model)
    assert [layer.name for layer in layers] == [layer.name for layer in known]
    with streamed.outside(), streamed.block(0):
        walk = BlockWalk(streamed.language_model, tiny_batches())
    expected = BlockWalk(whole, tiny_batches())
    for index in range(BLOCKS):
        with streamed.block(index):
            seen = walk.observe_and_advance(index, layers, ["gram"])
        for name, wanted in expected.observe_and_advance(index, known, ["gram"]).items():
            assert torch.equal(seen[name].sums["gram"], wanted.sums["gram"])
        assert all(map(torch.equal, walk.states, expected.states))


def test_only_what_makes_the_inputs_of_blocks_is_read_and_each_block_goes_again(
    tmp_path: Path,
) -> None:
    streamed = StreamedModel(
        save_tiny_model("llama", tmp_path, tie_word_embeddings=False), device="cpu"
    )
    model = streamed.language_model.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    with streamed.outside(), streamed.block(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    inside = {f"model.layers.1.{name}" for name, _ in streamed.blocks[1].named_parameters()}
    assert real == inside | {"model.embed_tokens.weight", "model.norm.weight"}
    with streamed.outside(with_head=True):
        assert not model.lm_head.weight.is_meta
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_block_goes_again_after_an_error(tmp_path: Path) -> None:
    streamed = StreamedModel(save_tiny_model("llama", tmp_path), device="cpu")
    with pytest.raises(ZeroDivisionError), streamed.outside(), streamed.block(0):
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in streamed.language_model.model.parameters())


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    streamed = StreamedModel(save_tiny_model("llama", tmp_path), device="cpu")
    model = streamed.language_model.model
    with streamed.outside():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.lm_head.weight.is_meta
    assert "lm_head.weight" not in streamed.names_outside()


def test_tied_weights_that_are_stored_twice_must_be_equal(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_file(tmp_path, lm_head__weight=embedding.clone())
    outside = StreamedModel(tmp_path, device="cpu").names_outside()
    assert sorted(outside) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    change_file(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(ModelError, match="ties .* but its files hold different numbers"):
        StreamedModel(tmp_path, device="cpu")


def test_a_stored_block_keeps_the_numbers_of_the_source_and_rounds_the_others_once(
    tmp_path: Path,
) -> None:
    folder = save_sharded("llama", tmp_path / "model", dtype=torch.float32)
    streamed = StreamedModel(folder, dtype="bfloat16", device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    known = streamed.shards.read(name)
    with streamed.block(0) as block:
        weight = block.get_parameter("mlp.up_proj.weight")
        assert not torch.equal(weight.float(), known)
        weight[0, 0], weight[0, 1] = -0.0, 1.5
        stored = dict(streamed.stored_block(0))
    assert sorted(stored) == sorted(key for key in streamed.shards.tensors if "layers.0" in key)
    expected = known.clone()
    expected[0, 0], expected[0, 1] = 0.0, 1.5
    assert torch.equal(stored[name].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, "lack 1 weights, 'model.layers.1.mlp"),
        (
            {"model__layers__0__mlp__up_proj__weight": torch.zeros(3, 4)},
            r"shape \[3, 4\] in its file but \[64, 32\] by its configuration",
        ),
        (
            {"model__layers__0__mlp__up_proj__weight": torch.zeros(64, 32, dtype=torch.int8)},
            "stored as I8, which is a quantized",
        ),
    ],
)
def test_files_that_do_not_fit_the_configuration_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path)
    change_file(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        StreamedModel(tmp_path, device="cpu")


def test_weights_shared_between_blocks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = without_weights

    def with_one_weight_twice(configuration: Any, dtype: torch.dtype) -> Any:
        model = usual(configuration, dtype)
        first, second = find_blocks(model)
        first.mlp.up_proj.weight = second.mlp.up_proj.weight  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(streaming, "without_weights", with_one_weight_twice)
    with pytest.raises(ModelError, match="shares weights between its blocks"):
        StreamedModel(save_tiny_model("llama", tmp_path), device="cpu")


def test_a_folder_without_a_model_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json is missing"):
        StreamedModel(tmp_path)
    folder = save_sharded("llama", tmp_path / "model", dtype=torch.float32)
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged or missing"):
        StreamedModel(folder)
    file.unlink()
    with pytest.raises(ModelError, match="is damaged or missing"):
        StreamedModel(folder)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    folder = save_sharded("llama", tmp_path / "model", dtype=torch.float32)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.more.weight"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lack 1 tensors of their index, 'model.more.weight' in "):
        StreamedModel(folder)


def test_weights_on_the_meta_device_are_still_refused_elsewhere(tmp_path: Path) -> None:
    streamed = StreamedModel(save_tiny_model("llama", tmp_path), device="cpu")
    with pytest.raises(ModelError, match="offloaded or not loaded"):
        find_linears(streamed.language_model.model)
    with pytest.raises(ModelError, match="offloaded or not loaded"):
        wrap_model(streamed.language_model.model, tiny_tokenizer(), name="streamed")


def test_the_fingerprint_tells_files_with_equal_headers_apart(tmp_path: Path) -> None:
    digests = {
        Shards(save_tiny_model("llama", tmp_path / str(seed), seed=seed % 2)).fingerprint()
        for seed in range(4)
    }
    assert len(digests) == 2


def test_the_memory_need_adds_up_weights_sums_and_states(tmp_path: Path) -> None:
    streamed = StreamedModel(
        save_tiny_model("llama", tmp_path, tie_word_embeddings=False), device="cpu"
    )
    with streamed.outlined():
        layers = find_linears(streamed.language_model.model)
    need = memory_need(streamed, layers, ["gram", "input_square_sum"], tiny_batches(3, 16))
    assert need.outside == 4 * (2 * VOCABULARY * HIDDEN + HIDDEN)
    # q and o, k and v with half the heads, three of the perceptron, two norms
    assert need.block == 4 * (2 * HIDDEN**2 + HIDDEN**2 + 3 * 64 * HIDDEN + 2 * HIDDEN)
    inputs = [HIDDEN] * 6 + [64]
    assert need.statistics == sum(2 * 4 * width**2 + 8 * width for width in inputs)
    assert need.states == 3 * 16 * HIDDEN * 4
    assert need.total > need.outside + need.block + need.statistics + need.states
    assert not any(layer.weight.device.type != "meta" for layer in layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_perplexity_is_that_of_the_loaded_model(
    family: str, is_tied: bool, dtype: str, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": is_tied}
    folder = save_sharded(family, tmp_path / "model", dtype=getattr(torch, dtype), **changes)
    ids = tiny_batches(3, 24)
    measured = evaluate_streamed(folder, ids, dtype=dtype, device="cpu")
    expected = evaluate(load_model(str(folder), dtype=dtype, device="cpu"), ids)
    assert measured.window_losses == pytest.approx(expected.window_losses, rel=1e-6)
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert (measured.tokens, measured.kl) == (expected.tokens, None)


def test_capped_logits_are_measured_as_the_model_computes_them(tmp_path: Path) -> None:
    save_tiny_model("gemma3", tmp_path, final_logit_softcapping=0.05)
    ids = tiny_batches(2, 24)
    expected = evaluate(load_model(str(tmp_path), dtype="float32", device="cpu"), ids)
    measured = evaluate_streamed(tmp_path, ids, device="cpu")
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_measuring_leaves_no_weights_behind_and_can_be_repeated(tmp_path: Path) -> None:
    streamed = StreamedModel(save_tiny_model("llama", tmp_path), device="cpu")
    told: list[tuple[str, int, int]] = []
    first = evaluate_streamed(
        streamed,
        tiny_batches(),
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert told == [("blocks walked", 1, 2), ("blocks walked", 2, 2)]
    model = streamed.language_model.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert evaluate_streamed(streamed, tiny_batches()).window_losses == first.window_losses


def test_a_model_that_blew_up_has_no_perplexity(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    # Finite, but not its products.
    weight = torch.full((64, HIDDEN), 3e38)
    change_file(tmp_path, model__layers__1__mlp__up_proj__weight=weight)
    measured = evaluate_streamed(tmp_path, tiny_batches(), device="cpu")
    assert math.isnan(measured.perplexity)


def test_the_memory_for_measuring_adds_up_states_weights_and_logits(tmp_path: Path) -> None:
    streamed = StreamedModel(
        save_tiny_model("llama", tmp_path, tie_word_embeddings=False), device="cpu"
    )
    outside = 4 * (2 * VOCABULARY * HIDDEN + HIDDEN)
    work = max(16 * VOCABULARY * 12, VOCABULARY * HIDDEN * 4)
    sizes = [evaluation_bytes(streamed, tiny_batches(count, 16)) for count in (1, 3)]
    assert sizes[1] - sizes[0] == 2 * 16 * HIDDEN * 4
    block = streamed.weight_bytes()[1]
    expected = 3 * 16 * HIDDEN * 4 + max(block, outside + work)
    assert sizes[1] == SPARE_BYTES + expected


def test_a_local_model_has_a_folder_and_a_hub_id_has_none(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="hf download some/model --local-dir FOLDER"):
        local_folder("some/model")
    with pytest.raises(ModelError, match="there is no model folder './nothing'"):
        local_folder("./nothing")
    with pytest.raises(ModelError, match="there is no file 'nothing.gguf'"):
        local_folder("nothing.gguf")


def test_an_unfinished_checkpoint_goes_on_behind_its_last_finished_part(tmp_path: Path) -> None:
    folder = save_sharded("llama", tmp_path / "model", dtype=torch.float32)
    source, request = Shards(folder), {"recipe": "a", "sparsity": 0.5}
    names = list(source.tensors)
    first = ResumableCheckpoint(tmp_path / "out", request, source)
    assert first.finished() == 0
    first.copy(names[:3])
    first.write(1, [(names[3], source.read(names[3]) + 1)])
    again = ResumableCheckpoint(tmp_path / "out", request, source)
    assert again.finished() == 2
    assert torch.equal(again.shards().read(names[3]), source.read(names[3]) + 1)
    assert not again.shards().read(names[4]).any()
    again.write(2, [(name, source.read(name)) for name in names[4:]])
    again.complete(folder, ours=["note.txt"])
    again.add_files({"note.txt": "mine"})
    published = again.publish()
    have = {file.name: file.read_bytes() for file in folder.iterdir()}
    made = {file.name: file.read_bytes() for file in published.iterdir()}
    assert made.pop("note.txt") == b"mine"
    changed = source.tensors[names[3]].file
    assert made.keys() == have.keys()
    assert {name for name in have if made[name] != have[name]} == {changed}
    assert len(made[changed]) == len(have[changed])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_unfinished_checkpoint_whose_files_are_damaged_begins_anew(tmp_path: Path) -> None:
    source = Shards(save_tiny_model("llama", tmp_path / "model"))
    first = ResumableCheckpoint(tmp_path / "out", {}, source)
    first.copy(source.tensors)
    file = first.model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert ResumableCheckpoint(tmp_path / "out", {}, source).finished() == 0


def test_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    source = Shards(save_tiny_model("llama", tmp_path / "model"))
    ResumableCheckpoint(tmp_path / "out", {"sparsity": 0.5, "recipe": "a"}, source)
    with pytest.raises(OutputError, match=r"another request \(sparsity: 0.5, now 0.6\)"):
        ResumableCheckpoint(tmp_path / "out", {"sparsity": 0.6, "recipe": "a"}, source)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    source = Shards(save_tiny_model("llama", tmp_path / "model"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="is not empty and says nothing of what it holds"):
        ResumableCheckpoint(tmp_path / "out", {}, source)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "keep me"


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_shard(tmp_path / "none" / "shard.safetensors", {"a": torch.ones(2)})
    assert not list(tmp_path.iterdir())
