"""A dense model is held against the published one where the two can be compared, and only there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning.recipes.published import PUBLISHED, dense_warning
from prunezero.pruning.recipes.recipe import published_recipes
from prunezero.pruning.recipes.staged import load_recipe

MODEL = "meta-llama/Llama-2-7b-hf"
TEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


def warning(model: str = MODEL, text: str = TEXT, **changes: Any) -> str | None:
    """The warning of a dense model that is as published, but for these changes."""
    measured = {"sequence_length": 2048, "tokens": 166 * 2048, "perplexity": 5.47, **changes}
    return dense_warning(model, text, **measured)


@pytest.mark.parametrize(
    ("model", "length", "perplexity"),
    [
        (MODEL, 2048, 5.47),
        (MODEL, 4096, 5.12),
        ("NousResearch/Llama-2-7b-hf", 4096, 5.12),
        ("TheBloke/Llama-2-7B-fp16", 2048, 5.47),
        ("huggyllama/llama-7b", 2048, 5.68),
        ("baffo32/decapoda-research-llama-7B-hf", 2048, 5.68),
        ("meta-llama/Meta-Llama-3-8B", 8192, 5.54),
        ("facebook/opt-125m", 2048, 27.66),
    ],
)
def test_a_model_that_measures_as_published_is_not_remarked_on_and_another_is(
    model: str, length: int, perplexity: float
) -> None:
    for factor, is_off in [(1, False), (1.019, False), (0.981, False), (1.021, True), (0.9, True)]:
        found = warning(model, sequence_length=length, perplexity=perplexity * factor)
        assert (found is not None) == is_off, found
        if found:
            assert f"where {perplexity:.2f} was published" in found
            assert f"windows of {length:,} tokens" in found and "\n" not in found


def test_the_warning_names_both_numbers_and_what_to_check() -> None:
    found = warning(perplexity=6.02) or ""
    assert found.startswith(
        "dense perplexity 6.02 where 5.47 was published (llama-2-7b, WikiText-2, windows of 2,048 "
        "tokens): check the checkpoint"
    )
    assert "dense perplexity nan where 5.47" in (warning(perplexity=math.nan) or "")


def test_the_warning_says_where_our_windows_begin_otherwise() -> None:
    assert "begins" not in (warning(perplexity=6.02) or "")
    found = warning(perplexity=5.3, begin="<s>") or ""
    assert found.endswith("each window here begins with <s>, there the first alone did")


def test_windows_of_a_length_that_nobody_published_are_said_not_to_compare() -> None:
    found = warning(sequence_length=256, perplexity=5.47) or ""
    assert "windows of 2,048 and 4,096 tokens" in found and "those of 256 cannot" in found
    assert "windows of 2,048 tokens" in (warning("huggyllama/llama-13b", sequence_length=512) or "")


def test_a_piece_of_the_test_split_is_said_not_to_compare_whatever_its_perplexity() -> None:
    for perplexity in (5.47, 9.0):
        found = warning(tokens=8192, perplexity=perplexity) or ""
        assert "the whole test split; 8,192 tokens of it cannot be compared" in found


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("demo", TEXT),
        ("HuggingFaceTB/SmolLM2-135M", TEXT),
        ("meta-llama/Llama-2-7b-chat-hf", TEXT),
        ("meta-llama/Meta-Llama-3-8B-Instruct", TEXT),
        ("TheBloke/Llama-2-7B-GPTQ", TEXT),
        ("./Llama-2-7b-hf", TEXT),
        ("/models/Llama-2-7b-hf", TEXT),
        ("~/Llama-2-7b-hf", TEXT),
        ("models/meta-llama/Llama-2-7b-hf", TEXT),
        ("pruned/llama-7b", TEXT),
        (MODEL, "demo"),
        (MODEL, "Salesforce/wikitext:wikitext-2-v1"),
        (MODEL, "Salesforce/wikitext:wikitext-103-raw-v1"),
        (MODEL, "texts/wikitext:wikitext-2-raw-v1"),
        (MODEL, "./wikitext:wikitext-2-raw-v1"),
    ],
)
def test_nothing_is_said_of_other_models_of_other_text_or_of_folders_and_files(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Named like models and texts of the hub, and here.
    Path("pruned/llama-7b").mkdir(parents=True)
    Path("texts").mkdir()
    Path("texts/wikitext:wikitext-2-raw-v1").write_text("text")
    assert warning(model, text, perplexity=99.0) is None
    assert warning(model, text, sequence_length=256) is None


def test_a_published_row_of_a_recipe_can_be_held_against_its_dense_model() -> None:
    rows = [row for name in published_recipes() for row in load_recipe(name).published]
    settled = [row for row in rows if "sequence_length" in row]
    assert len(settled) > 10
    for row in settled:
        dense = PUBLISHED[row["model"].lower()]
        # Pruning makes none of them better.
        assert dense[row["sequence_length"]] < row["perplexity"]
