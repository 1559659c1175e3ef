"""An exported page prunes inside stacks of experts what the engine prunes there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import PruneZeroWarning
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.report.export.page import pruner_page
from tests.tiny_models import tiny_batches
from tests.tiny_moe import MOE_FAMILIES, OTHER_LAYOUTS, save_stacked, stacked_model, stacked_network

WINDOWS = tiny_batches(24, 32)


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "abs(W) * X", "statistics": "dense", **choices}
    return Recipe.model_validate(fields)


RECIPES = {
    "inputs": recipe(),
    "a pattern": recipe(criterion="abs(W) * X / U", pattern="2:4"),
    "all compete": recipe(criterion="abs(W) * X_rms * Y + X_mean", compare="model"),
    "gradients": recipe(criterion="abs(W) * (G + X)"),
    "gradients of outputs": recipe(criterion="abs(W) * D * X_rms"),
    "some": recipe(targets=["re:experts.[13]"], ignore=["experts.1.down_proj"]),
    "a formula of their own": recipe(criteria={"re:experts": "abs(W) * X**2"}),
}


def page(chosen: Recipe) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(pruner_page(chosen), "<page>", "exec", dont_inherit=True), names)
    return names


def pruned_by_page(chosen: Recipe, family: str, windows: Tensor) -> dict[str, Tensor]:
    network = stacked_network(family)
    sparsity = None if chosen.pattern != "free" else 0.5
    page(chosen)["prune_"](network, [ids[None] for ids in windows], sparsity)
    for module in network.modules():
        assert "forward" not in vars(module)
    return dict(network.state_dict())


def pruned_by_engine(chosen: Recipe, family: str, windows: Tensor) -> dict[str, Tensor]:
    model = stacked_model(family)
    layers = find_linears(model.model, targets=chosen.targets, ignore=chosen.ignore)
    statistics = calibrate(model, windows, layers, dense_sums([chosen]))
    prune(model, chosen, None if chosen.pattern != "free" else 0.5, statistics=statistics)
    return dict(model.model.state_dict())


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_prunes_the_weights_that_the_engine_prunes(name: str) -> None:
    found = pruned_by_page(RECIPES[name], "mixtral", WINDOWS)
    check_equal(found, pruned_by_engine(RECIPES[name], "mixtral", WINDOWS))
    before = stacked_network("mixtral").state_dict()
    stack = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(found[stack], before[stack])


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_it_does_so_in_every_family(family: str) -> None:
    chosen = RECIPES["gradients"]
    found = pruned_by_page(chosen, family, WINDOWS)
    check_equal(found, pruned_by_engine(chosen, family, WINDOWS))


@pytest.mark.parametrize("name", ["inputs", "a pattern", "gradients", "gradients of outputs"])
def test_experts_with_few_tokens_are_filled_up_alike(name: str) -> None:
    with pytest.warns(UserWarning, match="of experts saw few tokens, model.layers.0"):
        found = pruned_by_page(RECIPES[name], "mixtral", WINDOWS[:2])
    with pytest.warns(PruneZeroWarning, match="saw fewer than 2 calibration tokens"):
        expected = pruned_by_engine(RECIPES[name], "mixtral", WINDOWS[:2])
    check_equal(found, expected)


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_other_layouts_are_refused_by_name(family: str) -> None:
    names = page(RECIPES["inputs"])
    with pytest.raises(names["RefusalError"], match="this layout is not supported"):
        names["prune_"](stacked_network(family), [WINDOWS[:1]], 0.5)


def test_a_page_for_units_refuses_a_mixture() -> None:
    names = page(Recipe.load("minitron_heads"))
    with pytest.raises(ValueError, match="beside stacks of experts"):
        names["prune_"](stacked_network("mixtral"), [WINDOWS[:1]], 0.5)


def test_the_program_saves_a_mixture_that_reads_again(tmp_path: Path) -> None:
    source = save_stacked("mixtral", tmp_path / "dense", dtype=torch.bfloat16)
    (tmp_path / "page.py").write_text(pruner_page(RECIPES["inputs"]))
    (tmp_path / "text.txt").write_text("abcdefgh, ijkl. " * 400)
    options = ["--sparsity", "0.5", "--output", "pruned", "--length", "32", "--sequences", "24"]
    command = [sys.executable, "page.py", str(source), "text.txt", *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    dense, again = (load_model(str(tmp_path / name)).model for name in ("dense", "pruned"))
    for before, layer in zip(find_linears(dense), find_linears(again), strict=True):
        gone = layer.weight == 0
        assert (gone.sum(1) == layer.weight.shape[1] // 2).all()
        assert torch.equal(layer.weight[~gone], before.weight[~gone])
