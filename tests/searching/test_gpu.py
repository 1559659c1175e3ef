"""A whole search on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prunezero.pruning.testbed import Bench, set_up
from prunezero.searching.experiment.provenance import conditions
from prunezero.searching.session import find, make_task
from tests.searching.bench import SETTINGS, tiny_bench, tiny_space
from tests.tiny_models import save_tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_a_search_on_a_gpu_screens_and_measures(tmp_path: Path, pattern: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {number} of a text for pruning." for number in range(400)))
    model = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=64)
    bench = set_up(str(model), text, SETTINGS, device="cuda")
    found = list(find(bench, tiny_space(), 0.5, folder=tmp_path / "run", pattern=pattern, budget=8))
    assert any(candidate.search_perplexity is not None for candidate in found)
    assert all(candidate.status != "invalid" for candidate in found[:4])


def test_on_a_gpu_answers_depend_on_triton() -> None:
    bench = tiny_bench()
    task = make_task(tiny_space(), 0.5)
    assert "triton" not in conditions(bench, task)
    there = replace(bench.language_model, device=torch.device("cuda"))
    assert conditions(Bench(there, bench.text, bench.settings), task)["triton"]
