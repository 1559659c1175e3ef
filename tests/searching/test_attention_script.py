"""benchmarks/attention_search.py leaves a table, a picture and recipes; its log is gone on from."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning.recipes.documents import write_document
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention_search")


def argv_of(folder: Path, space: Path, output: Path) -> list[str]:
    numbers = {"windows": 2, "prompt": 96, "following": 16, "repeated": 12, "skipped": 4}
    numbers |= {"candidates": 13, "threads": 1, "layers": 1}
    options = [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    places = {"model": folder, "text": folder / "text.txt", "space": space, "output": output}
    options += [part for key, value in places.items() for part in (f"--{key}", str(value))]
    return ["attention_search.py", "--kept", "0.5", *options]


def test_it_leaves_a_front_and_goes_on_from_its_log(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=256)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=80)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    fields = {"generation": 4, "measured": 3}
    small = SearchSpace.load("attention").model_copy(update=fields)
    space = tmp_path / "small.yaml"
    write_document(small.model_dump(mode="json"), space)
    monkeypatch.setattr("sys.argv", argv_of(folder, space, tmp_path / "out"))
    script.main()
    made = tmp_path / "out" / "attention-0.5-0"
    told = (made / "front.md").read_text()
    rows = json.loads((made / "front.json").read_text())
    assert "13 measured on 2 windows" in told
    assert {"snapkv", "keydiff"} <= {row["recipe"] for row in rows}
    found = {row["recipe"] for row in rows if row["is_found"]}
    assert found == {path.stem for path in (made / "front").glob("*.yaml")}
    for path in (made / "front").glob("*.yaml"):
        assert Recipe.load(path).unit.word == "kv_column"
    assert (made / "front.png").read_bytes().startswith(b"\x89PNG")
    logs = {path: path.read_bytes() for path in made.glob("*.jsonl")}
    assert len(logs) == 2
    script.main()
    assert logs == {path: path.read_bytes() for path in made.glob("*.jsonl")}
    assert (made / "front.md").read_text() == told
