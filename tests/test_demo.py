"""The whole way on a real model: search, export, and the exported pruner on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.load import load_model
from prunezero.models.saving.save import save_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings, Testbed, set_up

pytestmark = pytest.mark.slow

# Two windows of each split.
SIZES = "--sequence-length 128 --calibration-tokens 256 --evaluation-tokens 256 --test-tokens 256"
SEARCH = f"search --model demo --sparsity 0.5 --budget 8 --name small {SIZES}"


def prunezero(arguments: str, folder: Path) -> str:
    """What the command prints; run as a user runs it."""
    finished = subprocess.run(
        [sys.executable, "-m", "prunezero", *arguments.split()],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small search of the demo model has finished."""
    folder = tmp_path_factory.mktemp("demo")
    printed = prunezero(f"{SEARCH} --json out.json", folder)
    assert "210 prunable layers" in printed
    return folder


def test_a_search_of_the_demo_model_ends_in_a_table_with_test_perplexities(searched: Path) -> None:
    rows = {row["recipe"]: row for row in json.loads((searched / "out.json").read_text())["rows"]}
    published = ["magnitude", "wanda", "ria", "gblm", "pruner_zero", "fisher"]
    on_same_terms = [name for name in rows if name.endswith(" +")]
    assert set(on_same_terms) <= {f"{name} +" for name in published}
    assert list(rows) == ["dense", *published, *on_same_terms, "small"]
    for row in rows.values():
        assert 5 < row["test_perplexity"] < 1e6
    assert rows["dense"]["test_perplexity"] < rows["wanda"]["test_perplexity"]
    assert rows["wanda"]["test_perplexity"] < rows["magnitude"]["test_perplexity"]
    assert rows["small"]["sparsity_reached"] == 0.5
    # The winner was chosen on validation text among candidates that Wanda was one of.
    assert rows["small"]["validation_perplexity"] < 1.1 * rows["wanda"]["validation_perplexity"]


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    """The demo model on the sizes of the search."""
    settings = Settings(sequence_length=128, calibration_tokens=256)
    return set_up("demo", "demo", settings, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def dense(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo model was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "dense"
    save_model(testbed.language_model, folder)
    return folder


def test_the_demo_model_loads_saves_and_loads_again(testbed: Testbed, dense: Path) -> None:
    assert len(find_linears(testbed.language_model.model)) == 210
    again = load_model(str(dense), dtype="float32", device="cpu")
    assert again.fingerprint == testbed.language_model.fingerprint


def test_the_exported_pruner_alone_makes_the_masks_of_the_engine(
    searched: Path, testbed: Testbed, dense: Path
) -> None:
    recipe = Recipe.load(searched / "runs" / "small" / "recipe.yaml")
    batches = testbed.windows("calibration")
    torch.save(batches, searched / "batches.pt")
    program = textwrap.dedent(
        """
        import importlib.abc, sys, torch, transformers

        class NoPrunezero(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "prunezero":
                    raise ImportError(name)

        sys.meta_path.insert(0, NoPrunezero())
        sys.path.insert(0, "runs/small")
        import pruner

        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        batches = torch.load("batches.pt")
        report = pruner.prune_(model.eval(), [ids[None] for ids in batches], sparsity=0.5)
        masks = {name: value == 0 for name, value in model.state_dict().items()}
        torch.save(masks, "masks.pt")
        print(report)
        """
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(dense)],
        cwd=searched,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert finished.returncode == 0, finished.stderr
    layers = find_linears(testbed.language_model.model)
    statistics = testbed.statistics(layers, dense_sums([recipe]))
    # The last test that needs it dense.
    prune(testbed.language_model, recipe, 0.5, statistics=statistics)
    theirs = torch.load(searched / "masks.pt")
    for layer in layers:
        assert torch.equal(layer.weight == 0, theirs[f"{layer.name}.weight"]), layer.name


def test_the_same_search_resumed_ends_at_once_with_the_same_result(searched: Path) -> None:
    before = json.loads((searched / "out.json").read_text())
    prunezero(f"{SEARCH} --json again.json --resume", searched)
    after = json.loads((searched / "again.json").read_text())
    keys = ("recipe", "formula", "validation_perplexity", "test_perplexity")
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert {key: old[key] for key in keys} == {key: new[key] for key in keys}
