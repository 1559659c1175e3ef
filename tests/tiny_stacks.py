"""Random tiny mixtures of experts of many families, and a twin without stacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.loading.load import LanguageModel, wrap_model
from tests.tiny_models import HIDDEN, LONGEST, VOCABULARY, tiny_tokenizer

INNER = 48
EXPERTS = 4
# Each family finds its own word for a size, and passes the others over.
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "num_hidden_layers": 2},
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    **{"num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS},
    **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    **{"moe_num_experts": EXPERTS, "moe_k": 2},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "shared_expert_intermediate_size": 40},
}
# How many of two blocks have experts.
MOE_FAMILIES = {
    **{"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "granitemoe": 2},
    **{"deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1},
}
OTHER_LAYOUTS = ("gpt_oss", "llama4_text", "jetmoe")


def moe_network(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random network of the family in float32; `changes` go to its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Latent attention has keys for every head.
    heads = {"num_key_value_heads": 4} if family.startswith("deepseek") else {}
    configuration = AutoConfig.for_model(family, **{**SIZES, **heads, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()
        for name, one in network.named_parameters():
            if one.dim() == 3:
                # As linear maps begin; in some families stacks begin as they happen to lie.
                nn.init.normal_(one, std=one.shape[-1] ** -0.5)
            elif "gate.weight" in name or "router.weight" in name:
                # Tokens differ in where they go.
                nn.init.normal_(one)
    return network


def moe_model(family: str = "mixtral", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random tiny mixture of experts as a `LanguageModel`, float32 on the CPU."""
    network = moe_network(family, seed=seed, **changes)
    return wrap_model(network, tiny_tokenizer(), name=family)


def save_moe_model(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny network and its tokenizer so that `load_model(str(folder))` works offline."""
    dtype = changes.pop("dtype", torch.float32)
    moe_network(family, seed=seed, **changes).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class OneExpert(nn.Module):
    """An expert of two linear maps of its own."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(up.shape[1], up.shape[0], bias=False)
        self.down_proj = nn.Linear(down.shape[1], down.shape[0], bias=False)
        with torch.no_grad():
            self.gate_up_proj.weight.copy_(up)
            self.down_proj.weight.copy_(down)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        given: Tensor = self.down_proj(nn.functional.silu(gate) * up)
        return given


class UnfusedExperts(nn.ModuleList):
    """Experts one by one, each with its own linear maps, called as a stack is."""

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        given = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            shares = torch.where(indices == index, weights, 0.0).sum(-1)
            tokens = torch.nonzero((indices == index).any(-1))[:, 0]
            if len(tokens):
                given[tokens] = given[tokens] + expert(hidden[tokens]) * shares[tokens, None]
        return given


def unfused_twin(network: nn.Module) -> nn.Module:
    """A copy of a network whose experts are gated by SiLU, with a module for each of them."""
    import copy

    twin = copy.deepcopy(network)
    for module in list(twin.modules()):
        experts = getattr(module, "experts", None)
        if experts is not None:
            pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
            module.experts = UnfusedExperts(OneExpert(up, down) for up, down in pairs)
    return twin
