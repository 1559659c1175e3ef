"""Soundness of a dense model: what its perplexity says of it, before any number is believed.

A model that predicts worse than one that knows only how frequent each token is does not read the
text: its tokenizer, its weights or the text are not what they should be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunezero.models.evaluation import frequency_perplexity
from prunezero.pruning.recipes.published import warning_of
from prunezero.pruning.testbed import Testbed


def dense_warnings(row: Mapping[str, Any], testbeds: Sequence[Testbed]) -> Iterator[str]:
    """What to doubt of the dense models that a row of results is about, a sentence each.

    Args:
        row: of the dense model on test text, over all testbeds where there are several.
        testbeds: on which it was measured.
    """
    for testbed in testbeds:
        for measured in _rows_of(row, testbed, testbeds):
            yield from _doubts(measured, testbed)


def _doubts(row: Mapping[str, Any], testbed: Testbed) -> Iterator[str]:
    model, perplexity = testbed.language_model, row["test_perplexity"]
    published = warning_of(model.name, testbed.text.name, row)
    if published is not None:
        yield published
    vocabulary = int(model.model.get_input_embeddings().weight.shape[0])
    test, seen = testbed.windows("test"), testbed.windows("calibration")
    frequency = frequency_perplexity(test, seen, vocabulary)
    # Written so that NaN is a reason to doubt too.
    if perplexity is None or not perplexity <= frequency:
        told = "not finite" if perplexity is None else f"{perplexity:.2f}"
        yield (
            f"dense perplexity of {model.name} on test text is {told}, worse than the "
            f"{frequency:.2f} of knowing only how frequent each token is: check that its tokenizer "
            "and weights belong together, and that it was trained on such text"
        )


def _rows_of(
    row: Mapping[str, Any], testbed: Testbed, testbeds: Sequence[Testbed]
) -> Iterator[Mapping[str, Any]]:
    """The row as one model alone has it; the parts of a dense row over draws are all alike."""
    if len(testbeds) == 1:
        yield row
        return
    name = testbed.language_model.name
    part = next((one for one in row["regimes"] if one.get("model") == name), None)
    if part is not None:
        # Losses of windows are means over all models.
        yield {**row, "test_perplexity": part["test_perplexity"]}
