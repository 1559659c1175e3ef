"""What is written by hand, or to be read again, is read as it looks, and in bounded time."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.pruning.recipes.documents import read_document, validated, write_document
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.spaces.space import SearchSpace

SIGNS = [*"ae1:-~ \n\t'\"#&*!%@`|>[]{},=?._0x", "\x85", "\u2028", "\ufeff", "\x7f", "\xa0", "é"]


def test_every_text_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    rng = random.Random(0)
    shared = ["twice"]
    for _ in range(300):
        text = "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 6)))
        data: dict[str, Any] = {"key": text, f"k{text}": [{text: 1.5}, shared, shared]}
        write_document(data, tmp_path / "d.yaml")
        assert read_document(tmp_path / "d.yaml") == data


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 60_000,
        "a: " + "{b: " * 9_000,
        "a: [" + "b," * 30_000 + "]",
        "a:\n" + "- b\n" * 9_000,
    ],
)
def test_a_deep_or_endless_document_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(RecipeError, match="may hold 4096 entries, nested at most 16 deep"):
        read_document(path)
    # A long run of tests collects its garbage meanwhile.
    assert time.process_time() - begin < 2.0


@pytest.mark.parametrize(
    ("kind", "fields", "fault"),
    [
        (
            Recipe,
            {"update": {"admm": {"iterations": 10**9}}},
            "iterations: .* than or equal to 10000",
        ),
        (Recipe, {"update": {"swaps": {"swaps": 10**40}}}, "swaps: .* than or equal to 10000"),
        (Recipe, {"schedule": {"iterative": {"steps": 10**12}}}, "steps: .* than or equal to 1000"),
        (Recipe, {"allocate": {"sensitivity": {"samples": 10**9}}}, "samples: .* or equal to 1000"),
        (Recipe, {"recover": {"tune": {"batch": 10**9}}}, "batch: .* than or equal to 4096"),
        (SearchSpace, {"fresh_depth": 10_000}, "fresh_depth: .* than or equal to 8"),
        (SearchSpace, {"max_depth": 10**9}, "max_depth: .* than or equal to 16"),
        (SearchSpace, {"max_complexity": 10**6}, "max_complexity: .* than or equal to 96"),
        (SearchSpace, {"generation": 10**12}, "generation: .* than or equal to 100000"),
        (SearchSpace, {"terminals": ["abs(W)"] * 9_000}, "9000 entries are too many"),
        (SearchSpace, {"choices": {"damping": [0.1] * 9_000}}, "9000 entries are too many"),
    ],
)
def test_every_count_has_an_upper_end(kind: Any, fields: dict[str, Any], fault: str) -> None:
    least = (
        {"criterion": "abs(W)"} if kind is Recipe else {"terminals": ["W"], "operators": ["add"]}
    )
    begin = time.process_time()
    with pytest.raises(RecipeError, match=fault):
        validated(kind, {"name": "a", **least, **fields}, "d.yaml")
    assert time.process_time() - begin < 0.5
