"""Sums and dense weights that stay in files change no bit of what compare and search find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError
from prunezero.files.cache import cache_dir
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.zeroing import DenseWeights
from prunezero.models.loading.load import load_model
from prunezero.pruning.compare import compare
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed
from prunezero.searching.session import find
from tests.searching.test_search import outcome
from tests.searching.testbed import SETTINGS, tiny_space, tiny_text
from tests.tiny_models import save_tiny_model
from tests.tiny_moe import save_stacked

# Of each signal one, of mended weights two, and one in which all layers compete.
RECIPES = ("magnitude", "wanda", "gblm", "fisher", "sparsegpt", "admm")


@pytest.fixture
def testbeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a testbed of files that holds all in memory, and one that holds nothing twice."""

    def made(family: str) -> Iterator[Testbed]:
        folder = save_tiny_model(family, tmp_path / "model")
        for place, gradient_bytes in (("memory", None), ("disk", 0)):
            # Neither finds what the other one collected.
            monkeypatch.setenv("PRUNEZERO_CACHE", str(tmp_path / place))
            loaded = load_model(str(folder), device="cpu")
            yield Testbed(loaded, tiny_text(), SETTINGS, gradient_bytes=gradient_bytes)

    yield made


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_compare_on_disk_gives_the_rows_of_compare_in_memory(
    family: str, statistics: str, testbeds: Any
) -> None:
    recipes = [Recipe.load(name) for name in RECIPES]
    if statistics == "sequential":
        recipes = [one for one in recipes if one.compare != "model"]
    rows = [
        without_times(list(compare(testbed, recipes, 0.5, statistics=statistics)))
        for testbed in testbeds(family)
    ]
    assert len(rows[0]) == 1 + len(recipes)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["flap", "mask_fisher", "ziplm"])
def test_recipes_of_units_give_the_same_rows(name: str, testbeds: Any) -> None:
    rows = [
        without_times(list(compare(testbed, [Recipe.load(name)], 0.4)))
        for testbed in testbeds("llama")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("space", ["pipeline", "neurons"])
def test_a_search_on_disk_finds_the_candidates_of_one_in_memory(
    space: str, testbeds: Any, tmp_path: Path
) -> None:
    found = [
        outcome(
            list(
                find(
                    testbed,
                    tiny_space(space),
                    0.5,
                    folder=tmp_path / str(place),
                    budget=20,
                    draws=2,
                )
            )
        )
        for place, testbed in enumerate(testbeds("llama"))
    ]
    assert len(found[0]) > 20
    assert found[0] == found[1]


def test_what_files_hold_is_not_copied(testbeds: Any) -> None:
    whole, sparing = testbeds("gpt2")
    layers = find_linears(sparing.language_model.model)
    numbers = sum(
        layer.weight.nbytes + (layer.bias.nbytes if layer.bias is not None else 0)
        for layer in layers
    )
    assert whole.dense_weights().bytes == numbers
    assert sparing.dense_weights().bytes == 0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_dense_model_comes_back_from_its_files_to_the_last_bit(
    family: str, testbeds: Any
) -> None:
    *_, sparing = testbeds(family)
    model = sparing.language_model.model
    first, *_ = find_linears(model)
    # What a file cannot say: a number of another bit, and a zero of another sign.
    first.weight[0, 0] = 1.25
    first.weight[0, 1] = -0.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = sparing.dense_weights()
    assert dense.bytes == first.weight.nbytes
    with dense:
        for layer in find_linears(model):
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.fill_(7.0)
    after = model.state_dict()
    assert all(
        torch.equal(value.view(torch.int32), after[key].view(torch.int32))
        for key, value in before.items()
    )


def test_experts_that_files_hold_one_by_one_are_copied(tmp_path: Path) -> None:
    model = load_model(str(save_stacked("mixtral", tmp_path / "model")), device="cpu")
    layers = find_linears(model.model)
    stacked = sum(one.weight.nbytes for one in layers if "expert" in one.name)
    assert DenseWeights(layers, model.source).bytes == stacked > 0


def test_files_that_change_while_the_model_is_in_use_are_told(testbeds: Any) -> None:
    *_, sparing = testbeds("llama")
    dense = sparing.dense_weights()
    (file,) = sparing.language_model.source.folder.glob("*.safetensors")
    with pytest.raises(ModelError, match="were changed while the model was in use"), dense:
        file.write_bytes(file.read_bytes())


def test_a_testbed_without_files_of_its_model_keeps_copies(testbeds: Any) -> None:
    *_, sparing = testbeds("llama")
    bare = replace(sparing, language_model=replace(sparing.language_model, source=None))
    layers = find_linears(sparing.language_model.model)
    assert bare.dense_weights().bytes == sum(layer.weight.nbytes for layer in layers)
    assert (cache_dir() / "statistics").exists() is False
