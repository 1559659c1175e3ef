"""A turned residual stream changes nothing, and loses what an explicit projection takes away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.anatomy.directions import direction_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import ROTATED, sliced, slices_of
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.loading.load import load_model
from prunezero.models.loading.shards import Shards
from prunezero.models.observing.directions import chosen_directions
from prunezero.models.saving.gguf_deci import refuse_without_deci
from prunezero.models.saving.save import save_model
from prunezero.scoring.statistics import Statistics
from tests.models.test_mlp import groups_of
from tests.models.test_stream import shaken
from tests.tiny_models import (
    BLOCKS,
    HIDDEN,
    VOCABULARY,
    _shared,
    tiny_batches,
    tiny_model,
    tiny_tokenizer,
)
from tests.unequal import unequal_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
IDS = tiny_batches(3, 16)
LEFT = 24
LOADED = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.load(sys.argv[1])
    with torch.no_grad():
        logits, hidden = model(ids).logits, model.lm_head(body(ids).last_hidden_state)
    new = [
        model.generate(ids[:1, :6], max_new_tokens=8, do_sample=False, use_cache=use)[0].tolist()
        for use in (True, False)
    ]
    found[folder] = {"logits": logits, "hidden": hidden, "new": new}
torch.save(found, sys.argv[1])
"""


def model_of(family: str, **changes: Any) -> LanguageModel:
    """A tiny model with no two numbers alike."""
    if family == "gemma":
        from transformers import GemmaConfig, GemmaForCausalLM

        sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, **changes}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = GemmaForCausalLM(GemmaConfig(**{**_shared(), **sizes}))
        return shaken(wrap_model(network.eval(), tiny_tokenizer(), name="gemma"))
    # With a window another mask would do the same.
    changes |= {"sliding_window": None} if family == "mistral" else {}
    of = tiny_model if family in ("llama", "mistral", "qwen3", "phi3") else unequal_model
    return shaken(of(family, **changes))


def chosen(
    model: LanguageModel, left: int = LEFT, *, is_sequential: bool = True, damping: float = 0.01
) -> Selection:
    """The directions of the largest eigenvalues in each place."""
    groups = direction_groups(find_linears(model.model), model)

    def first(group: Group, statistics: Statistics) -> Tensor:
        return torch.arange(group.units) < left

    numbers: Any = {"damping": damping, "is_sequential": is_sequential}
    return chosen_directions(model, groups, IDS, (), first, **numbers)


def logits(network: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        answer: Tensor = network(ids).logits
    return answer


def eps_of(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def by_projection(
    model: LanguageModel, left: int, *, bases: list[np.ndarray[Any, Any]] | None = None
) -> tuple[Tensor, list[np.ndarray[Any, Any]]]:
    """Logits of the paper's algorithm on tensors of full size, and second moments by place.

    Between attentions and MLPs the stream is projected to the eigenvectors of what the norm behind
    makes of it, whose factors are left out: x / sqrt(mean(x^2) + eps). Everything in float64.

    Args:
        bases: on which the stream is projected instead of its own eigenvectors.
    """
    network: Any = model.model.double()
    body, moments = network.model, []
    with torch.no_grad():
        states = [body.embed_tokens(ids[None]) for ids in IDS]
        places = torch.arange(IDS.shape[1])[None]
        rotary = body.rotary_emb(states[0], places)
        causal = torch.full((16, 16), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, part in (
                (layer.input_layernorm, attention),
                (layer.post_attention_layernorm, mlp),
            ):
                rows = np.concatenate([one[0].numpy() for one in states])
                rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + eps_of(norm))
                moments.append(rows.T @ rows)
                found = np.linalg.eigh(moments[-1])[1][:, ::-1][:, :left]
                if bases is not None:
                    found = bases[len(moments) - 1]
                projection = torch.from_numpy(found @ found.T)
                states = [one @ projection for one in states]
                more = [
                    part(norm(one), position_embeddings=rotary, attention_mask=causal)[0]
                    if part is attention
                    else part(norm(one))
                    for one in states
                ]
                states = [one + added for one, added in zip(states, more, strict=True)]
        answer = torch.cat([network.lm_head(body.norm(one)) for one in states])
    model.model.float()
    return answer.float(), moments


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_model_that_loses_nothing_computes_what_it_did(family: str) -> None:
    model = model_of(family)
    dense, before = logits(model.model), model.model.state_dict()
    before = {name: one.clone() for name, one in before.items()}
    config, kinds = model.model.config.to_dict(), [type(one) for one in model.model.modules()]
    for selection in (chosen(model, HIDDEN), chosen(model, HIDDEN, is_sequential=False)):
        with sliced(model, selection):
            turned = logits(model.model)
            weight = model.model.get_parameter("model.layers.1.mlp.down_proj.weight")
            assert torch.equal(weight, before["model.layers.1.mlp.down_proj.weight"])
            first = model.model.get_parameter("model.layers.0.mlp.down_proj.weight")
            assert not torch.allclose(first, before["model.layers.0.mlp.down_proj.weight"])
        torch.testing.assert_close(turned, dense, rtol=1e-5, atol=1e-5)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert torch.equal(logits(model.model), dense) and model.model.config.to_dict() == config
    assert [type(one) for one in model.model.modules()] == kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_go_as_an_explicit_projection_takes_them(family: str) -> None:
    # So large that it shows that eps belongs to a mean over the whole width.
    model = model_of(family, attn_implementation="eager", rms_norm_eps=0.05)
    dense, selection = logits(model.model), chosen(model)
    with ROTATED.simulated(model, selection):
        found = logits(model.model)
    expected, moments = by_projection(model, LEFT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)
    assert len(moments) == len(selection.groups) == 2 * BLOCKS
    for group, moment in zip(selection.groups, moments, strict=True):
        assert group.basis is not None
        basis = group.basis.numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(HIDDEN), atol=1e-10)
        # The first column has the largest eigenvalue.
        values = np.linalg.eigvalsh(moment)[::-1]
        np.testing.assert_allclose(
            np.diag(basis.T @ moment @ basis), values, rtol=1e-3, atol=1e-4 * values[0]
        )


def test_bases_of_dense_statistics_are_those_of_the_whole_stream() -> None:
    model = model_of("llama", attn_implementation="eager")
    selection = chosen(model, is_sequential=False)
    _, moments = by_projection(model, HIDDEN)
    bases = [np.linalg.eigh(one)[1][:, ::-1][:, :LEFT] for one in moments]
    for (group, kept), basis in zip(selection, bases, strict=True):
        assert group.basis is not None
        span = group.basis[:, kept].numpy()
        np.testing.assert_allclose(span @ span.T, basis @ basis.T, atol=1e-4)
    with sliced(model, selection):
        found = logits(model.model)
    expected, _ = by_projection(model, LEFT, bases=bases)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sequential = chosen(model)
    with sliced(model, sequential):
        assert not torch.allclose(logits(model.model), found, atol=1e-3)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_its_files_hold_all_that_it_takes_and_are_read_back_without_being_run(
    family: str, tie: bool, tmp_path: Path
) -> None:
    model = model_of(family, tie_word_embeddings=tie)
    selection = chosen(model)
    with sliced(model, selection):
        expected = logits(model.model)
    save_model(model, tmp_path / "out", smaller=selection)
    for file in ("configuration_pruned.py", "modeling_pruned.py", "rotated_pruned.py"):
        assert "prunezero" not in (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text("raise SystemExit('foreign code was run')")
    found = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(logits(found.model), expected)
    d, inside, queries, keys = LEFT, 64, 32, 16
    # Queries, keys, values and outputs; gate, up and down; two norms.
    layers = BLOCKS * ((2 * queries + 2 * keys) * d + 3 * inside * d + 2 * d)
    # What the last layer writes is as wide as the head reads.
    layers += inside * (HIDDEN - d)
    between = (2 * BLOCKS - 1) * d * d + d * HIDDEN
    tables = VOCABULARY * d + VOCABULARY * HIDDEN + HIDDEN
    stored = Shards(tmp_path / "out").tensors
    names = [name for name in stored if name.endswith("_shortcut_Q")]
    assert len(names) == 2 * BLOCKS
    assert sum(np.prod(stored[name].shape) for name in names) == between
    assert sum(np.prod(one.shape) for one in stored.values()) == layers + between + tables
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["hidden_size"], told["head_dim"], told["tie_word_embeddings"]) == (d, 8, False)


def test_a_fresh_process_loads_every_family_by_the_files_of_the_folder(tmp_path: Path) -> None:
    expected = {}
    for family in FAMILIES:
        model = model_of(family)
        selection, folder = chosen(model), tmp_path / family
        with sliced(model, selection):
            expected[str(folder)] = logits(model.model)
        save_model(model, folder, smaller=selection)
    torch.save(IDS, tmp_path / "ids")
    program = [sys.executable, "-c", LOADED, str(tmp_path / "ids"), *expected]
    subprocess.run(program, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "ids")
    for name, wanted in expected.items():
        assert torch.equal(found[name]["logits"], wanted), name
        torch.testing.assert_close(found[name]["hidden"], wanted, rtol=1e-5, atol=1e-5)
        with_cache, without = found[name]["new"]
        assert with_cache == without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_what_files_of_a_narrower_dtype_hold(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = model_of("llama")
    model.model.to(dtype).save_pretrained(tmp_path / "dense")
    model.tokenizer.save_pretrained(tmp_path / "dense")
    read = load_model(str(tmp_path / "dense"), device="cpu")
    selection = chosen(read)
    with sliced(read, selection):
        expected = logits(read.model)
    save_model(read, tmp_path / "out", smaller=selection)
    again = load_model(str(tmp_path / "out"), device="cpu")
    assert torch.equal(logits(again.model), expected)
    stored = Shards(tmp_path / "out").tensors
    assert {one.dtype for one in stored.values()} == {"F32" if dtype == torch.float32 else "BF16"}
    before = Shards(tmp_path / "dense")
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(Shards(tmp_path / "out").read(name), before.read(name))
    shared = Shards(tmp_path / "out").read("lm_head.weight")
    assert torch.equal(shared, before.read("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("opt", "has 'model.decoder.final_layer_norm', which is a LayerNorm and no RMSNorm"),
        ("gpt2", "has 'transformer.ln_f', which is a LayerNorm and no RMSNorm"),
        ("gpt_neox", "has 'gpt_neox.final_layer_norm', which is a LayerNorm and no RMSNorm"),
        ("gemma3", "not one attention and one MLP with one norm before each"),
        ("gemma2", "not one attention and one MLP with one norm before each"),
    ],
)
def test_a_layout_that_cannot_be_turned_is_refused_by_name(family: str, said: str) -> None:
    model = unequal_model(family)
    with pytest.raises(ModelError, match=said):
        direction_groups(find_linears(model.model), model)


def test_layers_that_compute_otherwise_are_refused() -> None:
    model = model_of("llama")
    layer: Any = type(model.model.model.layers[0])
    usual = layer.forward

    def twice(self: Any, hidden_states: Tensor, **named: Any) -> Tensor:
        answer: Tensor = 2.0 * usual(self, hidden_states, **named)
        return answer

    layer.forward = twice
    try:
        with pytest.raises(ModelError, match="computes something else than embeddings and"):
            direction_groups(find_linears(model.model), model)
    finally:
        layer.forward = usual


def test_directions_leave_alone_and_as_many_everywhere() -> None:
    model = model_of("llama")
    selection = chosen(model)
    with pytest.raises(ModelError, match="do not leave one model together"):
        neurons = groups_of(model)
        both = (*selection.groups, neurons[0])
        slices_of(model, Selection(both, (*selection.kept, torch.ones(64, dtype=torch.bool))))
    with pytest.raises(ModelError, match="different numbers of directions would stay"):
        other = torch.arange(HIDDEN) < LEFT - 1
        slices_of(model, Selection(selection.groups, (*selection.kept[1:], other)))
    with pytest.raises(ModelError, match="leave a model when it is saved"):
        ROTATED.remove(model, selection)
    assert not selection.matrix_masks()


def test_a_folder_with_several_bases_is_pruned_again_but_turned_no_more(tmp_path: Path) -> None:
    model = model_of("llama")
    save_model(model, tmp_path / "out", smaller=chosen(model))
    again = load_model(str(tmp_path / "out"), device="cpu")
    with pytest.raises(ModelError, match="has layers of different sizes, or is part"):
        direction_groups(find_linears(again.model), again)
    with pytest.raises(ModelError, match="reads its residual stream in several bases"):
        refuse_without_deci(again.model.config, "out")
    groups = groups_of(again)
    kept = tuple(torch.arange(one.units) % 4 > 0 for one in groups)
    narrower = Selection(tuple(groups), kept)
    with sliced(again, narrower):
        expected = logits(again.model)
    save_model(again, tmp_path / "both", smaller=narrower)
    assert torch.equal(logits(load_model(str(tmp_path / "both")).model), expected)
