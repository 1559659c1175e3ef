"""Units of all shapes are rows, and go from every matrix that they have a part in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, SelectionError
from prunezero.models.anatomy.groups import Group, Member, Role, unit_cost, weight_groups
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import ZEROS, DenseWeights, zeroed
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model, tiny_network


def linear(rows: int, columns: int, name: str = "it", *, bias: bool = False) -> Linear:
    module = nn.Linear(columns, rows, bias=bias)
    module.weight.data = torch.arange(1.0, rows * columns + 1).view(rows, columns)
    return Linear(name, module, 0, name)


def kept(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.bool)


def neurons() -> Group:
    """Two neurons of three inputs: rows of gate and up, which are one matrix, columns of down."""
    fused, down = linear(4, 3, "gate_up", bias=True), linear(3, 2, "down", bias=True)
    members = (
        Member(fused, "producer", units=2),
        Member(fused, "producer", units=2, start=2),
        Member(down, "consumer", units=2),
    )
    return Group("mlp", 0, "neuron", (2,), members, cost=unit_cost(members), least=1)


def heads() -> Group:
    """Two key-value groups of heads of two channels, two query heads in each: eight channels."""
    q, k, o = linear(8, 3, "q"), linear(4, 3, "k"), linear(3, 8, "o")
    members = (
        Member(q, "producer", units=2, width=4),
        Member(k, "producer", units=2, width=2),
        Member(o, "consumer", units=2, width=4),
    )
    return Group("attention", 0, "kv_group", (2,), members, cost=unit_cost(members), least=1)


@pytest.mark.parametrize(
    ("role", "width", "start", "expected"),
    [
        ("producer", 1, 0, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("producer", 1, 2, [[9, 10, 11, 12], [13, 14, 15, 16]]),
        ("producer", 2, 0, [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]),
        ("consumer", 1, 1, [[2, 6, 10, 14], [3, 7, 11, 15]]),
        ("consumer", 2, 0, [[1, 5, 9, 13, 2, 6, 10, 14], [3, 7, 11, 15, 4, 8, 12, 16]]),
    ],
)
def test_a_part_is_turned_so_that_units_are_rows(
    role: Role, width: int, start: int, expected: list[list[int]]
) -> None:
    member = Member(linear(4, 4), role, units=2, start=start, width=width)
    assert member.oriented(member.linear.weight).tolist() == expected


def test_a_mask_removes_just_the_numbers_that_a_turned_part_shows() -> None:
    for role in ("producer", "consumer"):
        for width, start in ((1, 0), (1, 3), (2, 0), (2, 1)):
            member = Member(linear(5, 6), role, units=2, start=start, width=width)
            weight = member.linear.weight
            gone = weight[~member.mask(kept(1, 0))]
            assert sorted(gone.tolist()) == sorted(member.oriented(weight)[1].tolist())


def test_each_weight_of_a_part_may_be_chosen_by_itself() -> None:
    member = Member(linear(3, 4), "consumer", units=2, start=1)
    choice = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    mask = member.mask(choice)
    assert mask.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]]
    assert torch.equal(member.oriented(mask), choice)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_a_group_of_its_single_weights(family: str) -> None:
    linears = find_linears(tiny_network(family))
    groups = weight_groups(linears)
    assert [group.name for group in groups] == [one.name for one in linears]
    for group, one in zip(groups, linears, strict=True):
        (member,) = group.members
        choice = torch.rand(group.shape) > 0.5
        assert torch.equal(member.oriented(one.weight), one.weight)
        assert torch.equal(member.mask(choice), choice)
        assert (group.block, group.units) == (one.block, one.weight.numel())


def test_masks_of_a_selection_meet_where_several_members_share_a_matrix() -> None:
    masks = Selection((neurons(), heads()), (kept(1, 0), kept(0, 1))).matrix_masks()
    assert masks.keys() == {"gate_up", "down", "q", "k", "o"}
    assert masks["gate_up"].all(1).tolist() == [True, False, True, False]
    assert masks["down"].all(0).tolist() == [True, False]
    assert masks["q"].all(1).tolist() == [False] * 4 + [True] * 4
    assert masks["k"].any(1).tolist() == [False] * 2 + [True] * 2
    assert masks["o"].all(0).tolist() == [False] * 4 + [True] * 4


def test_a_selection_counts_what_goes_in_every_measure() -> None:
    both = Selection((neurons(), heads()), (kept(1, 0), kept(0, 1)))
    assert (both.removed(), both.total()) == (2, 4)
    # A neuron: two rows of 3 with their biases, one column of 3. A group: rows of 4 x 3 and 2 x 3,
    # columns of 3 x 4.
    assert both.removed("weights") == 9 + 30 and both.total("weights") == 2 * (9 + 30)
    assert both.removed("parameters") == 11 + 30
    assert both.removed("flops") == 2 * (9 + 30)
    zeros = sum(int((~mask).sum()) for mask in both.matrix_masks().values())
    assert both.removed("weights") == zeros
    with pytest.raises(SelectionError, match="removing a neuron of mlp saves no links; .* flops"):
        both.removed("links")


def test_what_a_model_would_not_survive_is_refused_by_group() -> None:
    group = neurons()
    for changed, choice, said in (
        (group, kept(1, 0, 1), r"mlp is of shape \(3,\)"),
        (group, kept(0, 0), "0 units of mlp would stay; at least 1"),
        (replace(group, multiple_of=2), kept(1, 0), "1 units of mlp .* a multiple of 2"),
        (replace(group, is_protected=True), kept(1, 0), "mlp is protected, but 1 units"),
    ):
        with pytest.raises(SelectionError, match=said):
            Selection((changed,), (choice,))
    whole = replace(group, is_protected=True, multiple_of=5)
    assert Selection((whole,), (kept(1, 1),)).removed() == 0


def test_of_two_selections_the_later_one_decides() -> None:
    first = Selection((neurons(), heads()), (kept(1, 0), kept(1, 1)))
    both = first | Selection((heads(),), (kept(0, 1),))
    assert {group.name: choice.tolist() for group, choice in both} == {
        "mlp": [True, False],
        "attention": [False, True],
    }
    assert Selection() | first == first and [g.name for g in first.of([heads()]).groups] == [
        "attention"
    ]
    assert [group.name for group in first.of([heads()]).undecided(first.groups)] == ["mlp"]


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_an_edit_brings_everything_back_to_the_bit(family: str) -> None:
    model, ids = tiny_model(family), tiny_batches(1)
    groups = weight_groups(find_linears(model.model))
    choice = Selection(tuple(groups), tuple(torch.rand(group.shape) > 0.5 for group in groups))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    dense = model.model(ids).logits
    with pytest.raises(KeyError), zeroed(model, choice):
        for group, stays in choice:
            weight = group.members[0].linear.weight
            assert torch.equal(weight == 0, ~stays)
        assert not torch.equal(model.model(ids).logits, dense)
        raise KeyError
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert torch.equal(model.model(ids).logits, dense)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_units_that_are_zeroed_do_nothing_in_a_real_network() -> None:
    model, ids = tiny_model("llama"), tiny_batches(1)
    named = {one.name: one for one in find_linears(model.model)}
    gate, up, down = (named[f"model.layers.0.mlp.{word}_proj"] for word in ("gate", "up", "down"))
    made = (Member(one, "producer", units=64) for one in (gate, up))
    members = (*made, Member(down, "consumer", units=64))
    group = Group("model.layers.0.mlp", 0, "neuron", (64,), members, least=1)
    stays = torch.arange(64) % 3 > 0
    with zeroed(model, Selection((group,), (stays,))):
        logits = model.model(ids).logits
    with DenseWeights([down]):
        # The neurons' outputs are not read: the same, told of one matrix alone.
        down.weight[:, ~stays] = 0.0
        torch.testing.assert_close(model.model(ids).logits, logits)
    assert not torch.equal(model.model(ids).logits, logits)


def test_a_removal_is_done_or_refused_in_one_sentence() -> None:
    model, choice = tiny_model(), Selection()
    with pytest.raises(ModelError, match="a zero takes as much room as any other number"):
        ZEROS.remove(model, choice)
    done: list[Selection] = []
    Edit(zeroed, lambda model, selection: done.append(selection)).remove(model, choice)
    assert done == [choice]
