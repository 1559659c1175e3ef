"""A recipe of keys as one page: plain transformers keeps with it what the engine keeps."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from prunezero.errors import OutputError
from prunezero.models.attending.installing import masking
from prunezero.models.attending.policy import Policy
from prunezero.pruning.attention import policy_of
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.keys_page import TEMPLATE, keys_page, write_keys
from tests.tiny_attention import sharp_model

PROMPT, KEPT = 40, 0.5
NUMBERS = {"sinks": 2, "recent": 4, "window": 4, "pool": 3}
IDS = (3 + torch.randperm(90, generator=torch.Generator().manual_seed(1)))[None, : PROMPT + 12]
RECIPES: dict[str, dict[str, Any]] = {
    "snapkv": {"criterion": "ATT_W"},
    "pooled_by_none": {"criterion": "ATT_W * VN", "unit": {"kv_column": {**NUMBERS, "pool": 1}}},
    "shared": {"criterion": "ATT_LAST", "unit": {"kv_column": {**NUMBERS, "share": "layer"}}},
    "odd": {"criterion": "KDEV + log(AGE) / VN - minmax(KN) ** 0.5 * row_mean(ATT_W)"},
    "first": {"criterion": "-POS"},
}


def recipe(name: str, **choices: Any) -> Recipe:
    fields = {"name": name, "unit": {"kv_column": NUMBERS}, "compare": "kv_head"}
    fields |= {"provenance": {"kept": KEPT}} | choices
    return validated(Recipe, fields, f"{name}.yaml")


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def unregistered() -> Any:
    """The library knows afterwards what it knew before."""
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = set(functions)
    yield
    for name in set(functions) - before:
        del functions[name], masks[name]


FAMILIES = [("llama", name) for name in RECIPES] + [("gpt2", "snapkv"), ("gemma3", "snapkv")]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_a_page_keeps_what_the_engine_keeps(family: str, name: str, tmp_path: Path) -> None:
    model = sharp_model(family)
    chosen = recipe(name, **RECIPES[name])
    policy = policy_of(chosen, KEPT)
    assert isinstance(policy, Policy)
    parts = (IDS[:, :PROMPT], IDS[:, PROMPT : PROMPT + 5], IDS[:, PROMPT + 5 :])
    with torch.no_grad():
        dense = model.model(IDS).logits
        with masking(model, policy) as cache:
            session = [model.model(part, cache=cache).logits for part in parts]
    write_keys(chosen, tmp_path / f"page_{name}_{family}.py")
    page = imported(tmp_path / f"page_{name}_{family}.py")
    network = model.model
    network.set_attn_implementation(page.NAME)
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        found = [network(part, cache=cache).logits for part in parts]
    for one, other in zip(found, session, strict=True):
        assert float((one - other).abs().max()) < 1e-5
    assert float((torch.cat(found, 1) - dense)[:, PROMPT:].abs().max()) > 1e-3
    rows = [one.alive[0, :, :PROMPT] for one in network.modules() if hasattr(one, "alive")]
    assert rows and all(bool((row.sum(-1) == PROMPT * KEPT).all()) for row in rows)


def test_a_page_generates_and_never_sees_what_comes_later(tmp_path: Path) -> None:
    model = sharp_model()
    write_keys(recipe("page_later", criterion="ATT_W"), tmp_path / "page_later.py")
    network = model.model
    network.set_attn_implementation(imported(tmp_path / "page_later.py").NAME)
    told = network.generate(IDS[:, :PROMPT], max_new_tokens=6, do_sample=False)
    assert told.shape[1] == PROMPT + 6
    with torch.no_grad():
        before = network(IDS[:, :PROMPT]).logits
        other = IDS.clone()
        other[:, PROMPT - 3] = 3
        assert torch.equal(network(other[:, :PROMPT]).logits[:, : PROMPT - 3], before[:, :-3])
        with pytest.raises(ValueError, match="3 of 6 keys may stay, but 6 always do"):
            network(IDS[:, :6])
        padded = torch.ones(2, PROMPT, dtype=torch.long)
        padded[0, :5] = 0
        with pytest.raises(ValueError, match="padded batch"):
            network(IDS[:, :PROMPT].repeat(2, 1), attention_mask=padded)


def test_a_page_says_what_it_does_and_needs_nothing_of_prunezero() -> None:
    page = keys_page(recipe("page_plain", criterion="KN"))
    imports = [one for one in ast.walk(ast.parse(page)) if isinstance(one, ast.ImportFrom)]
    assert {str(one.module).split(".")[0] for one in imports} <= {
        *("__future__", "fractions", "typing", "torch", "transformers")
    }
    docstring = ast.get_docstring(ast.parse(page)) or ""
    assert 'set_attn_implementation("page_plain")' in docstring and "`KN`" in docstring
    # What the formula does not look at is not there.
    assert "def observed" not in page
    compile(TEMPLATE.read_text(), "template", "exec")


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ("adakv", "compare: layer"),
        ("h2o", "when: step, ATT_SUM"),
        ("criticalkv", "first: ATT_W, VON"),
        ("expected_attention", "EXPECTED"),
        ("quest", "unit: link"),
    ],
)
def test_what_a_page_cannot_follow_is_refused_by_name(published: str, said: str) -> None:
    with pytest.raises(OutputError, match="which one page of attention cannot follow") as refusal:
        keys_page(Recipe.load(published))
    assert said in str(refusal.value)
