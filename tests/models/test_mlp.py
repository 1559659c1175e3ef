"""Neurons are found in every layout by what depends on what, and slicing them is zeroing them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.anatomy.mlp import neuron_groups
from prunezero.models.editing import slices
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slices import cuts_of
from prunezero.models.editing.slicing import (
    SMALLER,
    refuse_other_logits,
    sliced,
    width_setting,
)
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from tests.tiny_models import (
    BLOCKS,
    LAYOUTS,
    tiny_batches,
    tiny_model,
    tiny_network,
    tiny_tokenizer,
)

GATED = [("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 0)]
# By layout: the ends of the names of all members, with the row at which neurons start in each.
MEMBERS: dict[str, list[tuple[str, int]]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen3": GATED,
    "gemma3": GATED,
    "phi3": [("mlp.gate_up_proj", 0), ("mlp.gate_up_proj", 64), ("mlp.down_proj", 0)],
    "gpt2": [("mlp.c_fc", 0), ("mlp.c_proj", 0)],
    "opt": [("fc1", 0), ("fc2", 0)],
    "gpt_neox": [("mlp.dense_h_to_4h", 0), ("mlp.dense_4h_to_h", 0)],
}


def groups_of(model: LanguageModel, **patterns: Any) -> list[Group]:
    return neuron_groups(find_linears(model.model, **patterns), model)


def every_third(groups: list[Group]) -> Selection:
    """All but every third unit, another third in each block."""
    kept = [(torch.arange(group.units) % 3 > 0).roll(group.block) for group in groups]
    return Selection(tuple(groups), tuple(kept))


def noisy(model: LanguageModel) -> LanguageModel:
    """The model with weights and biases large enough for every unit to matter."""
    generator = torch.Generator().manual_seed(1)
    for linear in find_linears(model.model):
        linear.weight.normal_(std=0.3, generator=generator)
        if linear.bias is not None:
            linear.bias.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_neurons_of_every_layout_are_found_with_all_that_goes_with_them(layout: str) -> None:
    model = tiny_model(layout)
    groups = groups_of(model)
    assert [group.block for group in groups] == list(range(BLOCKS))
    assert len({group.name for group in groups}) == BLOCKS
    for group in groups:
        found = [(member.linear.name, member.start) for member in group.members]
        expected = MEMBERS[layout]
        assert len(found) == len(expected)
        for (name, start), (ending, first) in zip(found, expected, strict=True):
            assert name.endswith(f".{group.block}.{ending}") and start == first
        assert [member.role for member in group.members[:-1]] == ["producer"] * (len(found) - 1)
        assert group.members[-1].role == "consumer"
        # Two or three vectors of the hidden size, and the biases of the rows.
        biases = {"gpt2": 1, "opt": 1, "gpt_neox": 1}.get(layout, 0)
        assert group.cost["parameters"] == 32 * len(found) + biases
        assert group.units == {"gpt2": 128}.get(layout, 64) and group.least == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sliced_model_computes_what_the_zeroed_one_does(layout: str) -> None:
    model, ids = noisy(tiny_model(layout)), tiny_batches(2)
    choice = every_third(groups_of(model))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    dense = model.model(ids).logits
    parameters = sum(one.numel() for one in model.model.parameters())
    with zeroed(model, choice):
        simulated = model.model(ids).logits
        for name, cut in cuts_of(choice).items():
            value = model.model.get_parameter(name).detach()
            gone = torch.ones(value.shape[cut.axis], dtype=torch.bool)
            gone[cut.kept] = False
            assert not value.index_select(cut.axis, gone.nonzero().flatten()).any()
        with sliced(model, choice) as slices:
            smaller = model.model(ids).logits
            left = sum(one.numel() for one in model.model.parameters())
            assert len(slices.setting) == 1
    assert parameters - left == choice.removed("parameters")
    torch.testing.assert_close(smaller, simulated, rtol=1e-5, atol=1e-5)
    assert float((simulated - dense).abs().max()) > 1e-2
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model.model(ids).logits, dense)


def test_a_cut_keeps_the_very_rows_and_columns_of_the_units_that_stay() -> None:
    model = noisy(tiny_model("phi3"))
    groups = groups_of(model)[:1]
    kept = torch.zeros(64, dtype=torch.bool)
    kept[[3, 10, 63]] = True
    named = {one.name: one.weight.clone() for one in find_linears(model.model)}
    with pytest.raises(ModelError, match="no configuration of phi3 gives its layers the widths"):
        SMALLER.remove(model, Selection((groups[0],), (kept,)))
    both = groups_of(model)
    SMALLER.remove(model, Selection(tuple(both), (kept, kept)))
    fused = model.model.get_submodule("model.layers.0.mlp.gate_up_proj")
    down = model.model.get_submodule("model.layers.1.mlp.down_proj")
    rows = [3, 10, 63, 64 + 3, 64 + 10, 64 + 63]
    assert torch.equal(fused.weight, named["model.layers.0.mlp.gate_up_proj"][rows])
    assert torch.equal(down.weight, named["model.layers.1.mlp.down_proj"][:, [3, 10, 63]])
    assert (fused.out_features, down.in_features) == (6, 3)
    assert model.model.config.intermediate_size == 3
    assert model.model(tiny_batches(1)).logits.isfinite().all()


def test_the_settings_of_a_width_are_found_for_all_layers_or_for_each() -> None:
    model = tiny_model("llama")
    groups = groups_of(model)
    names = [group.name for group in groups]
    alike = width_setting(model, groups, dict.fromkeys(names, 48))
    assert (alike.setting, alike.layers) == ({"intermediate_size": 48}, {})
    assert width_setting(model, groups, dict.fromkeys(names, 64)).setting == {}
    unlike = width_setting(model, groups, dict(zip(names, (48, 47), strict=True)))
    assert unlike.setting == {}
    assert unlike.layers == {0: {"intermediate_size": 48}, 1: {"intermediate_size": 47}}
    assert model.model.config.intermediate_size == 64
    other = tiny_model("gpt2")
    groups = groups_of(other)
    counts = {group.name: 100 for group in groups}
    # It says nothing of the width of an MLP until that is not four times the hidden size.
    assert width_setting(other, groups, counts).setting == {"n_inner": 100}


def test_a_part_of_an_mlp_is_not_pruned_without_the_others() -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="'model.layers.0.mlp.gate_proj' is not among the layers"):
        groups_of(model, ignore=["gate_proj"])
    with pytest.raises(ModelError, match="none of the layers that are pruned is part of an MLP"):
        groups_of(model, targets=["q_proj", "o_proj"])
    assert [group.block for group in groups_of(model, targets=["re:layers.1."])] == [1]
    # What is not part of an MLP goes with no neuron.
    assert len(groups_of(model, ignore=["q_proj"])) == BLOCKS


def test_channels_of_a_single_attention_head_are_no_neurons() -> None:
    # Any order of them is free, but they carry what other tokens said.
    model = tiny_model("llama", num_attention_heads=1, num_key_value_heads=1)
    assert [group.name for group in groups_of(model)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


class WithNorm(nn.Module):
    """An MLP whose channels are normalised together, so that each depends on all."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, values: Tensor) -> Tensor:
        inside = self.mlp.act_fn(self.mlp.gate_proj(values)) * self.mlp.up_proj(values)
        out: Tensor = self.mlp.down_proj(nn.functional.rms_norm(inside, inside.shape[-1:]))
        return out


def test_channels_that_are_normalised_together_are_refused() -> None:
    network: Any = tiny_network("llama")
    for block in network.model.layers:
        block.mlp = WithNorm(block.mlp)
    model = wrap_model(network, tiny_tokenizer(), name="normed")
    with pytest.raises(ModelError, match="block 0 of LlamaForCausalLM has no channels"):
        groups_of(model)


class WithMean(nn.Module):
    """An MLP whose output also depends on the mean of its channels, whatever their order."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, values: Tensor) -> Tensor:
        inside = self.mlp.act_fn(self.mlp.gate_proj(values)) * self.mlp.up_proj(values)
        out: Tensor = self.mlp.down_proj(inside) + inside.mean(-1, keepdim=True)
        return out


def test_what_permuting_does_not_show_is_seen_when_the_model_is_made_smaller() -> None:
    network: Any = tiny_network("llama")
    for block in network.model.layers:
        block.mlp = WithMean(block.mlp)
    model = noisy(wrap_model(network, tiny_tokenizer(), name="mean"))
    groups = groups_of(model)
    selection = every_third(groups)
    # No class of transformers has such a block, so no setting stands for its width.
    with pytest.raises(ModelError, match="no configuration of llama"):
        width_setting(model, groups, {group.name: 43 for group in groups})
    with zeroed(model, selection), pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "setting_of_all", lambda *asked, **more: {})
        with pytest.raises(ModelError, match="computes something else than with zeros"):
            refuse_other_logits(model, selection, tiny_batches(1))


class Experts(nn.Module):
    """An MLP that is the only one of its experts."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp])

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.experts[0](values)
        return out


def test_neurons_of_experts_are_refused() -> None:
    network: Any = tiny_network("llama")
    for block in network.model.layers:
        block.mlp = Experts(block.mlp)
    model = wrap_model(network, tiny_tokenizer(), name="experts")
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.experts\.0\..*' belongs to an"):
        groups_of(model)
