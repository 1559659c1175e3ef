"""Random tiny mixtures of experts, six experts each and two for a token, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunezero.models.anatomy.expert_groups import expert_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import LanguageModel, wrap_model
from tests.tiny_models import VOCABULARY, tiny_tokenizer

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
