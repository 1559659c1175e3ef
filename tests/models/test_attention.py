"""Key-value groups are found in every layout, and what is found is all that goes with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunezero.errors import ModelError
from prunezero.models.anatomy.attention import kv_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.anatomy.width import width_groups
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from tests.models.test_mlp import noisy
from tests.tiny_models import BLOCKS, LAYOUTS, tiny_batches, tiny_model, tiny_tokenizer

# By layout: ends of the names of all members, each with its first row and its rows for each group.
SHARED = [("q_proj", 0, 16), ("k_proj", 0, 8), ("v_proj", 0, 8), ("o_proj", 0, 16)]
MEMBERS: dict[str, list[tuple[str, int, int]]] = {
    "llama": SHARED,
    "mistral": SHARED,
    "qwen3": SHARED,
    "gemma3": SHARED,
    "phi3": [("qkv_proj", 0, 16), ("qkv_proj", 32, 8), ("qkv_proj", 48, 8), ("o_proj", 0, 16)],
    "gpt2": [("c_attn", 0, 8), ("c_attn", 32, 8), ("c_attn", 64, 8), ("attn.c_proj", 0, 8)],
    "opt": [("q_proj", 0, 8), ("k_proj", 0, 8), ("v_proj", 0, 8), ("out_proj", 0, 8)],
    "gpt_neox": [("query_key_value", 0, 24), ("dense", 0, 8)],
}


def groups_of(model: LanguageModel, **patterns: Any) -> list[Group]:
    return kv_groups(find_linears(model.model, **patterns), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_groups_of_every_layout_are_found_with_all_that_goes_with_them(layout: str) -> None:
    model = tiny_model(layout)
    groups = groups_of(model)
    assert [group.block for group in groups] == list(range(BLOCKS))
    for group in groups:
        found = [(one.linear.name, one.start, one.width) for one in group.members]
        assert len(found) == len(MEMBERS[layout])
        for (name, start, width), (end, first, rows) in zip(found, MEMBERS[layout], strict=True):
            assert name.endswith(end) and (start, width) == (first, rows)
        units = 2 if MEMBERS[layout][-1][2] == 16 else 4
        assert group.shape == (units,) and group.members[-1].role == "consumer"
        # Keys and values of eight channels each, in float32.
        assert group.cost["kv bytes"] == 2 * 8 * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_is_all_of_its_heads_and_nothing_else(layout: str) -> None:
    """Each group hands on its own channels: what others hand on does not change without it."""
    model = noisy(tiny_model(layout))
    (group, *_) = groups_of(model)
    reader = group.members[-1]
    seen: list[torch.Tensor] = []
    handle = reader.linear.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    ids = tiny_batches(1, 12)
    kept = torch.arange(group.units) != 1
    with torch.no_grad():
        model.model(ids)
        with zeroed(model, Selection((group,), (kept,))):
            model.model(ids)
    handle.remove()
    before, after = (one.reshape(-1, group.units, reader.width) for one in seen)
    torch.testing.assert_close(after[:, kept], before[:, kept])
    assert not bool(after[:, ~kept].any()) and bool(before[:, ~kept].any())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neurons_and_groups_together_hold_every_weight_of_a_block_once(layout: str) -> None:
    model = tiny_model(layout)
    groups = width_groups(find_linears(model.model), model)
    weights = sum(group.cost["weights"] * group.units for group in groups)
    assert weights == sum(linear.weight.numel() for linear in find_linears(model.model))
    taken: dict[str, torch.Tensor] = {}
    for group in groups:
        for member in group.members:
            part = ~member.mask(torch.zeros(group.units, dtype=torch.bool))
            assert not bool((taken.get(member.linear.name, ~part) & part).any())
            taken[member.linear.name] = taken.get(member.linear.name, part) | part
    assert all(bool(part.all()) for part in taken.values())


def test_a_part_of_an_attention_cannot_be_pruned_alone() -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="a kv group of model.layers.0.self_attn takes a part"):
        groups_of(model, ignore=["q_proj"])
    with pytest.raises(ModelError, match="none of the layers that are pruned is part of an atten"):
        groups_of(model, targets=["down_proj", "up_proj", "gate_proj"])


def test_a_model_without_attention_is_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = wrap_model(
        AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer(), name="mamba"
    )
    with pytest.raises(ModelError, match="no key-value group"):
        groups_of(model)
