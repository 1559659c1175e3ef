"""How does a model whose layers differ become one .gguf file that stock llama.cpp runs?

Of llama.cpp's architectures `deci` reads the numbers of heads and the width of the MLP layer by
layer, and computes what a Llama does. Tensors have the names, and rows of queries and keys the
order, that they have in the file of a Llama. What a folder holds is written, tensor by tensor.

Where an MLP went it gets one channel of zeros, for at width 0 llama.cpp passes over the attention
of that layer too. Where attention went there are no heads, but in the first layer, where llama.cpp
reads how large one is: it keeps one head of zeros.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezero.errors import ModelError, OutputError, reason
from prunezero.models.loading.language_model import quiet
from prunezero.models.loading.shards import STORED_DTYPES, Shards
from prunezero.models.saving.gguf_tokenizer import tokenizer_fields
from prunezero.models.unequal.families import layer_settings, register, usual_type

FAMILIES = ("llama", "mistral", "qwen2")
_WHY_NOT = {
    "qwen3": "its queries and keys are normalised",
    "gemma2": "its norms and activation are others",
    "gemma3_text": "its norms and activation are others",
    "phi3": "its rows of queries, keys and gates are fused",
    "gpt2": "its positions are learned",
    "opt": "its positions are learned",
    "gpt_neox": "its norms and residual stream are others",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Layer:
    """The size of one layer."""

    queries: int
    """heads; 0 where its attention went"""
    keys: int
    """heads of keys and values"""
    width: int
    """channels of its MLP; 0 where that went"""


def refuse_without_deci(configuration: Any, name: str) -> None:
    """Refuse a model that llama.cpp cannot run with layers that differ.

    Args:
        configuration: of the model.
        name: of it, for the message.

    Raises:
        ModelError: it is not a Llama, Mistral or Qwen2, or does not compute as these usually do.
    """
    kind = usual_type(configuration.model_type)
    if kind not in FAMILIES:
        why = _WHY_NOT.get(kind, "it computes otherwise")
        raise ModelError(
            f"model '{name}' is of type '{kind}', which cannot be written as GGUF with layers that "
            f"differ: llama.cpp's deci is a Llama, and {why}; known: {', '.join(FAMILIES)}"
        )
    if getattr(configuration, "rotated", None):
        raise ModelError(
            f"model '{name}' reads its residual stream in several bases (unit: direction), which "
            "no architecture of llama.cpp does"
        )
    scaling = _rope(configuration).get("rope_type", "default")
    if scaling not in ("default", "linear", "llama3"):
        raise ModelError(
            f"model '{name}' scales positions by '{scaling}', which the GGUF writer does not know; "
            "known: default, linear, llama3"
        )
    if configuration.hidden_act not in ("silu", "swish"):
        raise ModelError(
            f"model '{name}' has the activation '{configuration.hidden_act}', but llama.cpp's deci "
            "has silu alone"
        )


def write_deci(folder: Path, path: Path, tokenizer: Any, tokenizer_from: Path | None) -> None:
    """Write a saved model as one .gguf file, which is complete or not there.

    Args:
        folder: a saved model, config.json and safetensors.
        path: of the file.
        tokenizer: of the model.
        tokenizer_from: a .gguf file whose tokenizer is copied instead, where the model came as one.

    Raises:
        ModelError: as `refuse_without_deci`, the tokenizer is none that llama.cpp knows, or a file
            of the folder is damaged.
        OutputError: the file cannot be written.
    """
    from gguf import GGUFWriter

    configuration = _configuration(folder)
    refuse_without_deci(configuration, str(folder))
    layers = [_layer(configuration, index) for index in range(configuration.num_hidden_layers)]
    tensors = dict(_tensors(Shards(folder), configuration, layers))
    fields = tokenizer_fields(folder, tokenizer, configuration.vocab_size, tokenizer_from)
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = GGUFWriter(unfinished, "deci")
    try:
        _write_settings(writer, configuration, layers, folder.name)
        for key, field in fields.items():
            field.write(writer, key)
        _write_tensors(writer, tensors)
        writer.close()
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({reason(error, path)})") from error
    finally:
        for file in writer.fout or ():
            file.close()
        unfinished.unlink(missing_ok=True)


def _write_tensors(writer: Any, tensors: Mapping[str, _Made]) -> None:
    """Write the head of a file and its tensors, whose numbers are handed over as bytes."""
    for name, made in tensors.items():
        dtype, shape = made.stored
        bytes_of_rows = (*shape[:-1], shape[-1] * dtype.itemsize)
        size = math.prod(bytes_of_rows)
        writer.add_tensor_info(name, bytes_of_rows, np.dtype("uint8"), size, _type_of(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for made in tensors.values():
        writer.write_tensor_data(made.read().contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True)
class _Made:
    """A tensor of the file, read when it is written."""

    shards: Shards
    name: str
    """in the folder; empty for zeros"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int = 0
    """of queries or keys, whose rows change their order"""
    numbers: Tensor | None = None
    """of a tensor that the folder does not hold"""

    @property
    def stored(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape in the file: vectors are always float32."""
        narrow = {torch.float16, torch.bfloat16} & {self.dtype}
        return (self.dtype if narrow and len(self.shape) > 1 else torch.float32), self.shape

    def read(self) -> Tensor:
        """Its numbers as the file holds them."""
        if self.numbers is not None:
            values = self.numbers
        elif self.name:
            values = self.shards.read(self.name)
        else:
            values = torch.zeros(self.shape)
        return _in_order(values, self.heads).to(self.stored[0])


def _in_order(values: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp turns them: neighbours where transformers has halves."""
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _tensors(
    shards: Shards, configuration: Any, layers: list[Layer]
) -> Iterator[tuple[str, _Made]]:
    """The tensors of the file, by name, in the order of the folder."""
    is_tied = bool(configuration.tie_word_embeddings)
    for name, tensor in shards.tensors.items():
        dtype = STORED_DTYPES.get(tensor.dtype, torch.float32)
        if name in _OUTSIDE:
            if not (is_tied and name == "lm_head.weight"):
                yield _OUTSIDE[name], _Made(shards, name, tensor.shape, dtype)
            continue
        index, part, kind = _place(name)
        layer = layers[index]
        if not layer.queries and part == "input_layernorm" and index:
            continue
        heads = {"self_attn.q_proj": layer.queries, "self_attn.k_proj": layer.keys}.get(part, 0)
        yield f"blk.{index}.{_INSIDE[part]}.{kind}", _Made(shards, name, tensor.shape, dtype, heads)
    yield from _instead(shards, configuration, layers)
    factors = _frequency_factors(configuration)
    if factors is not None:
        shape = tuple(factors.shape)
        yield "rope_freqs.weight", _Made(shards, "", shape, torch.float32, numbers=factors)


def _instead(
    shards: Shards, configuration: Any, layers: list[Layer]
) -> Iterator[tuple[str, _Made]]:
    """Zeros in the place of parts that went, where llama.cpp wants them."""
    hidden, size = configuration.hidden_size, _head_size(configuration)
    dtype = STORED_DTYPES[shards.tensors["model.embed_tokens.weight"].dtype]
    for index, layer in enumerate(layers):
        lacking = {} if layer.width else {"ffn_gate": 1, "ffn_up": 1, "ffn_down": -1}
        if not layer.queries and not index:
            lacking |= {"attn_q": size, "attn_k": size, "attn_v": size, "attn_output": -size}
        for part, rows in lacking.items():
            shape = (rows, hidden) if rows > 0 else (hidden, -rows)
            yield f"blk.{index}.{part}.weight", _Made(shards, "", shape, dtype)


def _place(name: str) -> tuple[int, str, str]:
    """The layer, part and kind that a tensor of a Llama's folder is.

    Raises:
        ModelError: a Llama has no such tensor.
    """
    words = name.split(".")
    part = ".".join(words[3:-1])
    if words[:2] != ["model", "layers"] or not words[2].isdigit() or part not in _INSIDE:
        raise ModelError(
            f"the tensor '{name}' is none of a Llama, so the model cannot be written as GGUF"
        )
    return int(words[2]), part, words[-1]


def _layer(configuration: Any, index: int) -> Layer:
    settings = layer_settings(configuration, index)
    skipped = getattr(settings, "skip", None) or ()
    has_heads = "attention" not in skipped
    return Layer(
        settings.num_attention_heads if has_heads else 0,
        (settings.num_key_value_heads or settings.num_attention_heads) if has_heads else 0,
        0 if "mlp" in skipped else settings.intermediate_size,
    )


def _write_settings(writer: Any, configuration: Any, layers: list[Layer], name: str) -> None:
    size = _head_size(configuration)
    # llama.cpp reads the size of a head only where the first layer has one.
    first = layers[0] if layers[0].queries else Layer(1, 1, layers[0].width)
    rows = [first, *layers[1:]]
    writer.add_name(name)
    writer.add_vocab_size(configuration.vocab_size)
    writer.add_context_length(_context(configuration))
    writer.add_embedding_length(configuration.hidden_size)
    writer.add_block_count(len(rows))
    writer.add_head_count([row.queries for row in rows])
    writer.add_head_count_kv([row.keys for row in rows])
    writer.add_feed_forward_length([row.width or 1 for row in rows])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(_rope(configuration)["rope_theta"]))
    writer.add_layer_norm_rms_eps(configuration.rms_norm_eps)
    if _rope(configuration).get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(configuration)["factor"]))


def _context(configuration: Any) -> int:
    """Tokens up to which the model computes the same without sliding windows."""
    kinds = getattr(configuration, "layer_types", None) or ["sliding_attention"]
    window = getattr(configuration, "sliding_window", None)
    longest: int = configuration.max_position_embeddings
    if window is None or "sliding_attention" not in kinds:
        return longest
    return min(longest, int(window))


def _head_size(configuration: Any) -> int:
    size = getattr(configuration, "head_dim", None)
    return size or configuration.hidden_size // configuration.num_attention_heads


def _rope(configuration: Any) -> Mapping[str, Any]:
    """How positions turn queries and keys, as transformers 5 tells it."""
    return getattr(configuration, "rope_parameters", None) or {}


def _frequency_factors(configuration: Any) -> Tensor | None:
    """By how much each frequency is divided, where they are scaled as those of Llama 3.

    Source: `_compute_llama3_parameters` of transformers.
    """
    rope = _rope(configuration)
    if rope.get("rope_type") != "llama3":
        return None
    size = _head_size(configuration)
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    turns = rope["original_max_position_embeddings"] / lengths
    low, high, factor = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        register(told.get("model_type"))
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json in '{folder}' cannot be read ({reason(error)})") from error


def _type_of(dtype: torch.dtype) -> Any:
    from gguf import GGMLQuantizationType

    words = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return GGMLQuantizationType[words[dtype]]
