"""Parts of the depth are found by structure, and zeros, stand-ins and fewer layers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_blocks, find_linears
from prunezero.models.anatomy.sub_blocks import find_sub_blocks
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.shortening import shortening_of
from prunezero.models.editing.skipping import gone_of, skipped
from prunezero.models.editing.slicing import refuse_other_logits, sliced, slices_of
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import save_model
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import refuse_unequal_widths
from tests.models.test_mlp import noisy
from tests.report.test_smaller import stored
from tests.tiny_models import LAYOUTS, VOCABULARY, tiny_batches, tiny_model, tiny_tokenizer

DEEP = 3
KINDS = ("attention", "mlp", "block", "layer")
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# By layout: the ends of the names of what writes to the stream, attention first.
WRITERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def deep_model(layout: str, **changes: Any) -> LanguageModel:
    """A noisy tiny model of three blocks, which differ in kind where the layout has kinds."""
    kinds = {"layer_types": MIXED} if layout == "gemma3" else {}
    count = {"n_layer" if layout == "gpt2" else "num_hidden_layers": DEEP}
    return noisy(tiny_model(layout, **{**count, **kinds, **changes}))


def groups_of(model: LanguageModel, kind: str, **patterns: Any) -> list[Group]:
    return UNITS[kind].groups(find_linears(model.model, **patterns), model)


def without(groups: list[Group], *places: int) -> Selection:
    """All but the units at these places."""
    kept = [torch.tensor([place not in places]) for place in range(len(groups))]
    return Selection(tuple(groups), tuple(kept))


def count(model: LanguageModel) -> int:
    return sum(one.numel() for one in model.model.parameters())


def generated(network: Any, ids: Tensor, *, use_cache: bool) -> Tensor:
    found: Tensor = network.generate(
        ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_block_is_an_attention_and_an_mlp_with_the_norms_that_serve_them(layout: str) -> None:
    model = deep_model(layout)
    found = find_sub_blocks(model)
    assert [(one.block, one.kind) for one in found] == [
        (block, kind) for block in range(DEEP) for kind in ("attention", "mlp")
    ]
    for one in found:
        ending = WRITERS.get(layout, ("self_attn.o_proj", "mlp.down_proj"))[one.kind == "mlp"]
        assert one.writer.name.endswith(f".{one.block}.{ending}")
        # Side by side, neither reads the other.
        assert one.follows == (one.kind == "mlp" and layout != "gpt_neox")
    for block, module in enumerate(find_blocks(model.model)):
        names = [name for one in found if one.block == block for name in one.parameters]
        everything = dict(module.named_parameters())
        assert len(names) == len(set(names)) == len(everything)
    assert sum(one.cost["parameters"] for one in groups_of(model, "block")) == sum(
        one.cost["parameters"] for one in groups_of(model, "layer")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_stand_ins_and_removal_give_the_same_logits(layout: str, kind: str) -> None:
    model, ids = deep_model(layout), tiny_batches(2)
    groups = groups_of(model, kind)
    # The first attention too: caches count their tokens by it.
    choice = without(groups, 0, 3) if kind == "block" else without(groups, 0)
    dense, parameters = model.model(ids).logits, count(model)
    edit = UNITS[kind].edit
    with edit.simulated(model, choice):
        zeros = model.model(ids).logits
    with skipped(model, gone_of(model, choice)):
        stand_ins = model.model(ids).logits
    assert torch.equal(model.model(ids).logits, dense) and count(model) == parameters
    edit.remove(model, choice)
    torch.testing.assert_close(stand_ins, zeros, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.model(ids).logits, zeros, rtol=1e-5, atol=1e-5)
    assert float((zeros - dense).abs().max()) > 1e-2
    assert parameters - count(model) == choice.removed("parameters")
    cached, anew = (generated(model.model, ids[:, :5], use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew)


def odd_model(family: str) -> LanguageModel:
    """A model whose modules add to the stream themselves, or whose blocks write to their parts."""
    import transformers

    sizes: dict[str, dict[str, Any]] = {
        "Bloom": {"hidden_size": 32, "n_layer": DEEP, "n_head": 4},
        "Mpt": {"d_model": 32, "n_layers": DEEP, "n_heads": 4, "max_seq_len": 64},
        "Falcon": {"hidden_size": 32, "num_hidden_layers": DEEP, "num_attention_heads": 4},
    }
    configuration = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, pad_token_id=2, **sizes[family]
    )
    network = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    return noisy(wrap_model(network.eval(), tiny_tokenizer(), name=family))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["Bloom", "Mpt", "Falcon"])
def test_a_module_that_adds_to_the_stream_itself_hands_it_on(family: str, kind: str) -> None:
    model, ids = odd_model(family), tiny_batches(2)
    choice = without(groups_of(model, kind), 0)
    with UNITS[kind].edit.simulated(model, choice):
        zeros = model.model(ids).logits
    parameters = count(model)
    UNITS[kind].edit.remove(model, choice)
    torch.testing.assert_close(model.model(ids).logits, zeros, rtol=1e-5, atol=1e-5)
    assert parameters - count(model) == choice.removed("parameters")
    cached, anew = (generated(model.model, ids[:, :5], use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew)


def from_files(model: LanguageModel, folder: Path) -> LanguageModel:
    """The same model, read from several files, one of which may lose all that it holds."""
    model.model.save_pretrained(folder, max_shard_size="20KB")
    model.tokenizer.save_pretrained(folder)
    read = load_model(str(folder), device="cpu")
    assert read.source is not None
    return read


@pytest.mark.parametrize("is_from_files", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_transformers_loads_the_model_with_fewer_layers(
    layout: str, is_from_files: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = deep_model(layout), tiny_batches(2)
    if is_from_files:
        model = from_files(model, tmp_path / "dense")
    dense, choice = model.model(ids).logits, without(groups_of(model, "layer"), 0)
    save_model(model, tmp_path / "out", smaller=choice)
    assert torch.equal(model.model(ids).logits, dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with sliced(model, choice):
        assert torch.equal(loaded(ids).logits, model.model(ids).logits)
    with pytest.raises(ModelError, match="computes something else than with zeros"):
        refuse_other_logits(model, choice, ids[:1])
    with UNITS["layer"].edit.simulated(model, choice):
        refuse_other_logits(model, choice, ids[:1])
        torch.testing.assert_close(
            loaded(ids).logits, model.model(ids).logits, rtol=1e-5, atol=1e-5
        )
    assert loaded.config.num_hidden_layers == DEEP - 1
    if layout == "gemma3":
        assert loaded.config.layer_types == MIXED[1:]
    cached, anew = (generated(loaded, ids[:, :5], use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew)
    if is_from_files:
        files = stored(tmp_path / "out")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == files.keys()
        total = sum(one.nbytes for one in files.values())
        assert index["metadata"]["total_size"] == total
        assert {*index["weight_map"].values()} == {
            one.name for one in (tmp_path / "out").glob("*.safetensors")
        }


def test_a_norm_of_the_sum_is_refused_by_the_name_of_its_layout() -> None:
    said = "block 0 of OPTForCausalLM changes the stream even where attention and MLP add nothing"
    with pytest.raises(ModelError, match=said):
        find_sub_blocks(tiny_model("opt", do_layer_norm_before=False))


def test_a_bias_behind_a_sub_block_is_refused_since_it_would_stay() -> None:
    model = deep_model("gemma3")
    block = find_blocks(model.model)[1]
    norm = nn.LayerNorm(32)
    nn.init.constant_(norm.bias, 0.1)
    block.post_attention_layernorm = norm
    with pytest.raises(ModelError, match="block 1 of Gemma3ForCausalLM changes the stream"):
        find_sub_blocks(model)


def test_a_block_that_is_more_than_two_sub_blocks_is_refused() -> None:
    model = deep_model("llama")
    usual: Any = type(find_blocks(model.model)[0])

    class Longer(usual):  # type: ignore[misc]
        def forward(self, state: Tensor, *rest: Any, **named: Any) -> Any:
            return self.more(super().forward(state, *rest, **named))

    for block in find_blocks(model.model):
        block.__class__ = Longer
        block.more = nn.Linear(32, 32).requires_grad_(False)
    with pytest.raises(ModelError, match="mlp, a single linear map, not of one attention"):
        find_sub_blocks(model)


def test_half_a_sub_block_is_refused_and_others_are_left_alone() -> None:
    model = deep_model("llama")
    with pytest.raises(ModelError, match=r"it goes with model\.layers\.0\.mlp; choose or ignore"):
        groups_of(model, "mlp", ignore=["gate_proj"])
    with pytest.raises(
        ModelError, match=r"hold all of no mlp, .* model\.layers\.0\.mlp\.gate_proj,"
    ):
        groups_of(model, "mlp", targets=["q_proj"])
    some = groups_of(model, "layer", targets=[r"re:layers\.[12]\."])
    assert [group.name for group in some] == ["model.layers.1", "model.layers.2"]


def test_a_block_that_would_compute_otherwise_in_another_place_is_refused() -> None:
    model = deep_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    groups = groups_of(model, "layer")
    said = r"block 1 of GPT2LMHeadModel .* as block 0 of a model with 2 layers \('attn.scaling'"
    with pytest.raises(ModelError, match=said):
        slices_of(model, without(groups, 0))
    # The last one changes no place.
    assert shortening_of(model.model, without(groups, 2)).setting == {"n_layer": 2}


# No class of their own: an OPT's MLP is no module.
WITHOUT_CLASS = {"opt": ("mlp", "block")}


@pytest.mark.parametrize("is_from_files", [False, True])
@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_without_sub_blocks_is_saved_with_a_class_of_its_own_or_refused_by_name(
    layout: str, kind: str, is_from_files: bool, tmp_path: Path
) -> None:
    model, ids = deep_model(layout), tiny_batches(2)
    if is_from_files:
        model = from_files(model, tmp_path / "dense")
    # The first attention, and of a block both halves.
    choice = without(groups_of(model, kind), 0, *((4, 5) if kind == "block" else ()))
    dense, parameters = model.model(ids).logits, count(model)
    with UNITS[kind].edit.simulated(model, choice):
        refuse_other_logits(model, choice, ids[:1])
    with sliced(model, choice):
        expected, left = model.model(ids).logits, count(model)
    assert torch.equal(model.model(ids).logits, dense) and left < count(model) == parameters
    if kind in WITHOUT_CLASS.get(layout, ()):
        with pytest.raises(ModelError, match=r"no class of its own can .* \(--padded\)"):
            save_model(model, tmp_path / "out", smaller=choice)
        return
    save_model(model, tmp_path / "out", smaller=choice)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    expected_words = {"0": {"skip": ["attention" if kind == "block" else kind]}}
    expected_words |= {"2": {"skip": ["attention", "mlp"]}} if kind == "block" else {}
    assert told == expected_words
    found = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(found.model(ids).logits, expected)
    assert sum(one.numel() for one in stored(tmp_path / "out").values()) == left == count(found)
    cached, anew = (generated(found.model, ids[:, :5], use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew)


def test_layers_that_differ_keep_their_sizes_when_others_of_them_go(tmp_path: Path) -> None:
    model, ids = deep_model("llama"), tiny_batches(2)
    (group,) = UNITS["neuron"].groups(find_linears(model.model, targets=[r"re:layers\.1\."]), model)
    save_model(
        model, tmp_path / "first", smaller=Selection((group,), (torch.arange(group.units) > 3,))
    )
    unequal = load_model(str(tmp_path / "first"), device="cpu")
    choice = without(groups_of(unequal, "layer"), 0)
    with sliced(unequal, choice):
        expected = unequal.model(ids).logits
    save_model(unequal, tmp_path / "second", smaller=choice)
    told = json.loads((tmp_path / "second" / "config.json").read_text())
    assert told["per_layer_config"] == {"0": {"intermediate_size": group.units - 4}}
    again = load_model(str(tmp_path / "second"), device="cpu")
    assert torch.equal(again.model(ids).logits, expected)
    assert again.model.config.num_hidden_layers == DEEP - 1


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["Bloom", "Mpt", "Falcon"])
def test_what_no_class_can_say_is_smaller_in_memory_for_a_while(family: str, kind: str) -> None:
    model, ids = odd_model(family), tiny_batches(1)
    choice = without(groups_of(model, kind), 0)
    with UNITS[kind].edit.simulated(model, choice):
        refuse_other_logits(model, choice, ids)
    fields = {"name": "it", "criterion": "BI", "unit": kind, "compare": "model"}
    with pytest.raises(ModelError, match=r"no class of its own can .*\(--padded\)"):
        refuse_unequal_widths(model, validated(Recipe, fields, "it.yaml"), 0.34)
