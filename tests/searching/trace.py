"""The trace of one seeded tiny search: its candidates in their order, and what each rung said.

    python -m tests.searching.trace     # writes tests/searching/trace.json anew

`test_trace.py` searches again and compares, so that whatever changes how a search goes shows as a
difference of that file.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from prunezero.searching.session import find
from tests.searching.testbed import tiny_space, tiny_testbed

PATH = Path(__file__).with_suffix(".json")
BUDGET = 18
# Of a candidate's row; what it costs and names of masks are left out.
WORDS = ("slot", "generation", "origin", "parents", "status", "formula", "choices")
NUMBERS = ("layer_error", "kl", "search_perplexity", "validation_perplexity")


def trace() -> list[dict[str, Any]]:
    """Each candidate as it was proposed, then again on every rung that it reached."""
    space = tiny_space(tuned=1, trials=4, criteria=["q_proj", "down_proj"])
    with tempfile.TemporaryDirectory() as folder:
        found = find(tiny_testbed(), space, 0.5, folder=folder, budget=BUDGET, seed=5)
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
        PATH.write_text(text_of(trace()))
