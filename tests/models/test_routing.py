"""Experts go: routers do not choose them, the smaller model computes the same, files hold it."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, SelectionError
from prunezero.models.anatomy.expert_groups import expert_groups
from prunezero.models.anatomy.experts import find_moe_layers
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import ROUTED, setting_of, sliced
from prunezero.models.loading.load import load_model
from prunezero.models.loading.shards import Shards
from prunezero.models.saving.save import save_model
from tests.models.test_unequal import LOADED, generated
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_moe import EXPERTS, GROUPED, MIXTURES, MORE, TOP_K, moe_groups, moe_model, save_moe

IDS = tiny_batches(2, 16)


def without(groups: list[Group], *gone: int) -> Selection:
    """The selection that lacks these experts of every mixture."""
    kept = torch.ones(EXPERTS, dtype=torch.bool)
    kept[list(gone)] = False
    return Selection(tuple(groups), tuple(kept.clone() for _ in groups))


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def masked_choice(family: str, router: Any, tokens: Tensor, gone: list[int]) -> Any:
    """Weights and experts by the equations of a family, with logits of some at minus infinity.

    In float32, one token after another.
    """
    rows = []
    for token in tokens:
        logits = (router.weight.float() @ token.float()).clone()
        logits[gone] = float("-inf")
        if family in GROUPED:
            scores = logits.sigmoid()
            judged = scores + router.e_score_correction_bias
            judged[gone] = float("-inf")
            groups = judged.reshape(router.num_group, -1)
            best = groups.topk(2).values.sum(1).argmax()
            inside = torch.full_like(groups, float("-inf"))
            inside[best] = groups[best]
            chosen = inside.flatten().topk(TOP_K).indices
            weights = scores[chosen] / scores[chosen].sum() * router.routed_scaling_factor
        elif family == "granitemoe":
            best_logits, chosen = logits.topk(TOP_K)
            weights = best_logits.softmax(0)
        else:
            scores = logits.softmax(0)
            judged = scores
            if family == "ernie4_5_moe":
                judged = scores + router.moe_statics.e_score_correction_bias[0]
                judged[gone] = float("-inf")
            chosen = judged.topk(TOP_K).indices
            weights = scores[chosen]
            if family in ("mixtral", "ernie4_5_moe"):
                weights = weights / weights.sum()
        rows.append((weights, chosen))
    return torch.stack([one for one, _ in rows]), torch.stack([one for _, one in rows])


def by_expert(weights: Tensor, chosen: Tensor) -> Tensor:
    """Weights [tokens, experts], whatever the order of those chosen."""
    return torch.zeros(len(chosen), EXPERTS).scatter(1, chosen, weights)


@pytest.mark.parametrize("family", [*MIXTURES, *MORE])
def test_a_router_chooses_as_if_logits_of_experts_that_went_were_minus_infinity(
    family: str,
) -> None:
    model = moe_model(family)
    groups = moe_groups(model)
    layer = find_moe_layers(model.model)[-1]
    tokens = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    gone = [1, 4]
    with without_experts(model, without(groups, *gone)), torch.no_grad():
        _, weights, chosen = layer.router(tokens)
    found = by_expert(weights, chosen)
    wanted = by_expert(*masked_choice(family, layer.router, tokens, gone))
    assert not found[:, gone].any()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # The router had chosen them before.
    assert bool(torch.isin(layer.router(tokens)[2], torch.tensor(gone)).any())


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edit_leaves_every_bit_and_the_smaller_model_computes_what_it_simulated(
    family: str,
) -> None:
    model = moe_model(family)
    groups = moe_groups(model)
    choice = without(groups, 0, 3)
    before, numbers = state(model), copy.deepcopy(model.model.config.to_dict())
    dense = model.model(IDS).logits
    with without_experts(model, choice):
        simulated = model.model(IDS).logits
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert not torch.equal(simulated, dense)
    with sliced(model, choice):
        assert torch.equal(model.model(IDS).logits, simulated)
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert model.model.config.to_dict() == numbers
    assert torch.equal(model.model(IDS).logits, dense)
    total = sum(one.numel() for one in model.model.parameters())
    ROUTED.remove(model, choice)
    assert torch.equal(model.model(IDS).logits, simulated)
    left = sum(one.numel() for one in model.model.parameters())
    assert total - left == choice.removed("parameters")


@pytest.mark.parametrize("family", [*MIXTURES, *MORE])
def test_as_many_experts_of_every_mixture_are_saved_for_the_plain_class(
    family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(str(save_moe(family, tmp_path / "dense")))
    groups = moe_groups(model)
    choice = without(groups, 2, 5)
    assert not setting_of(model, choice).needs_own_class
    with without_experts(model, choice):
        wanted = model.model(IDS).logits
    save_model(model, tmp_path / "out", smaller=choice)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(network(IDS).logits, wanted)
    again = load_model(str(tmp_path / "out"))
    assert [group.units for group in moe_groups(again)] == [EXPERTS - 2] * len(groups)
    # One token after another, with a cache.
    made = network.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, min_new_tokens=4)
    assert made.shape == (1, 8)


def test_experts_in_several_files_keep_their_bits_under_new_numbers(tmp_path: Path) -> None:
    folder = save_moe("mixtral", tmp_path / "dense")
    load_model(str(folder)).model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    before, model = Shards(folder), load_model(str(folder))
    assert len({one.file for one in before.tensors.values()}) > 3
    choice = without(moe_groups(model), 0, 3)
    save_model(model, tmp_path / "out", smaller=choice)
    after = Shards(tmp_path / "out")
    for now, old in enumerate((1, 2, 4, 5)):
        for kind in ("w1", "w2", "w3"):
            name = "model.layers.1.block_sparse_moe.experts.{}." + f"{kind}.weight"
            assert torch.equal(after.read(name.format(now)), before.read(name.format(old)))
    assert len(before.tensors) - len(after.tensors) == 2 * 2 * 3
    with without_experts(model, choice):
        wanted = model.model(IDS).logits
    assert torch.equal(load_model(str(tmp_path / "out")).model(IDS).logits, wanted)


def test_a_count_that_the_file_says_under_another_name_follows(tmp_path: Path) -> None:
    folder = save_moe("qwen3_moe", tmp_path / "dense")
    path = folder / "config.json"
    told = json.loads(path.read_text())
    # Files of this family that are older than the word of transformers.
    told["num_experts"] = told.pop("num_local_experts")
    path.write_text(json.dumps(told))
    model = load_model(str(folder))
    choice = without(moe_groups(model), 0)
    save_model(model, tmp_path / "out", smaller=choice)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == EXPERTS - 1
    with without_experts(model, choice):
        wanted = model.model(IDS).logits
    assert torch.equal(load_model(str(tmp_path / "out")).model(IDS).logits, wanted)


def test_mixtures_may_keep_different_numbers_in_memory() -> None:
    model = moe_model("mixtral")
    choice = unequal_choice("mixtral", moe_groups(model))
    with without_experts(model, choice):
        simulated = model.model(IDS).logits
    with sliced(model, choice) as slices:
        assert torch.equal(model.model(IDS).logits, simulated)
    assert slices.layers == {0: {"num_local_experts": 4}, 1: {"num_local_experts": 5}}
    ROUTED.remove(model, choice)
    assert torch.equal(model.model(IDS).logits, simulated)


def unequal_choice(family: str, groups: list[Group]) -> Selection:
    """Four experts of the first mixture stay, and another number of the second, if there is one."""
    first, *others = groups
    chosen = without([first], 1, 4)
    for other in others:
        chosen |= without([other], *(() if family in GROUPED else (2,)))
    return chosen


def test_different_numbers_of_experts_are_saved_and_read_in_a_fresh_process(
    tmp_path: Path,
) -> None:
    wanted = {}
    for family in (*MIXTURES, *MORE):
        dense = save_moe(family, tmp_path / f"{family}_dense", num_hidden_layers=3)
        model, folder = load_model(str(dense)), str(tmp_path / family)
        groups = moe_groups(model)
        choice = unequal_choice(family, groups)
        save_model(model, folder, smaller=choice)
        with sliced(model, choice):
            wanted[folder] = model.model(IDS).logits, generated(model.model, IDS)
        # Without the code that lies in it, and pruned once more.
        again = load_model(folder)
        left = [int(kept.sum()) for _, kept in choice]
        assert [group.units for group in moe_groups(again)] == left and len(set(left)) == 2
        assert torch.equal(again.model(IDS).logits, wanted[folder][0])
        stored = sum(math.prod(one.shape) for one in Shards(Path(folder)).tensors.values())
        # A tensor that two modules share is stored once.
        held = {one.data_ptr(): one.numel() for one in again.model.state_dict().values()}
        assert stored == sum(held.values()), family
    torch.save(IDS, tmp_path / "ids.pt")
    words = [sys.executable, "-c", LOADED, str(tmp_path / "ids.pt"), *wanted]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "ids.pt")
    assert found.keys() == wanted.keys() and len(found) == 9
    for folder, (logits, tokens) in wanted.items():
        assert torch.equal(found[folder]["logits"], logits), folder
        assert found[folder]["new"] == tokens, folder


def test_mixtures_that_differ_may_lose_more_and_their_experts_run_in_every_way(
    tmp_path: Path,
) -> None:
    model = load_model(str(save_moe("qwen3_moe", tmp_path / "dense")))
    save_model(model, tmp_path / "first", smaller=unequal_choice("qwen3_moe", moe_groups(model)))
    again = load_model(str(tmp_path / "first"))
    assert again.model.config._experts_implementation == "grouped_mm"
    first, second = moe_groups(again)
    kept = torch.tensor([True, False, True, True]), torch.arange(5) < 3
    choice = Selection((first, second), kept)
    with without_experts(again, choice):
        wanted = again.model(IDS).logits
    save_model(again, tmp_path / "second", smaller=choice)
    told = json.loads((tmp_path / "second" / "config.json").read_text())
    assert told["per_layer_config"] == {str(at): {"num_local_experts": 3} for at in (0, 1)}
    last = load_model(str(tmp_path / "second"))
    assert torch.equal(last.model(IDS).logits, wanted)
    for way in ("eager", "batched_mm"):
        last.model.set_experts_implementation(way)
        experts: list[Any] = [layer.experts for layer in find_moe_layers(last.model)]
        assert {one.config._experts_implementation for one in experts} == {way}
        torch.testing.assert_close(last.model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_so_many_experts_stay_that_each_token_finds_as_many_as_it_goes_to() -> None:
    for family in (*MIXTURES, *MORE):
        (group, *_) = moe_groups(moe_model(family))
        assert (group.least, group.strata) == ((4, 2) if family in GROUPED else (2, 1))
    (group, *_) = moe_groups(moe_model("mixtral"))
    with pytest.raises(SelectionError, match="1 units of .* would stay; at least 2 have to"):
        without([group], 0, 1, 2, 3, 4)
    (group,) = moe_groups(moe_model("deepseek_v3"))
    with pytest.raises(SelectionError, match="1, 3 units would stay; of each as many have to"):
        without([group], 0, 1)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no mixture of experts"):
        expert_groups([], tiny_model("llama"))


class Other(nn.Module):
    """A router that answers weights of all experts."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = router.weight
        self.top_k: int = router.top_k

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.softmax(tokens @ self.weight.T, dim=-1)


def test_a_router_that_answers_something_else_is_refused_by_name() -> None:
    model = moe_model("mixtral")
    mixture: Any = find_moe_layers(model.model)[0].module
    mixture.gate = Other(mixture.gate)
    with pytest.raises(
        ModelError, match=r"'model\.layers\.0\.mlp\.gate' \(Other\) does not answer"
    ):
        moe_groups(model)
