"""A .gguf file of layers that differ holds what llama.cpp reads, and llama.cpp writes on alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from prunezero.errors import ModelError, OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.gguf import demo_file
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.loading.shards import Shards
from prunezero.models.saving.gguf_deci import refuse_without_deci, write_deci
from prunezero.models.saving.gguf_tokenizer import (
    WAYS_TO_CUT,
    refuse_without_fields,
    tokenizer_fields,
)
from prunezero.models.saving.save import save_model
from prunezero.pruning.kinds import UNITS
from tests.llama_cpp import ABSENT, greedy, package
from tests.models.test_mlp import groups_of
from tests.models.test_unequal import prepared
from tests.tiny_models import VOCABULARY, tiny_batches
from tests.unequal import kv_groups, unequal, unequal_model

FAMILIES = ("llama", "mistral", "qwen2")


def bpe_tokenizer(cut: str = "smollm") -> Any:
    """A byte-level BPE tokenizer of as many words as the tiny models know."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters[: VOCABULARY - 4], "Ċ", "ab"]
    model = models.BPE({word: index for index, word in enumerate(words)}, [("a", "b")])
    tokenizer = Tokenizer(model)
    steps: dict[str, Callable[[Any], Any]] = {
        "ByteLevel": lambda word: pre_tokenizers.ByteLevel(False, use_regex=word),
        "Digits": lambda word: pre_tokenizers.Digits(individual_digits=word),
        "Split": lambda word: pre_tokenizers.Split(Regex(word), "isolated"),
    }
    made = [steps[name](word) for name, word in WAYS_TO_CUT[cut]]
    tokenizer.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def saved(model: LanguageModel, selection: Selection, folder: Path) -> Path:
    """A folder and, beside it, the .gguf file of a model without some units."""
    worded = wrap_model(model.model, bpe_tokenizer(), name="tiny")
    save_model(worded, folder, smaller=selection)
    path = folder.with_suffix(".gguf")
    write_deci(folder, path, worded.tokenizer, None)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of a .gguf file, float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        one.name: torch.from_numpy(np.array(dequantize(one.data, one.tensor_type)))
        for one in reader.tensors
    }
    return fields, tensors


def turned(heads: Tensor) -> Tensor:
    """Rows [heads, size, ...] of queries or keys: of each head 0, 4, 1, 5, 2, 6, 3, 7."""
    return heads[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(0, 1)


@pytest.mark.parametrize("layout", FAMILIES)
def test_sizes_are_told_layer_by_layer_and_rows_of_heads_are_turned(
    layout: str, tmp_path: Path
) -> None:
    model, selection = prepared(layout, "both")
    fields, tensors = read(saved(model, selection, tmp_path / "out"))
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2]
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [42, 48]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"deci.{key}"] == 8
    assert fields["deci.block_count"] == 2 and fields["deci.embedding_length"] == 32
    # Within its window a Mistral computes what a model without windows does.
    assert fields["deci.context_length"] == (8 if layout == "mistral" else 64)
    shards = Shards(tmp_path / "out")
    is_tied = model.model.config.tie_word_embeddings
    assert ("output.weight" in tensors) != is_tied
    queries = shards.read("model.layers.1.self_attn.q_proj.weight")
    assert torch.equal(tensors["blk.1.attn_q.weight"], turned(queries.view(2, 8, 32)))
    keys = shards.read("model.layers.0.self_attn.k_proj.weight")
    assert torch.equal(tensors["blk.0.attn_k.weight"], turned(keys.view(2, 8, 32)))
    for ours, theirs in (
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        stored = shards.read(f"model.layers.1.{ours}.weight")
        assert torch.equal(tensors[f"blk.1.{theirs}.weight"], stored)
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == (6 if layout == "qwen2" else 0)
    if biases:
        bias = shards.read("model.layers.0.self_attn.q_proj.bias")
        assert torch.equal(tensors["blk.0.attn_q.bias"], turned(bias.view(4, 8)))


def test_what_went_as_a_whole_leaves_no_head_and_one_channel_of_zeros(tmp_path: Path) -> None:
    model = unequal_model("llama")
    attention, mlp = kv_groups(model)[1], groups_of(model)[0]
    none, some = torch.zeros(2, dtype=torch.bool), torch.arange(64) > 9
    second = Selection((attention, mlp), (none, some))
    fields, tensors = read(saved(model, second, tmp_path / "second"))
    assert fields["deci.attention.head_count"] == [4, 0]
    assert fields["deci.attention.head_count_kv"] == [2, 0]
    assert not [name for name in tensors if name.startswith("blk.1.attn")]
    # llama.cpp reads the size of a head only if the first layer has one.
    fields, tensors = read(saved(model, unequal(model, "attention"), tmp_path / "first"))
    assert fields["deci.attention.head_count"] == [1, 4]
    assert fields["deci.attention.head_count_kv"] == [1, 2]
    assert tensors["blk.0.attn_q.weight"].shape == (8, 32)
    assert not tensors["blk.0.attn_output.weight"].any()
    # At width 0 it would pass over the attention too.
    fields, tensors = read(saved(model, unequal(model, "mlp"), tmp_path / "mlp"))
    assert fields["deci.feed_forward_length"] == [1, 64]
    for name, shape in (("gate", (1, 32)), ("up", (1, 32)), ("down", (32, 1))):
        zeros = tensors[f"blk.0.ffn_{name}.weight"]
        assert zeros.shape == shape and not zeros.any()


@pytest.mark.parametrize("unit", ["attention", "mlp", "block", "layer"])
def test_parts_of_the_depth_that_went_leave_no_heads_and_one_channel(
    unit: str, tmp_path: Path
) -> None:
    model = unequal_model("llama", num_hidden_layers=3)
    groups = UNITS[unit].groups(find_linears(model.model), model)
    # Of blocks both halves of the last one.
    gone = groups[-2:] if unit == "block" else groups[1:2]
    selection = Selection(tuple(gone), (torch.zeros(1, dtype=torch.bool),) * len(gone))
    fields, tensors = read(saved(model, selection, tmp_path / "out"))
    heads, widths = {
        "attention": ([4, 0, 4], [64, 64, 64]),
        "mlp": ([4, 4, 4], [64, 1, 64]),
        "block": ([4, 4, 0], [64, 64, 1]),
        "layer": ([4, 4], [64, 64]),
    }[unit]
    assert fields["deci.attention.head_count"] == heads
    assert fields["deci.feed_forward_length"] == widths
    assert sum(name.endswith("attn_q.weight") for name in tensors) == sum(map(bool, heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_keep_their_dtype_and_vectors_are_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    model, selection = prepared("llama", "neurons")
    model.model.to(dtype)
    path = saved(model, selection, tmp_path / "out")
    word = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    for tensor in GGUFReader(path).tensors:
        assert tensor.tensor_type.name == ("F32" if len(tensor.shape) == 1 else word)
    _, tensors = read(path)
    down = Shards(tmp_path / "out").read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(tensors["blk.0.ffn_down.weight"], down.float())


def test_scaled_positions_are_told(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32}
    model = unequal_model("llama", rope_parameters=rope)
    _, tensors = read(saved(model, unequal(model, "neurons"), tmp_path / "out"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.model.config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], scaled)
    linear = unequal_model("llama", rope_parameters={**rope, "rope_type": "linear"})
    fields, _ = read(saved(linear, unequal(linear, "neurons"), tmp_path / "linear"))
    assert fields["deci.rope.scaling.type"] == "linear"
    assert fields["deci.rope.scaling.factor"] == 8.0


@pytest.mark.parametrize("layout", ["qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
def test_families_that_compute_otherwise_are_refused_by_name(layout: str) -> None:
    model = unequal_model(layout)
    with pytest.raises(ModelError, match=f"is of type '{layout}.*deci is a Llama, and its"):
        refuse_without_deci(model.model.config, layout)


def test_what_a_llama_usually_does_not_do_is_refused() -> None:
    gelu = unequal_model("llama", hidden_act="gelu").model.config
    with pytest.raises(ModelError, match="activation 'gelu', but llama.cpp's deci has silu alone"):
        refuse_without_deci(gelu, "mine")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = unequal_model("llama", rope_parameters=rope).model.config
    with pytest.raises(ModelError, match="scales positions by 'dynamic'"):
        refuse_without_deci(dynamic, "mine")


@pytest.mark.parametrize("cut", list(WAYS_TO_CUT))
def test_a_byte_level_tokenizer_is_written_by_its_way_to_cut(cut: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(cut)
    tokenizer.save_pretrained(tmp_path)
    refuse_without_fields(tmp_path)
    fields = tokenizer_fields(tmp_path, tokenizer, VOCABULARY + 2)
    told = {key.removeprefix("tokenizer.ggml."): field.value for key, field in fields.items()}
    assert told["pre"] == cut and told["model"] == "gpt2" and told["merges"] == ["a b"]
    assert told["tokens"][:2] == ["<s>", "</s>"] and told["tokens"][-1] == "[PAD98]"
    # Control, normal, and unused rows of the embedding.
    assert told["token_type"][:3] == [3, 3, 1] and told["token_type"][-2:] == [5, 5]
    assert (told["bos_token_id"], told["eos_token_id"]) == (0, 1)
    assert told["add_bos_token"] is False


def test_other_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no byte-level BPE tokenizer in tokenizer.json"):
        refuse_without_fields(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no name of llama.cpp is known \(Metaspace\)"):
        refuse_without_fields(tmp_path)


def test_a_gguf_source_gives_its_tokenizer_on(tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    fields = tokenizer_fields(tmp_path, None, 0, demo_file())
    writer = GGUFWriter(tmp_path / "it.gguf", "deci")
    for key, field in fields.items():
        field.write(writer, key)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before, after = GGUFReader(demo_file()).fields, GGUFReader(tmp_path / "it.gguf").fields
    words = [key for key in before if key.startswith("tokenizer.")]
    assert len(words) > 8 and fields.keys() == set(words)
    for key in words:
        assert after[key].types == before[key].types
        assert after[key].contents() == before[key].contents()


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model, selection = prepared("llama", "neurons")
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match=r"out\.gguf' cannot be written \(No space left"):
        saved(model, selection, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.skipif(package() is None, reason=ABSENT)
@pytest.mark.parametrize("what", ["neurons", "both", "attention", "mlp"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_llama_cpp_writes_on_as_transformers_does(layout: str, what: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if layout == "mistral" else {}
    model = unequal_model(layout, **changes)
    path = saved(model, unequal(model, what), tmp_path / "out")
    ids = tiny_batches(1)[:, :8]
    loaded = load_model(str(tmp_path / "out"), device="cpu").model
    expected = loaded.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=1)[0, 8:]
    _, found = greedy(path, ids[0].tolist(), 16, tmp_path)
    # llama.cpp does not hand out the end of a text.
    assert found == [one for one in expected.tolist() if one != 1]


@pytest.mark.slow
@pytest.mark.skipif(package() is None, reason=ABSENT)
def test_llama_cpp_writes_on_as_transformers_does_for_the_pruned_demo(tmp_path: Path) -> None:
    model = load_model("demo", dtype="float32", device="cpu")
    groups = groups_of(model)
    kept = [torch.arange(one.units) % (7 + one.block % 5) > 0 for one in groups]
    save_model(model, tmp_path / "out", smaller=Selection(tuple(groups), tuple(kept)))
    write_deci(tmp_path / "out", tmp_path / "it.gguf", model.tokenizer, demo_file())
    text = "The capital of France is"
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    loaded = load_model(str(tmp_path / "out"), dtype="float32", device="cpu").model
    expected = loaded.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    read_as, found = greedy(tmp_path / "it.gguf", text, 16, tmp_path)
    assert read_as == ids[0].tolist()
    assert len(expected) >= 12 and found == expected
