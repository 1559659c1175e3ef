"""The benchmarks of a GPU machine run from end to end at tiny sizes, where there is no GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.models.anatomy.linears import find_linears

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SIZES = "--device cpu --blocks 1 --width 64 --length 16 --windows 2 --formulas 3"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("large")


def test_every_step_is_a_line_and_the_model_is_dense_between_recipes(
    large: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zeros = []
    prune = large.prune

    def watched(model: Any, *given: Any, **named: Any) -> Any:
        weights = [layer.weight for layer in find_linears(model.model)]
        before = [int((weight == 0).sum()) for weight in weights]
        outcome = prune(model, *given, **named)
        after = sum(int((weight == 0).sum()) for weight in weights)
        zeros.append((sum(before), after / sum(weight.numel() for weight in weights)))
        return outcome

    monkeypatch.setattr(large, "prune", watched)
    words = f"large.py {SIZES} --recipes wanda sparsegpt --json {tmp_path / 'lines.jsonl'}"
    monkeypatch.setattr(sys, "argv", words.split())
    torch.manual_seed(0)
    large.main()
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    steps = [(line["step"], line.get("recipe")) for line in lines]
    assert steps[0] == ("build", None) and ("screen", None) in steps
    assert steps[-4:] == [
        (step, recipe) for recipe in ("wanda", "sparsegpt") for step in ("calibrate", "prune")
    ]
    assert not any("fault" in line for line in lines)
    assert all(line["seconds"] > 0 and line["peak_mib"] > 0 for line in lines)
    assert [count for count, _ in zeros] == [0, 0]
    assert [share for _, share in zeros] == pytest.approx([0.5, 0.5], abs=0.01)


def test_results_are_not_written_into_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    words = ["bash", str(FOLDER / "gpu.sh"), "--small", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and "where OUT is an empty folder" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
