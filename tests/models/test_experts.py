"""Mixtures of experts are found by structure, and refused by name where they are laid out else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prunezero.errors import ModelError
from prunezero.models.anatomy.experts import find_moe_layers
from tests.tiny_models import tiny_network

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "head_dim": 8},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "bos_token_id": 1, "eos_token_id": 2},
}
# How many of two blocks have experts.
FOUND = {
    **{"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "granitemoe": 2},
    **{"deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1},
}


def moe_network(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()


@pytest.mark.parametrize("family", FOUND)
def test_experts_are_found_with_their_router(family: str) -> None:
    layers = find_moe_layers(moe_network(family))
    assert len(layers) == FOUND[family]
    for layer in layers:
        assert (layer.count, layer.top_k) == (4, 2)
        assert layer.up.shape == (4, 96, 32)
        assert layer.down.shape == (4, 32, 48)
        assert layer.router_weight.shape == (4, 32)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "jetmoe"])
def test_other_layouts_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match="model.layers.0.* this layout is not supported"):
        find_moe_layers(moe_network(family))


def test_a_dense_model_has_none() -> None:
    assert find_moe_layers(tiny_network("llama")) == []
