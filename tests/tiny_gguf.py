"""The .gguf file of a tiny Llama, written by the package of that format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# What transformers calls parts of a Llama's tensor names, and the format.
_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}


def write_gguf(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """Write tensors, under the names that transformers has for them, and settings of config.json.

    Words of the vocabulary are those of `tiny_tokenizer`, as pieces of SentencePiece.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, name in _SETTINGS.items():
        _add(writer, f"llama.{name}", settings[key])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    words = ["<s>", "</s>", "<unk>", "▁", *map(chr, range(33, 126))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([3, 3, 2] + [1] * (len(words) - 3))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_int32)(key, value)
