"""A plan of memory, from shapes alone, is what a fresh process is then measured to take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError, RecipeError, SearchError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.outline import outlined_model
from prunezero.models.observing.block_trace import trace_block
from prunezero.pruning.memory_plan import compare_plan, passes_within, streamed_bytes
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import load_recipe
from prunezero.pruning.streamed import prune_streamed
from prunezero.pruning.testbed import Settings
from prunezero.searching.evaluation.memory import search_plan
from tests.searching.testbed import config_of, make_task, tiny_space, tiny_testbed
from tests.tiny_models import LAYOUTS, save_tiny_model, tiny_model

SETTINGS = Settings(64, 256, 256, 256)
# By so much a plan may lie above what is measured: kernels need less than the most for scores.
TOLERANCE = 1.5
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 512, "intermediate_size": 1376, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 512, "n_layer": 3},
    "opt": {"hidden_size": 512, "ffn_dim": 1536, "word_embed_proj_dim": 512},
}

PROGRAM = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
from prunezero.models.loading.load import load_model
from prunezero.models.streaming.memory import PeakMemory
from prunezero.pruning.compare import compare
from prunezero.pruning.memory_plan import compare_plan
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Testbed
from tests.pruning.test_memory_plan import SETTINGS
from tests.searching.testbed import tiny_text

torch.set_num_threads(1)
small, large, cache = map(Path, sys.argv[1:])
recipes = [Recipe.load(name) for name in ("gblm", "sparsegpt")]

def taken(folder, way):
    os.environ["PRUNEZERO_CACHE"] = str(cache / way / folder.name)
    peak = PeakMemory(torch.device("cpu"))
    model = load_model(str(folder), device="cpu")
    testbed = Testbed(model, tiny_text(), SETTINGS)
    plan = compare_plan(model, recipes, SETTINGS, is_sparing=way == "disk")
    if way == "disk":
        testbed = replace(testbed, gradient_bytes=plan.gradient_bytes)
    for _ in compare(testbed, recipes, 0.5):
        pass
    return peak.growth, plan.total

# Libraries are loaded, and their own memory is taken, before the measurement.
taken(small, "disk")
# What takes less comes first: the highest use is that of the process so far.
for way in ("disk", "memory"):
    print(*taken(large, way))
"""


def measured(family: str, tmp_path: Path) -> list[tuple[int, int]]:
    """Bytes that were measured and planned, with all that can be on disk, and all in memory."""
    small = save_tiny_model(family, tmp_path / "small")
    changes = {"num_hidden_layers": 3} if family != "gpt2" else {}
    large = save_tiny_model(family, tmp_path / "large", **SIZES[family], **changes)
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, large, tmp_path / "caches"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    found = [tuple(map(int, line.split())) for line in printed.splitlines()]
    return [(taken, planned) for taken, planned in found]


@pytest.mark.parametrize("family", SIZES)
def test_what_is_measured_is_what_was_planned(family: str, tmp_path: Path) -> None:
    (on_disk, planned_on_disk), (in_memory, planned) = measured(family, tmp_path)
    assert on_disk < in_memory
    assert on_disk <= planned_on_disk <= TOLERANCE * on_disk
    assert in_memory <= planned <= TOLERANCE * in_memory


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_plan_needs_the_configuration_alone(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    whole = tiny_model(family)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    outline = outlined_model(str(folder / "config.json"))
    assert [one.name for one in find_linears(outline.model)] == [
        one.name for one in find_linears(whole.model)
    ]
    recipes = [Recipe.load("sparsegpt"), Recipe.load("gblm")]
    for is_sparing in (False, True):
        planned, known = (
            compare_plan(one, recipes, SETTINGS, is_sparing=is_sparing) for one in (outline, whole)
        )
        assert planned == known
    stored = sum(one.untyped_storage().nbytes() for one in outline.model.parameters())
    assert stored < 1000


def test_what_a_block_remembers_is_traced_and_who_reads_the_same() -> None:
    model = tiny_model("llama")
    short, long = (trace_block(model, length) for length in (8, 16))
    assert [[name.rsplit(".", 1)[-1] for name in names] for names in short.readers] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    # Inputs of layers, and what its MLP computes, at least; masks grow with pairs of tokens.
    assert short.saved_bytes >= 8 * 4 * (32 * 3 + 64 * 4)
    assert 2 * short.saved_bytes <= long.saved_bytes <= 4 * short.saved_bytes
    assert not any(one.requires_grad for one in model.model.parameters())


def test_a_limit_is_used_for_gradients_of_several_blocks_and_refused_below_the_least() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    recipes = [Recipe.load("gblm")]
    least = compare_plan(model, recipes, SETTINGS, is_sparing=True)
    plenty = compare_plan(model, recipes, SETTINGS, limit=2**40)
    assert (least.passes, plenty.passes) == (6, 1)
    assert plenty.gradient_bytes == 4 * sum(one.weight.numel() for one in find_linears(model.model))
    with pytest.raises(ModelError, match=r"this takes at least .* MiB will do, or use fewer"):
        compare_plan(model, recipes, SETTINGS, limit=least.total - 1)
    within = compare_plan(model, recipes, SETTINGS, limit=least.total)
    assert within.total <= least.total


@pytest.mark.parametrize(
    ("blocks", "room", "passes"),
    [([], 0, 0), ([5, 5, 5], 5, 3), ([5, 5, 5], 10, 2), ([5, 5, 5], 14, 2), ([5, 5, 5], 15, 1)],
)
def test_passes_are_counted_as_blocks_fit(blocks: list[int], room: int, passes: int) -> None:
    assert passes_within(blocks, room) == passes


def test_the_plan_of_pruning_block_by_block_is_the_estimate_of_the_work(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    recipe = Recipe.load("wanda")
    ids = torch.zeros((4, 64), dtype=torch.long)
    done = prune_streamed(folder, recipe, 0.5, tmp_path / "out", windows=ids, device="cpu")
    outline = outlined_model(str(folder))
    assert streamed_bytes(outline, recipe, SETTINGS) == done.need.total
    with pytest.raises(RecipeError, match="its formula takes gradients"):
        streamed_bytes(outline, Recipe.load("gblm"), SETTINGS)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("two_ssp", "has several stages"),
        ("ria_permuted", "permute heuristic keeps sums in another order|permute"),
        ("shortgpt", "unit layer is seen by a walk of its own"),
        ("slice_gpt", "unit direction is seen by a walk of its own"),
        ("tyr", "allocate evolve looks at the model on trial"),
    ],
)
def test_what_is_not_planned_is_refused_by_name(name: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        compare_plan(tiny_model(), [load_recipe(name)], SETTINGS, is_sparing=True)


def test_searches_that_are_not_planned_are_refused() -> None:
    testbed = tiny_testbed()
    task: Any = make_task(tiny_space("neurons"), 0.5)
    with pytest.raises(SearchError, match="is of unit: neuron"):
        search_plan(testbed.language_model, task)
    others = [tiny_testbed(), tiny_testbed("gpt2")]
    task = make_task(tiny_space(), 0.5, testbeds=others)
    assert config_of(tiny_space(), 0.5, testbeds=others).also_model
    with pytest.raises(SearchError, match="several models is not planned"):
        search_plan(testbed.language_model, task)
