"""Query heads are found where keys are shared, and a model without some computes what zeros do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError, SelectionError
from prunezero.models.anatomy.attention import kv_groups, query_heads
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced, slices_of
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import save_model
from prunezero.pruning.costs import costs_without
from tests.models.test_mlp import noisy
from tests.tiny_models import BLOCKS, tiny_batches, tiny_tokenizer
from tests.unequal import OF_FIXED_WIDTH, unequal_model

# Eight query heads of eight channels, four of each key-value head.
MANY = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
SHARING = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# Their configurations refuse hidden states that are no multiple of the heads.
DIVIDED = ("llama", "gemma2", "gemma3")
# By heads that stay of each layer: of every key-value head one, two, or three.
KEPT = {
    8: [True] * 8,
    2: [False, False, False, True, True, False, False, False],
    4: [False, True, False, True, True, False, True, False],
    6: [True, True, False, True, False, True, True, True],
}


def model_of(layout: str) -> LanguageModel:
    return unequal_model(layout, **MANY)


def heads_of(model: LanguageModel, **patterns: Any) -> list[Group]:
    return query_heads(find_linears(model.model, **patterns), model)


def chosen(model: LanguageModel, counts: tuple[int, int]) -> Selection:
    kept = [torch.tensor(KEPT[count]) for count in counts]
    return Selection(tuple(heads_of(model)), tuple(kept))


def generated(model: Any, ids: Tensor) -> list[list[int]]:
    return [
        model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=use)[0].tolist()
        for use in (True, False)
    ]


@pytest.mark.parametrize("layout", SHARING)
def test_a_query_head_is_rows_of_queries_and_the_columns_that_read_them(layout: str) -> None:
    model = model_of(layout)
    groups, whole = heads_of(model), kv_groups(find_linears(model.model), model)
    assert [group.block for group in groups] == list(range(BLOCKS))
    for group, shared in zip(groups, whole, strict=True):
        assert (group.kind, group.shape, group.strata, group.fewest) == ("head", (8,), 2, 2)
        queries, reader = group.members
        assert queries.linear.name.endswith("qkv_proj" if layout == "phi3" else "q_proj")
        assert (queries.start, queries.width, queries.role) == (0, 8, "producer")
        assert reader.linear.name.endswith("o_proj")
        assert (reader.start, reader.width, reader.role) == (0, 8, "consumer")
        # Four heads and the keys and values that they share are a key-value group.
        cached = shared.cost["kv bytes"] / 4
        assert shared.cost["weights"] - 4 * group.cost["weights"] == cached * 64
        assert "kv bytes" not in group.cost and group.name == shared.name


@pytest.mark.parametrize("layout", SHARING)
def test_other_rows_of_a_head_change_what_it_hands_on_and_nothing_else(layout: str) -> None:
    """By brute force, head after head, on the real weights."""
    model = model_of(layout)
    group = heads_of(model)[0]
    queries, reader = group.members
    seen: list[Tensor] = []
    handle = reader.linear.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    ids = tiny_batches(1, 12)
    with torch.no_grad():
        model.model(ids)
        for head in range(group.units):
            rows = slice(queries.start + 8 * head, queries.start + 8 * (head + 1))
            before = queries.linear.weight[rows].clone()
            queries.linear.weight[rows] = before.flip(1)
            model.model(ids)
            queries.linear.weight[rows] = before
            changed = (seen[-1] - seen[0]).reshape(-1, 8, 8).abs().amax((0, 2)) > 1e-6
            assert changed.nonzero().flatten().tolist() == [head]
    handle.remove()


@pytest.mark.parametrize("layout", OF_FIXED_WIDTH)
def test_heads_with_keys_of_their_own_are_refused_by_name(layout: str) -> None:
    with pytest.raises(ModelError, match="every query head has keys and values of its own.*kv_gro"):
        heads_of(unequal_model(layout))
    with pytest.raises(ModelError, match="block 0 of LlamaForCausalLM every query head.*kv_group"):
        heads_of(unequal_model("llama", num_key_value_heads=4))


def test_keys_and_values_are_no_part_of_a_head_and_queries_are() -> None:
    model = model_of("llama")
    assert len(heads_of(model, ignore=["k_proj", "v_proj"])) == BLOCKS
    with pytest.raises(ModelError, match="a head of model.layers.0.self_attn takes a part"):
        heads_of(model, ignore=["q_proj"])
    with pytest.raises(ModelError, match="so no query head can go; choose other targets"):
        heads_of(model, targets=["down_proj", "up_proj", "gate_proj"])


def interleaved() -> LanguageModel:
    """Queries, keys and values of each key-value head side by side in one matrix."""
    from transformers import AutoModelForCausalLM, FalconConfig

    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "bias": False}
    heads = {"num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}
    network = AutoModelForCausalLM.from_config(FalconConfig(**sizes, **heads), dtype=torch.float32)
    return noisy(wrap_model(network.eval(), tiny_tokenizer(), name="falcon"))


def test_interleaved_queries_are_found_between_keys_and_values_that_stay() -> None:
    model = interleaved()
    (group, _) = heads_of(model)
    queries, reader = group.members
    assert (group.units, group.strata, queries.run, queries.gap) == (8, 2, 32, 16)
    kept = torch.tensor(KEPT[6])
    rows = torch.tensor([True] * 96)
    for head in (2, 4):
        first = 8 * head + 16 * (head // 4)
        rows[first : first + 8] = False
    assert torch.equal(queries.kept_rows(kept), rows)
    assert torch.equal(queries.mask(kept), rows[:, None].expand(96, 64))
    turned = queries.oriented(queries.linear.weight)
    assert torch.equal(turned[4].reshape(8, 64), queries.linear.weight[48:56])
    # What other heads hand on does not change without these.
    seen: list[Tensor] = []
    handle = reader.linear.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    selection = Selection((group,), (kept,))
    with torch.no_grad():
        model.model(tiny_batches(1))
        with zeroed(model, selection):
            model.model(tiny_batches(1))
    handle.remove()
    same = [torch.equal(*(one[..., 8 * head : 8 * head + 8] for one in seen)) for head in range(8)]
    assert same == KEPT[6]
    # Its configuration has no word for the size of a head.
    assert (
        "no configuration of falcon gives its layers the widths"
        in slices_of(model, selection).fault
    )


def test_key_value_heads_that_take_turns_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries 0, 2, 4, ... of the first, 1, 3, 5, ... of the second."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(
        modeling_llama, "repeat_kv", lambda states, times: states.repeat(1, times, 1, 1)
    )
    model = unequal_model("llama", **MANY, attn_implementation="eager")
    with pytest.raises(ModelError, match="do not stand side by side.*so no query head can go"):
        heads_of(model)


def test_one_key_value_head_for_all_is_one_stratum() -> None:
    model = unequal_model("llama", **{**MANY, "num_key_value_heads": 1})
    (group, *_) = heads_of(model)
    assert (group.units, group.strata, group.step) == (8, 1, 1)
    kept = torch.arange(8) != 3
    with zeroed(model, Selection((group,), (kept,))):
        expected = model.model(tiny_batches(2)).logits
    with sliced(model, Selection((group,), (kept,))):
        found = model.model(tiny_batches(2)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_as_many_heads_of_each_key_value_head_have_to_stay() -> None:
    (group, *_) = heads_of(model_of("llama"))
    with pytest.raises(SelectionError, match="of the 2 parts of model.*self_attn 4, 2 units would"):
        Selection((group,), (torch.arange(8) < 6,))
    with pytest.raises(SelectionError, match="1 units of .* at least 2 have to, and a multiple of"):
        Selection((group,), (torch.arange(8) < 1,))


@pytest.mark.parametrize("counts", [(4, 4), (6, 6), (4, 6), (2, 8)], ids=str)
@pytest.mark.parametrize("layout", SHARING)
def test_a_model_without_heads_computes_what_the_zeroed_one_does(
    layout: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    model = model_of(layout)
    selection, ids, network = chosen(model, counts), tiny_batches(2), model.model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dense = network(ids).logits
    with zeroed(model, selection):
        simulated = network(ids).logits
    whole, smaller = (costs_without(model, one, ids[:1]) for one in (Selection(), selection))
    with sliced(model, selection):
        found, tokens = network(ids).logits, generated(network, ids)
    torch.testing.assert_close(found, simulated, rtol=1e-5, atol=1e-5)
    assert float((simulated - dense).abs().max()) > 1e-3 and tokens[0] == tokens[1]
    assert smaller.kv_bytes == whole.kv_bytes and smaller.flops < whole.flops
    assert whole.parameters - smaller.parameters == selection.removed("parameters")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    is_plain = len(set(counts)) == 1 and not (layout in DIVIDED and 64 % counts[0])
    assert bool(slices_of(model, selection).layers) != is_plain
    save_model(model, tmp_path / "out", smaller=selection)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["num_key_value_heads"] == 2
    assert told["model_type"].startswith("pruned_") != is_plain
    if is_plain:
        assert (told["num_attention_heads"], told["head_dim"]) == (counts[0], 8)
    again = load_model(str(tmp_path / "out"), device="cpu")
    assert float((again.model(ids).logits - found).abs().max()) == 0.0
    assert generated(again.model, ids) == tokens


def test_heads_of_a_smaller_model_may_go_again(tmp_path: Path) -> None:
    model = model_of("llama")
    save_model(model, tmp_path / "first", smaller=chosen(model, (4, 6)))
    again = load_model(str(tmp_path / "first"), device="cpu")
    groups = heads_of(again)
    assert [(group.units, group.strata) for group in groups] == [(4, 2), (6, 2)]
    kept = (torch.tensor([1, 1, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, 1, 1]).bool())
    fewer = Selection(tuple(groups), kept)
    with sliced(again, fewer):
        expected = again.model(tiny_batches(1)).logits
    save_model(again, tmp_path / "second", smaller=fewer)
    found = load_model(str(tmp_path / "second"), device="cpu")
    assert float((found.model(tiny_batches(1)).logits - expected).abs().max()) == 0.0
