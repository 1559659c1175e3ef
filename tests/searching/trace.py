"""The traces of seeded tiny searches: candidates in their order, and what each rung said.

    python -m tests.searching.trace     # writes tests/searching/trace*.json anew

`test_trace.py` searches again and compares, so that whatever changes how a search goes shows as a
difference of these files.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from prunezero.searching.session import find
from tests.searching.testbed import tiny_space, tiny_testbed

# By space: where its trace is. The first removes single weights, the other whole units.
PATHS = {
    "formulas": Path(__file__).with_suffix(".json"),
    "width": Path(__file__).with_name("trace_width.json"),
}
# The sparsity of each: at 0.5 the KL of some recipes of units differ in last bits alone.
SPARSITIES = {"formulas": 0.5, "width": 0.7}
# What is changed in each space, so that a small search has candidates of every origin.
CHANGES: dict[str, dict[str, Any]] = {
    "formulas": {"tuned": 1, "trials": 4, "criteria": ["q_proj", "down_proj"]},
    "width": {"tuned": 1},
}
BUDGET = 18
# Of a candidate's row; what it costs and names of masks are left out.
WORDS = ("slot", "generation", "origin", "parents", "status", "formula", "choices")
NUMBERS = ("layer_error", "kl", "search_perplexity", "validation_perplexity")


def trace(name: str) -> list[dict[str, Any]]:
    """Each candidate as it was proposed, then again on every rung that it reached."""
    space = tiny_space(name, **CHANGES[name])
    with tempfile.TemporaryDirectory() as folder:
        testbed, sparsity = tiny_testbed(), SPARSITIES[name]
        found = find(testbed, space, sparsity, folder=folder, budget=BUDGET, seed=5)
        return [_step(candidate.row()) for candidate in found]


def _step(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: row[key] for key in NUMBERS if row[key] is not None}
    return {key: row[key] for key in WORDS} | {
        # Six digits: other processors have other last bits.
        key: float(f"{value:.6g}")
        for key, value in numbers.items()
    }


def text_of(steps: list[dict[str, Any]]) -> str:
    """A line for each step, so that a difference is one."""
    return "[\n" + ",\n".join(json.dumps(step) for step in steps) + "\n]\n"


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PRUNEZERO_CACHE"] = cache
        for name, path in PATHS.items():
            path.write_text(text_of(trace(name)))
