"""What a model takes, counted on itself and summed over the units that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunezero.errors import SelectionError
from prunezero.models.anatomy.groups import Group, Member, unit_cost, weight_groups
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.pruning.costs import group_cost, model_costs
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from tests.tiny_models import BLOCKS, FAMILIES, HIDDEN, VOCABULARY, tiny_batches, tiny_model
from tests.tiny_moe import STACKED, stacked_model

# As in `tiny_models.py`: width of all heads together, and of all key-value heads.
HEADS, KEYS = 32, 16
TOKENS = 16


def groups_of(linears: list[Linear], block: int) -> tuple[Group, Group]:
    """The neurons and the key-value groups of one block of a tiny Llama."""
    named = {one.kind: one for one in linears if one.block == block}
    made = [Member(named[kind], "producer", units=64) for kind in ("gate_proj", "up_proj")]
    neurons = (*made, Member(named["down_proj"], "consumer", units=64))
    keys = [Member(named[kind], "producer", units=2, width=8) for kind in ("k_proj", "v_proj")]
    queries = Member(named["q_proj"], "producer", units=2, width=16)
    heads = (*keys, queries, Member(named["o_proj"], "consumer", units=2, width=16))
    return (
        Group(f"{block}.mlp", block, "neuron", (64,), neurons, unit_cost(neurons)),
        Group(f"{block}.attn", block, "kv_group", (2,), heads, unit_cost(heads, cached=16)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_a_forward_pass_are_two_for_each_weight_and_those_of_attention(
    family: str,
) -> None:
    model = tiny_model(family)
    costs = model_costs(model, tiny_batches(1, TOKENS))
    weights = sum(one.weight.numel() for one in find_linears(model.model))
    attention = BLOCKS * 4 * HEADS * TOKENS
    assert costs.flops == 2 * (weights + HIDDEN * VOCABULARY) + attention
    assert costs.context == TOKENS


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_products_of_a_mixture_are_those_of_the_experts_that_tokens_go_to(
    implementation: str,
) -> None:
    model = stacked_model("mixtral")
    model.model.set_experts_implementation(implementation)
    costs = model_costs(model, tiny_batches(1, TOKENS))
    linears = find_linears(model.model)
    inside = sum(one.weight.numel() for one in linears if "experts" in one.name)
    others = sum(one.weight.numel() for one in linears) - inside
    # Each token goes to two experts of four in both blocks, and one router of each chooses them.
    weights = others + inside // 2 + BLOCKS * STACKED * HIDDEN + HIDDEN * VOCABULARY
    assert costs.flops == 2 * weights + BLOCKS * 4 * HEADS * TOKENS
    assert (
        costs.parameters_without_embeddings
        == others + inside + BLOCKS * (STACKED * HIDDEN + 2 * HIDDEN) + HIDDEN
    )


def test_units_of_a_model_sum_to_what_it_takes() -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    costs = model_costs(model, tiny_batches(1, TOKENS))
    linears = find_linears(model.model)
    groups = [group for block in range(BLOCKS) for group in groups_of(linears, block)]
    total = {
        measure: sum(group_cost(group, measure) for group in groups)
        for measure in ("weights", "parameters", "flops")
    }
    assert total["weights"] == sum(one.weight.numel() for one in linears)
    assert total["weights"] == sum(group_cost(one, "weights") for one in weight_groups(linears))
    # What is left is no unit's: biases of consumers, and norms, of which one is behind all blocks.
    left = 2 * BLOCKS * HIDDEN + (2 * BLOCKS + 1) * HIDDEN
    assert total["parameters"] + left == costs.parameters_without_embeddings
    assert costs.parameters - costs.parameters_without_embeddings == 2 * HIDDEN * VOCABULARY
    attention = BLOCKS * 4 * HEADS * TOKENS
    assert total["flops"] + 2 * HIDDEN * VOCABULARY + attention == costs.flops
    assert sum(group_cost(group, "kv bytes") for group in groups[1::2]) == costs.kv_bytes
    with pytest.raises(SelectionError, match="removing a neuron of 0.mlp saves no kv bytes"):
        group_cost(groups[0], "kv bytes")


def test_a_tied_embedding_counts_once_and_is_no_parameter_of_the_blocks() -> None:
    tied, apart = (
        model_costs(tiny_model("llama", tie_word_embeddings=tie), tiny_batches(1, TOKENS))
        for tie in (True, False)
    )
    assert apart.parameters - tied.parameters == HIDDEN * VOCABULARY
    assert apart.parameters_without_embeddings == tied.parameters_without_embeddings


@pytest.mark.parametrize(("family", "heads"), [("llama", KEYS), ("gpt2", HEADS), ("opt", HEADS)])
def test_keys_and_values_are_measured_in_bytes_of_their_dtype(family: str, heads: int) -> None:
    model = tiny_model(family)
    assert model_costs(model, tiny_batches(1, TOKENS)).kv_bytes == 2 * BLOCKS * heads * 4
    model.model.to(torch.bfloat16)
    assert model_costs(model, tiny_batches(1, TOKENS)).kv_bytes == 2 * BLOCKS * heads * 2


def test_zeros_cost_what_other_numbers_cost_and_smaller_tensors_less() -> None:
    model, ids = tiny_model("llama"), tiny_batches(1, TOKENS)
    dense = model_costs(model, ids)
    prune(model, Recipe.model_validate({"name": "mine", "criterion": "abs(W)"}), 0.5)
    assert model_costs(model, ids) == dense
    neurons, _ = groups_of(find_linears(model.model), 0)
    for member in neurons.members:
        module: Any = member.linear.module
        part = module.weight[:60] if member.role == "producer" else module.weight[:, :60]
        module.weight = nn.Parameter(part, requires_grad=False)
    smaller = model_costs(model, ids)
    assert dense.parameters - smaller.parameters == 4 * neurons.cost["parameters"]
    assert dense.flops - smaller.flops == 4 * neurons.cost["flops"]
