"""Tiny models whose layers will differ, and the groups of their keys and values by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prunezero.models.anatomy.groups import Group, Member, unit_cost
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from tests.models.test_mlp import groups_of, noisy
from tests.tiny_models import CONFIGURATIONS, LAYOUTS, _shared, tiny_tokenizer


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2}
    return Qwen2Config(**{**known, **changes})


def _gemma2(**changes: Any) -> Any:
    from transformers import Gemma2Config

    known = {**_shared(), "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    known |= {"query_pre_attn_scalar": 8, "sliding_window": 8}
    return Gemma2Config(**{**known, **changes})


MORE: dict[str, Callable[..., Any]] = {"qwen2": _qwen2, "gemma2": _gemma2}
ALL = (*LAYOUTS, *MORE)
# Their attention is as wide as the hidden states, whatever a configuration says.
OF_FIXED_WIDTH = ("gpt2", "opt", "gpt_neox")
# Its MLP is no module of its own.
WITHOUT_MLP = ("opt",)


def unequal_model(layout: str, **changes: Any) -> LanguageModel:
    """A tiny model of a layout, every unit of which matters; `changes` go to its configuration."""
    from transformers import AutoModelForCausalLM

    settings = {**CONFIGURATIONS, **MORE}[layout](**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return noisy(wrap_model(network, tiny_tokenizer(), name=layout))


def kv_groups(model: LanguageModel) -> list[Group]:
    """The heads of each attention that share keys and values: two groups, or four single ones."""
    by_block: dict[int, dict[str, Linear]] = {}
    for linear in find_linears(model.model):
        by_block.setdefault(linear.block, {})[linear.name.rpartition(".")[2]] = linear
    attention = ("q_proj", "qkv_proj", "c_attn", "query_key_value")
    found = []
    for block, linears in by_block.items():
        (fused,) = (name for name in attention if name in linears)
        members = _members(fused, linears, model)
        found.append(
            Group(
                name=members[-1].linear.name.rpartition(".")[0],
                block=block,
                kind="kv_group",
                shape=(members[-1].units,),
                members=members,
                cost=unit_cost(members),
            )
        )
    return found


def _members(fused: str, linears: dict[str, Linear], model: LanguageModel) -> tuple[Member, ...]:
    size = 8
    consumer = (
        next(linears[name] for name in ("o_proj", "out_proj", "dense") if name in linears)
        if (fused != "c_attn")
        else _named(model, linears[fused], "c_proj")
    )
    heads = consumer.weight.shape[1] // size
    keys = model.model.config.to_dict().get("num_key_value_heads", heads)
    wide = heads // keys * size
    made = {
        "q_proj": [("q_proj", 0, wide), ("k_proj", 0, size), ("v_proj", 0, size)],
        "qkv_proj": [
            ("qkv_proj", 0, wide),
            ("qkv_proj", heads * size, size),
            ("qkv_proj", (heads + keys) * size, size),
        ],
        "c_attn": [("c_attn", part * heads * size, size) for part in range(3)],
        "query_key_value": [("query_key_value", 0, 3 * size)],
    }[fused]
    producers = [
        Member(linears[name], "producer", units=keys, start=start, width=width)
        for name, start, width in made
    ]
    return (*producers, Member(consumer, "consumer", units=keys, width=wide))


def _named(model: LanguageModel, beside: Linear, word: str) -> Linear:
    wanted = f"{beside.name.rpartition('.')[0]}.{word}"
    return next(one for one in find_linears(model.model) if one.name == wanted)


def unequal(model: LanguageModel, what: str) -> Selection:
    """A selection by which layers differ.

    Args:
        what: neurons, heads, both, or attention or mlp of the first layer as a whole.
    """
    neurons = [(one, torch.arange(one.units) % (3 + one.block) > 0) for one in groups_of(model)]
    heads = [(one, torch.arange(one.units) > 0) for one in kv_groups(model)[1:]]
    attention, mlp = kv_groups(model)[0], whole_mlp(model)
    chosen = {
        "neurons": neurons,
        "heads": heads,
        "both": heads + neurons,
        "attention": [(attention, torch.zeros(attention.units, dtype=torch.bool)), *neurons],
        "mlp": [*heads, (mlp, torch.zeros(1, dtype=torch.bool))],
    }[what]
    groups, kept = zip(*chosen, strict=True)
    return Selection(groups, kept)


def whole_mlp(model: LanguageModel) -> Group:
    """The neurons of the first MLP as one unit, which is not yet the MLP as a sub-block."""
    group = groups_of(model)[0]
    members = tuple(
        Member(one.linear, one.role, units=1, start=one.start, width=one.units * one.width)
        for one in group.members
    )
    return Group(group.name, 0, "neuron", (1,), members, cost=unit_cost(members))
