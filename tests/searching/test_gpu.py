"""A whole search on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prunezero.pruning.testbed import Testbed, set_up
from prunezero.searching.experiment.provenance import conditions
from prunezero.searching.session import find
from tests.searching.testbed import SETTINGS, make_task, tiny_space, tiny_testbed
from tests.tiny_models import save_tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_a_search_on_a_gpu_screens_and_measures(tmp_path: Path, pattern: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {number} of a text for pruning." for number in range(400)))
    model = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=64)
    testbed = set_up(str(model), text, SETTINGS, device="cuda")
    found = list(
        find(testbed, tiny_space(), 0.5, folder=tmp_path / "run", pattern=pattern, budget=8)
    )
    assert any(candidate.search_perplexity is not None for candidate in found)
    assert all(candidate.status != "invalid" for candidate in found[:4])


def test_on_a_gpu_answers_depend_on_triton() -> None:
    testbed = tiny_testbed()
    task = make_task(tiny_space(), 0.5)
    assert "triton" not in conditions(task.config, [testbed])
    there = replace(testbed.language_model, device=torch.device("cuda"))
    assert conditions(task.config, [Testbed(there, testbed.text, testbed.settings)])["triton"]
