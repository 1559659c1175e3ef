"""Random tiny mixtures of experts, and folders of them.

`moe_` ones have six experts each, which routers choose from by the rules of many families;
`stacked_` ones have four, whose stacks begin as linear maps do, and twins without stacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.anatomy.expert_groups import expert_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import LanguageModel, wrap_model
from tests.tiny_models import HIDDEN, LONGEST, VOCABULARY, tiny_tokenizer

EXPERTS, TOP_K = 6, 2
# Softmax of the chosen, softmax of all, logits chosen first, sigmoid with groups and a bias of the
# choice, softmax with groups, and a bias of the choice that is learned.
MIXTURES = ("mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "deepseek_v2", "ernie4_5_moe")
# Others that are supported, of a kind each of which is among those.
MORE = ("qwen2_moe", "olmoe", "glm4_moe")
# Routers of some families choose among two groups of experts.
GROUPED = ("deepseek_v3", "glm4_moe")
# The first block of these is dense.
HALF = ("deepseek_v3", "deepseek_v2", "ernie4_5_moe", "glm4_moe")


def moe_settings(family: str, **changes: Any) -> dict[str, Any]:
    """What the configuration of a tiny mixture says."""
    counts = dict.fromkeys(("num_experts", "num_local_experts"), EXPERTS)
    if family in HALF:
        counts = {"moe_num_experts" if "ernie" in family else "n_routed_experts": EXPERTS}
    sizes = {
        **{"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": None},
        **{"bos_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": TOP_K, "moe_k": TOP_K},
        **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "initializer_range": 0.2},
    }
    return {**sizes, **counts, **changes}


def moe_network(family: str = "mixtral", *, seed: int = 0, **changes: Any) -> Any:
    """A random network of a family of mixtures, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(family, **moe_settings(family, **changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        for name, value in network.state_dict().items():
            # Zeros, as they begin, would choose nobody in particular.
            if name.endswith("e_score_correction_bias"):
                value.copy_(torch.rand(value.shape) / 4)
    return network


def moe_model(family: str = "mixtral", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random `LanguageModel` with mixtures of experts, float32 on the CPU."""
    return wrap_model(moe_network(family, seed=seed, **changes), tiny_tokenizer(), name=family)


def moe_groups(model: LanguageModel) -> list[Group]:
    """The experts of a model."""
    return expert_groups(find_linears(model.model), model)


def save_moe(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny mixture and its tokenizer so that `load_model(str(folder))` works offline."""
    moe_network(family, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# ---- stacks

INNER = 48
STACKED = 4
# Each family finds its own word for a size, and passes the others over.
STACKED_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "num_hidden_layers": 2},
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    **{"num_experts": STACKED, "num_local_experts": STACKED, "n_routed_experts": STACKED},
    **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    **{"moe_num_experts": STACKED, "moe_k": 2},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "shared_expert_intermediate_size": 40},
}
# How many of two blocks have experts.
MOE_FAMILIES = {
    **{"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "granitemoe": 2},
    **{"deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1},
}
OTHER_LAYOUTS = ("gpt_oss", "llama4_text", "jetmoe")


def stacked_network(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random network of the family in float32; `changes` go to its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Latent attention has keys for every head.
    heads = {"num_key_value_heads": 4} if family.startswith("deepseek") else {}
    configuration = AutoConfig.for_model(family, **{**STACKED_SIZES, **heads, **changes})
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


def stacked_model(family: str = "mixtral", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random tiny mixture of experts as a `LanguageModel`, float32 on the CPU."""
    network = stacked_network(family, seed=seed, **changes)
    return wrap_model(network, tiny_tokenizer(), name=family)


def save_stacked(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny network and its tokenizer so that `load_model(str(folder))` works offline."""
    dtype = changes.pop("dtype", torch.float32)
    stacked_network(family, seed=seed, **changes).to(dtype).save_pretrained(folder)
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
