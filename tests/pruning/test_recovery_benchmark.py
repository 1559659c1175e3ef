"""What benchmarks/recovery.py measures on text of two sources is told for each of them."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = "--sequence-length 16 --calibration-tokens 256 --evaluation-tokens 64 --test-tokens 64"
TRAINING = "--steps 10 --batch 2 --rank 2 --threads 1 --draws 1"


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, whose results go to a folder of the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("recovery")
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    return found


def test_lora_shear_on_two_sources_has_a_row_with_the_tokens_of_each(
    recovery: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng, names = random.Random(0), []
    for letters in ("abcdefgh ,.", "stuvwxyz ,."):
        names.append(tmp_path / f"{letters[0]}.txt")
        paragraphs = ["".join(rng.choices(letters, k=200)) for _ in range(60)]
        names[-1].write_text("\n\n".join(paragraphs))
    model, text = save_tiny_model("llama", tmp_path / "model"), ",".join(map(str, names))
    asked = f"recovery.py --model {model} --text {text} --recipes lora_shear --shares 0.3"
    monkeypatch.setattr("sys.argv", f"{asked} {SIZES} {TRAINING}".split())
    recovery.main()
    dense, row = map(json.loads, (tmp_path / "recovery.jsonl").read_text().splitlines())
    assert "trained_tokens_by_source" not in dense
    # The last source comes alone in the last fifth of ten steps of two windows.
    assert row["trained_tokens_by_source"] == {str(names[0]): 16 * 16, str(names[1]): 4 * 16}
    assert row["trained_tokens"] == 20 * 16
    assert row["source_shares"][str(names[1])] == [[0, 0.0], [8, 1.0]]
    assert set(row["validation_perplexity_by_source"]) == set(map(str, names))
    assert "| 320 (a.txt 256, s.txt 64) |" in (tmp_path / "recovery.md").read_text()


def test_only_recipes_that_tell_sources_apart_keep_what_they_say_of_them(recovery: Any) -> None:
    known = {name: recovery.load_recipe(name) for name in ("lora_shear", "lora_prune", "hesso")}
    assert recovery.sampling_of(known["lora_shear"])["second_stage"] == 1
    assert recovery.sampling_of(known["lora_prune"]) == recovery.sampling_of(known["hesso"]) == {}
