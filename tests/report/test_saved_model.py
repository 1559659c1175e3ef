"""A pruned model of every family reaches the disk, and comes back in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import RecipeRunner
from prunezero.pruning.costs import model_costs
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Testbed
from prunezero.report.export.saved_model import save_pruned
from tests.searching.testbed import tiny_testbed
from tests.tiny_models import FAMILIES, tiny_batches

WANDA = Recipe.load("wanda")


def pruned(testbed: Testbed) -> list[dict[str, object]]:
    """Prune the model on the testbed by Wanda, and keep it so."""
    layers = find_linears(testbed.language_model.model)
    runner = RecipeRunner(testbed, testbed.statistics(layers, dense_sums([WANDA])))
    return [runner.dense_row(("test",)), runner.row(WANDA, 0.5, ("test",), keep=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_prunes_saves_and_reloads_with_equal_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    testbed = tiny_testbed(family)
    rows = pruned(testbed)
    layers = find_linears(testbed.language_model.model)
    saved = save_pruned(testbed, WANDA, rows, layers, tmp_path / "pruned")
    assert (saved.sparsity, saved.negative_zeros) == (0.5, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    ids = tiny_batches(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, testbed.language_model.model(ids).logits)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    is_tied = testbed.language_model.model.config.tie_word_embeddings
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == is_tied
    dense = tiny_testbed(family).language_model.model
    assert torch.equal(head.weight, dense.get_output_embeddings().weight)


def test_the_report_says_what_the_pruned_model_takes(tmp_path: Path) -> None:
    testbed = tiny_testbed()
    dense = model_costs(testbed.language_model, tiny_batches(1, 16))
    rows = pruned(testbed)
    save_pruned(
        testbed, WANDA, rows, find_linears(testbed.language_model.model), tmp_path / "pruned"
    )
    told = json.loads((tmp_path / "pruned" / "report.json").read_text())["costs"]
    # Zeros make nothing smaller.
    assert told["parameters"] == dense.parameters and told["kv_bytes"] == dense.kv_bytes
    assert told["context"] == testbed.settings.sequence_length


def test_a_second_save_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    testbed = tiny_testbed()
    rows = pruned(testbed)
    layers = find_linears(testbed.language_model.model)
    save_pruned(testbed, WANDA, rows, layers, tmp_path / "pruned")
    with pytest.raises(OutputError, match="not empty"):
        save_pruned(testbed, WANDA, rows, layers, tmp_path / "pruned")
