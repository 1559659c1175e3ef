"""A dense model that predicts worse than token frequencies alone is doubted, and no other is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from prunezero.models.evaluation import frequency_perplexity
from prunezero.pruning.soundness import dense_warnings
from prunezero.pruning.testbed import Testbed
from tests.searching.testbed import tiny_testbed


def test_the_perplexity_of_frequencies_is_that_of_a_hand_made_table() -> None:
    # The first of a window is not predicted. Seen: 5 twice, 6 once; 2 kinds share 2 of 5 parts
    # over 10 tokens, so that 5 has (2 + 0.2) / 5 and 7 has 0.2 / 5.
    seen = torch.tensor([[1, 5], [2, 5], [3, 6]])
    found = frequency_perplexity(torch.tensor([[0, 5, 7]]), seen, 10)
    assert found == pytest.approx(1 / math.sqrt(2.2 / 5 * 0.2 / 5))


def doubts(perplexity: float | None, testbeds: list[Testbed], **changes: Any) -> list[str]:
    row = {"test_perplexity": perplexity, "sequence_length": 16, **changes}
    return list(dense_warnings({**row, "window_losses": {"test": [1.0]}}, testbeds))


@pytest.mark.parametrize("perplexity", [None, math.nan, 15.0, 97.0])
def test_a_model_worse_than_frequencies_is_doubted(perplexity: float | None) -> None:
    (told,) = doubts(perplexity, [tiny_testbed()])
    number = "not finite" if perplexity is None else f"{perplexity:.2f}"
    assert told.startswith(
        f"dense perplexity of llama on test text is {number}, worse than the 14."
    )
    assert "check that its tokenizer and weights belong together" in told


def test_a_model_that_predicts_is_not_doubted() -> None:
    assert doubts(14.0, [tiny_testbed()]) == []


def test_of_several_models_each_is_doubted_by_itself() -> None:
    one = tiny_testbed()
    other = replace(one, language_model=replace(one.language_model, name="other"))
    parts = [
        {"model": "llama", "test_perplexity": 5.0},
        {"model": "other", "test_perplexity": 99.0},
    ]
    (told,) = doubts(22.0, [one, other], regimes=parts)
    assert "of other on test text is 99.00" in told
