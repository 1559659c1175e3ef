"""A pruned model of every family reaches the disk, and comes back in plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunezero.errors import OutputError
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.compare import Stand
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Bench
from prunezero.report.export.saved_model import save_pruned
from tests.searching.bench import tiny_bench
from tests.tiny_models import FAMILIES, tiny_batches

WANDA = Recipe.load("wanda")


def pruned(bench: Bench) -> list[dict[str, object]]:
    """Prune the model on the bench by Wanda, and keep it so."""
    layers = find_linears(bench.language_model.model)
    stand = Stand(bench, bench.statistics(layers, dense_sums([WANDA])))
    return [stand.dense_row(("test",)), stand.row(WANDA, 0.5, ("test",), keep=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_prunes_saves_and_reloads_with_equal_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bench = tiny_bench(family)
    rows = pruned(bench)
    layers = find_linears(bench.language_model.model)
    saved = save_pruned(bench, WANDA, rows, layers, tmp_path / "pruned")
    assert (saved.sparsity, saved.negative_zeros) == (0.5, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    ids = tiny_batches(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, bench.language_model.model(ids).logits)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    is_tied = bench.language_model.model.config.tie_word_embeddings
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == is_tied
    dense = tiny_bench(family).language_model.model
    assert torch.equal(head.weight, dense.get_output_embeddings().weight)


def test_a_second_save_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    bench = tiny_bench()
    rows = pruned(bench)
    layers = find_linears(bench.language_model.model)
    save_pruned(bench, WANDA, rows, layers, tmp_path / "pruned")
    with pytest.raises(OutputError, match="not empty"):
        save_pruned(bench, WANDA, rows, layers, tmp_path / "pruned")
