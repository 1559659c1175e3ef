"""Channels of the residual stream are found in every layout, and leave as if they never were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunezero.errors import ModelError
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.anatomy.stream import channel_groups
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import NARROWER, sliced, width_setting
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import save_model
from tests.tiny_models import (
    BLOCKS,
    HIDDEN,
    LAYOUTS,
    save_tiny_model,
    tiny_batches,
    tiny_model,
    tiny_network,
    tiny_tokenizer,
)

# By layout, the axis of each stored tensor along which the stream lies, by the end of its name.
COLUMNS = r"(q_proj|k_proj|v_proj|gate_proj|up_proj|qkv_proj|gate_up_proj|embed_tokens|lm_head)"
LLAMA = {
    COLUMNS + r"\.weight$": 1,
    r"(o_proj|down_proj)\.weight$": 0,
    r"(?<!q_)(?<!k_)norm\.weight$": 0,
}
AXES: dict[str, dict[str, int]] = {
    "gpt2": {
        r"(wte|wpe|lm_head)\.weight$": 1,
        r"ln_(1|2|f)\.(weight|bias)$": 0,
        r"(c_attn|c_fc)\.weight$": 0,
        r"c_proj\.weight$": 1,
        r"c_proj\.bias$": 0,
    },
    "opt": {
        r"(embed_tokens|embed_positions|lm_head|q_proj|k_proj|v_proj|fc1)\.weight$": 1,
        r"layer_norm\.(weight|bias)$": 0,
        r"(out_proj|fc2)\.(weight|bias)$": 0,
    },
    "gpt_neox": {
        r"(embed_in|embed_out|lm_head|query_key_value|dense_h_to_4h)\.weight$": 1,
        r"(layernorm|layer_norm)\.(weight|bias)$": 0,
        r"(dense|dense_4h_to_h)\.(weight|bias)$": 0,
    },
}
# Whose heads are as wide together as the stream, so that no configuration has a narrower one.
BOUND = ("gpt2", "opt", "gpt_neox")
FREE = tuple(layout for layout in LAYOUTS if layout not in BOUND)
GONE = (0, 3, 17, 30)
KEPT = torch.tensor([place not in GONE for place in range(HIDDEN)])


def shaken(model: LanguageModel) -> LanguageModel:
    """The model with no two numbers alike: norms begin as ones, biases as zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def channels(model: LanguageModel) -> Group:
    (group,) = channel_groups(find_linears(model.model), model)
    return group


def axis_of(layout: str, name: str) -> int | None:
    found = {axis for end, axis in AXES.get(layout, LLAMA).items() if re.search(end, name)}
    assert len(found) < 2, name
    return next(iter(found), None)


def part_of(layout: str, name: str, values: Tensor) -> Tensor:
    axis = axis_of(layout, name)
    places = torch.arange(values.shape[axis])[KEPT] if axis is not None else None
    return values if axis is None or places is None else values.index_select(axis, places)


def logits(network: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        answer: Tensor = network(tiny_batches(2, 12) if ids is None else ids).logits
    return answer


@contextmanager
def norms_over_kept_channels(model: LanguageModel, layout: str) -> Iterator[None]:
    """At full size: zeros where channels are gone, and norms that divide by what is left."""
    before = {name: one.clone() for name, one in model.model.state_dict().items()}
    patched = []
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        is_vector = isinstance(weight, Tensor) and weight.dim() == 1
        if is_vector and axis_of(layout, f"{name}.weight") == 0:
            patched.append(module)
            module.forward = masked_norm(module, layout)
    for name, values in model.model.state_dict().items():
        axis = axis_of(layout, name)
        if axis is not None:
            values[(slice(None),) * axis + (~KEPT,)] = 0.0
    try:
        yield
    finally:
        for module in patched:
            del module.forward
        model.model.load_state_dict(before)


def masked_norm(module: nn.Module, layout: str) -> Any:
    weight = module.weight[KEPT].clone()  # type: ignore[index]
    bias = None if getattr(module, "bias", None) is None else module.bias[KEPT].clone()  # type: ignore[index]

    def forward(states: Tensor) -> Tensor:
        x, whole = states[..., KEPT], torch.zeros_like(states)
        if isinstance(module, nn.LayerNorm):
            whole[..., KEPT] = functional.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
            return whole
        eps: Any = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        scale = 1.0 + weight if layout == "gemma3" else weight
        whole[..., KEPT] = scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return whole

    return forward


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_on_the_stream_is_found_and_no_other(layout: str) -> None:
    model = shaken(tiny_model(layout))
    expected = {}
    for name, values in model.model.named_parameters():
        axis = axis_of(layout, name)
        assert axis is None or values.shape[axis] == HIDDEN
        expected[name] = part_of(layout, name, values).shape
    group = channels(model)
    assert (group.shape, group.kind, group.name) == ((HIDDEN,), "channel", "stream")
    with sliced(model, Selection((group,), (KEPT,))):
        assert {name: one.shape for name, one in model.model.named_parameters()} == expected
        small = sum(one.numel() for one in model.model.parameters())
    dense = sum(one.numel() for one in model.model.parameters())
    assert dense - small == len(GONE) * group.cost["parameters"]
    readers = [one for one in group.members if one.role == "consumer" and not one.is_again]
    # One for each norm in front of attention and MLP.
    assert len(readers) == 2 * BLOCKS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_smaller_model_computes_what_norms_over_the_kept_channels_make(layout: str) -> None:
    model = shaken(tiny_model(layout))
    dense = logits(model.model)
    written = [one._version for one in model.model.parameters()]
    group = channels(model)
    assert [one._version for one in model.model.parameters()] == written
    assert torch.equal(logits(model.model), dense)
    before = {name: one.clone() for name, one in model.model.state_dict().items()}
    with NARROWER.simulated(model, Selection((group,), (KEPT,))):
        found = logits(model.model)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert torch.equal(logits(model.model), dense)
    with norms_over_kept_channels(model, layout):
        if layout == "gemma3":
            model.model.model.embed_tokens.embed_scale.fill_((HIDDEN - len(GONE)) ** 0.5)
        expected = logits(model.model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("layout", FREE)
def test_the_smaller_model_is_a_fresh_one_of_that_width_with_the_parts_that_stay(
    layout: str, tie: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = shaken(tiny_model(layout, tie_word_embeddings=tie))
    left = HIDDEN - len(GONE)
    fresh = tiny_network(layout, hidden_size=left, head_dim=8, tie_word_embeddings=tie)
    state = {name: part_of(layout, name, one) for name, one in model.model.state_dict().items()}
    fresh.load_state_dict(state)
    selection = Selection((channels(model),), (KEPT,))
    with sliced(model, selection):
        assert torch.equal(logits(model.model), logits(fresh))
        assert model.model.config.hidden_size == left
    assert model.model.config.hidden_size == HIDDEN
    save_model(model, tmp_path / "out", smaller=selection)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model.model)
    assert (again.config.hidden_size, again.config.head_dim) == (left, 8)
    assert torch.equal(logits(again), logits(fresh))
    ids = tiny_batches(1, 6)
    with_cache, without = (
        again.generate(ids, max_new_tokens=8, do_sample=False, use_cache=one)
        for one in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("layout", FREE)
def test_a_model_from_files_keeps_their_bits_in_what_stays(layout: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(layout, tmp_path / "dense")
    model = load_model(str(folder))
    selection = Selection((channels(model),), (KEPT,))
    with sliced(model, selection):
        expected = logits(model.model)
    save_model(model, tmp_path / "out", smaller=selection)
    dense = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert dense.keys() == saved.keys()
    for name, values in dense.items():
        assert torch.equal(saved[name], part_of(layout, name, values))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("layout", BOUND)
def test_where_heads_are_as_wide_as_the_stream_nothing_is_saved(layout: str) -> None:
    model = tiny_model(layout)
    group = channels(model)
    with pytest.raises(ModelError, match=f"no configuration of {layout} has 28 channels of the"):
        width_setting(model, [group], {group.name: 28})
    with pytest.raises(ModelError, match="but cannot be saved"):
        NARROWER.remove(model, Selection((group,), (KEPT,)))


def test_a_removal_for_good_is_told_to_the_configuration() -> None:
    model = shaken(tiny_model("mistral"))
    selection = Selection((channels(model),), (KEPT,))
    with sliced(model, selection):
        expected = logits(model.model)
    NARROWER.remove(model, selection)
    assert torch.equal(logits(model.model), expected)
    assert model.model.config.hidden_size == HIDDEN - len(GONE)
    assert channels(model).units == HIDDEN - len(GONE)


def test_norms_of_heads_as_long_as_the_stream_is_wide_are_not_on_it() -> None:
    model = shaken(tiny_model("qwen3", head_dim=HIDDEN))
    names = {part.name for part in channels(model).parts}
    assert "model.layers.0.input_layernorm.weight" in names
    assert not any("q_norm" in name or "k_norm" in name for name in names)


@pytest.mark.parametrize("kind", ["olmo", "olmo2", "gemma2", "cohere", "starcoder2", "bloom"])
def test_other_families_need_nothing_of_their_own(kind: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    told = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
    told |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    told |= {"head_dim": 8, "query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    settings = CONFIG_MAPPING[kind](**told, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    network = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    model = shaken(wrap_model(network, tiny_tokenizer(), name=kind))
    selection = Selection((channels(model),), (KEPT,))
    with sliced(model, selection):
        expected = logits(model.model)
    if kind == "bloom":
        # Its heads are as wide together as the stream.
        with pytest.raises(ModelError, match="no configuration of bloom has 28 channels"):
            save_model(model, tmp_path / "out", smaller=selection)
        return
    save_model(model, tmp_path / "out", smaller=selection)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_layouts_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="OPTForCausalLM has embeddings .* of the widths 16, 32"):
        channels(tiny_model("opt", word_embed_proj_dim=16))
    model = tiny_model("llama")
    slope = torch.linspace(0.1, 2.0, HIDDEN)
    # Something on the stream that is no parameter of a norm, a linear map or an embedding.
    model.model.model.layers[1].register_forward_hook(lambda module, args, output: output * slope)
    with pytest.raises(ModelError, match="once all channels stand in another order"):
        channels(model)
    assert all(torch.isfinite(one).all() for one in model.model.parameters())


def test_channels_go_from_all_matrices_or_from_none() -> None:
    model = tiny_model("llama")
    some = find_linears(model.model, ignore=["model.layers.0.mlp.down_proj"])
    with pytest.raises(ModelError, match="down_proj' is not among the layers that are pruned"):
        channel_groups(some, model)
