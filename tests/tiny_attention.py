"""Tiny models whose attention is not flat, and what each of their layers is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunezero.models.attending.interface import Call, watched_attention
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from tests.tiny_models import BLOCKS, HIDDEN, VOCABULARY, tiny_model, tiny_tokenizer

# Ends of the names of matrices that make queries and keys, fused with values in some layouts.
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")


def sharp_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random tiny model whose tokens attend to few others, since logits are far apart."""
    model = tiny_model(family, seed=seed, **changes)
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if name.endswith(_QUERIES_AND_KEYS):
                module.weight *= 8
    return model


def calls_of(model: LanguageModel, ids: Tensor) -> dict[int, Call]:
    """What attention is called with, by layer, when the dense model reads token ids [length]."""
    calls: dict[int, Call] = {}

    def note(call: Call) -> tuple[Tensor, Tensor | None]:
        calls[call.layer] = call
        return call.usual()

    with torch.no_grad(), watched_attention(model, note):
        model.model(ids[None], use_cache=False)
    return calls


def other_model(family: str) -> LanguageModel:
    """Tiny models of families that only these tests know: gemma2 (capped logits) and qwen2."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

    shared: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
        **{"max_position_embeddings": 160, "bos_token_id": 0, "eos_token_id": 1},
        "pad_token_id": None,
    }
    if family == "gemma2":
        shared |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        configuration: Any = Gemma2Config(**shared, attn_logit_softcapping=2.0)
    else:
        configuration = Qwen2Config(**shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    return wrap_model(network.eval(), tiny_tokenizer(), name=family)
