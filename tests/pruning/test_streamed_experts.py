"""A mixture of experts pruned from files to files has the bytes of one that is pruned in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from prunezero.errors import PruneZeroWarning
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.observing.calibration import calibrate
from prunezero.models.saving.save import save_model
from prunezero.models.streaming.streamed_model import StreamedModel
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.streamed import prune_streamed
from tests.tiny_models import tiny_batches, tiny_tokenizer
from tests.tiny_moe import MOE_FAMILIES, stacked_network

WINDOWS = tiny_batches(24, 32)


def save_sharded(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    stacked_network(family).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(**choices: object) -> Recipe:
    return Recipe.model_validate({"name": "mine", "criterion": "abs(W) * X", **choices})


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


RECIPES = {
    "sequential": recipe(statistics="sequential"),
    "mended": recipe(statistics="sequential", compare="8 columns", update="obs"),
    "dense": recipe(statistics="dense", pattern="2:4"),
    "some": recipe(statistics="dense", targets=["re:experts\\.[13]"]),
}


def assert_streamed_as_in_memory(folder: Path, dtype: str, chosen: Recipe, work: Path) -> None:
    streamed = prune_streamed(
        folder, chosen, 0.5, work / "streamed", windows=WINDOWS, dtype=dtype, device="cpu"
    )
    whole = load_model(str(folder), dtype=dtype, device="cpu")
    layers = find_linears(whole.model, targets=chosen.targets)
    known = calibrate(whole, WINDOWS, layers, dense_sums([chosen]))
    expected = prune(whole, chosen, 0.5, statistics=known, windows=WINDOWS)
    save_model(whole, work / "in memory", files={"recipe.yaml": chosen.to_yaml()})
    assert digests(work / "streamed") == digests(work / "in memory")
    assert streamed.outcome.zeros == expected.zeros > 0
    assert streamed.outcome.total == expected.total


@pytest.mark.parametrize("kind", RECIPES)
def test_every_kind_of_recipe_gives_the_bytes_that_pruning_in_memory_gives(
    kind: str, tmp_path: Path
) -> None:
    source = save_sharded("mixtral", tmp_path / "dense")
    assert_streamed_as_in_memory(source, "float32", RECIPES[kind], tmp_path)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_gives_the_bytes_that_pruning_in_memory_gives(
    family: str, tmp_path: Path
) -> None:
    source = save_sharded(family, tmp_path / "dense", torch.bfloat16)
    assert_streamed_as_in_memory(source, "float32", RECIPES["mended"], tmp_path)


def test_a_block_has_its_experts_only_while_it_is_needed(tmp_path: Path) -> None:
    source = save_sharded("mixtral", tmp_path / "dense")
    whole = load_model(str(source), device="cpu").model.model.layers[1].mlp.experts
    streamed = StreamedModel(source, device="cpu")
    experts = streamed.language_model.model.model.layers[1].mlp.experts
    assert experts.down_proj.is_meta
    with streamed.block(1):
        assert torch.equal(experts.gate_up_proj, whole.gate_up_proj)
        assert torch.equal(experts.down_proj, whole.down_proj)
    assert experts.down_proj.is_meta


def test_scarce_experts_are_told_of_there_as_well(tmp_path: Path) -> None:
    source = save_sharded("mixtral", tmp_path / "dense")
    with pytest.warns(PruneZeroWarning, match="16 matrices of experts saw fewer") as told:
        prune_streamed(
            source,
            RECIPES["sequential"],
            0.5,
            tmp_path / "streamed",
            windows=WINDOWS[:1],
            device="cpu",
        )
    assert len(told) == 1
