"""Pictures come out whole, whatever rows a search ends with."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import OutputError
from prunezero.report.plots.axes import bulk
from prunezero.report.plots.fronts import pareto_picture
from prunezero.report.plots.labels import LONGEST_LABEL, short
from prunezero.report.plots.plots import (
    pareto,
    pareto_front,
    progress,
    proxy_against_truth,
)
from prunezero.report.plots.quality import SIZE, quality_against_size


def rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "slot": slot,
            "formula": "abs(W)*X" * (1 + slot % 5),
            "complexity": rng.randint(2, 20),
            "signal": rng.choice(["none", "activations", "gradients"]),
            "layer_error": rng.random() + 0.1,
            "search_perplexity": rng.choice([None, math.nan, 20 + 9 * rng.random(), 4e4]),
        }
        for slot in range(count)
    ]


BASELINES: list[dict[str, Any]] = [
    {"name": "wanda", "complexity": 4, "search_perplexity": 24.0},
    {"name": "ria", "complexity": 4, "search_perplexity": 24.0},
    {"name": "magnitude", "complexity": 2, "search_perplexity": 3e3},
    {"name": "dense", "search_perplexity": 17.0},
]


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    return data.startswith(b"\x89PNG") and size == (1000, 650)


@pytest.mark.parametrize(("count", "baselines"), [(0, []), (1, BASELINES), (80, BASELINES)])
def test_pictures_of_any_number_of_candidates(
    count: int, baselines: list[dict[str, Any]], tmp_path: Path
) -> None:
    pareto(rows(count), baselines, tmp_path / "new" / "pareto.png")
    proxy_against_truth(rows(count), tmp_path / "proxy.png")
    progress(rows(count), baselines, tmp_path / "progress.png")
    for path in ("new/pareto.png", "proxy.png", "progress.png"):
        assert is_picture(tmp_path / path)


def test_the_front_keeps_rows_that_no_smaller_formula_beats() -> None:
    found = [
        {"complexity": size, "search_perplexity": value}
        for size, value in [(4, 21.0), (2, 30.0), (4, 22.0), (6, 21.0), (9, 20.0)]
    ]
    front = [(row["complexity"], row["search_perplexity"]) for row in pareto_front(found)]
    assert front == [(2, 30.0), (4, 21.0), (9, 20.0)]


def test_failures_far_off_do_not_set_the_range() -> None:
    assert bulk([20, 21, 22, 23, 24, 5000], []) == (20, 24)
    assert bulk([20, 21, 22, 23, 24, 5000], [60]) == (20, 60)
    assert bulk([20], []) == (20, 24)


def test_long_formulas_are_cut_for_a_label() -> None:
    assert short("abs(W)*X") == "abs(W)*X"
    assert len(short("x" * 99)) == LONGEST_LABEL and short("x" * 99).endswith("…")


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        progress([], [], tmp_path / "file" / "progress.png")


def test_quality_stands_against_size_and_what_is_far_worse_is_named(tmp_path: Path) -> None:
    rows = [
        {"name": "dense", SIZE: 106e6, "test_perplexity": 23.6},
        {"name": "wanda", SIZE: 106e6, "test_perplexity": 40.0},
        {"name": "mask_fisher", SIZE: 85e6, "test_perplexity": 33.0, "unit": "width"},
        {"name": "shortgpt", SIZE: 85e6, "test_perplexity": 60.0, "unit": "layer"},
        {"name": "magnitude_units", SIZE: 85e6, "test_perplexity": 9e5, "unit": "width"},
        {"name": "broken", SIZE: 85e6, "test_perplexity": None, "unit": "width"},
    ]
    for few in (rows, rows[:1], []):
        path = tmp_path / f"{len(few)}.png"
        quality_against_size(few, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_recipes_stand_by_two_objectives_and_those_without_a_number_are_left_out(
    tmp_path: Path,
) -> None:
    rows = [
        {"recipe": "snapkv", "is_found": False, "rank": 0, "text_kl": 0.05, "recall_kl": 1.9},
        {"recipe": "mine-1", "is_found": True, "rank": 0, "text_kl": 0.08, "recall_kl": 1.2},
        {"recipe": "keydiff", "is_found": False, "rank": 1, "text_kl": 0.3, "recall_kl": 2.0},
        {"recipe": "lagkv", "is_found": False, "refused": "it keeps too few"},
    ]
    pictures = []
    for few in (rows, rows[:3], rows[:1], []):
        path = tmp_path / f"{len(few)}.png"
        pareto_picture(
            few, path, across=("text_kl", "KL on text"), upwards=("recall_kl", "KL on recall")
        )
        pictures.append(path.read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1] != pictures[2]
