"""benchmarks/attention.py goes on where it stopped, and its table says what its lines say."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning.recipes.recipe import Recipe
from tests.tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORMS = ("as published", "the same blocks of 16 for all heads")


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("attention")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    return script


def argv_of(folder: Path, *more: str) -> list[str]:
    numbers = {
        "windows": 2,
        "draws": 2,
        "prompt": 96,
        "following": 16,
        "repeated": 12,
        "skipped": 4,
    }
    options = [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    options += ["--calibration-windows", "2", "--threads", "1", "--kept", "0.5,0.1"]
    named = ["--recipes", "keydiff,adakv,quest", *more]
    return [
        "attention.py",
        "--model",
        str(folder),
        "--text",
        str(folder / "text.txt"),
        *named,
        *options,
    ]


def test_it_measures_what_is_missing_and_tells_it(
    attention: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=160)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=80)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    monkeypatch.setattr("sys.argv", argv_of(folder))
    attention.main()
    path = tmp_path / "attention.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    forms = {(row["recipe"], row["form"]) for row in rows}
    wanted = {("keydiff", form) for form in FORMS} | {("adakv", FORMS[0]), ("quest", FORMS[0])}
    assert forms == wanted | {("dense", "")}
    # Two draws of two windows, each read once densely.
    assert len(rows) == 2 * 2 * (1 + 2 * len(wanted))
    refused = [row for row in rows if "refused" in row]
    assert {row["kept"] for row in refused} == {0.1}
    assert {row["recipe"] for row in refused} == {"keydiff", "adakv"}
    assert all("always do" in row["refused"] for row in refused)
    table = (tmp_path / "attention.md").read_text()
    for row in rows:
        assert row["recipe"] == "dense" or f"| `{row['recipe']}` | {row['form']} | 4 |" in table
    found = [row for row in rows if row["recipe"] == "adakv" and row["kept"] == 0.5]
    draws = [[row["text_loss"] for row in found if row["draw"] == draw] for draw in (0, 1)]
    perplexities = [math.exp(sum(losses) / 2) for losses in draws]
    spread = max(perplexities) - min(perplexities)
    assert f"| {sum(perplexities) / 2:.2f} ({spread:.2f}) |" in table
    assert "`keydiff`, as published, was refused: " in table
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    attention.main()
    again = path.read_text().splitlines(keepends=True)
    assert len(again) == len(lines) and again[:-1] == lines[:5] + lines[6:]
    same = {key: value for key, value in json.loads(again[-1]).items() if key != "seconds"}
    assert same.items() <= json.loads(lines[5]).items()


def test_only_recipes_that_can_share_blocks_do(attention: Any) -> None:
    shared = {recipe.name for recipe, form in attention.wanted("") if form == FORMS[1]}
    assert {"snapkv", "keydiff", "h2o_prompt"} <= shared
    assert shared.isdisjoint(
        {"pyramidkv", "h2o", "tova", "adakv", "criticalkv", "duo_heads"}
        | {"quest", "block_topk", "link_oracle"}
    )
    blocks = attention.in_shared_blocks(Recipe.load("snapkv")).unit.options
    assert (blocks.share, blocks.block, blocks.window) == ("layer", 16, 32)
