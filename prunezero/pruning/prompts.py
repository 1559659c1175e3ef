"""Prompts of a testbed: which texts are recipes of run time measured on?

Three quarters of a window are a prompt, which is read densely, and the last quarter follows it. In
recall, as many tokens as three sixteenths of a window come again behind the prompt of another one;
a sixty-fourth of a window of them is given, and the others have to be found in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunezero.errors import RecipeError
from prunezero.models.attending.continuing import Continuations, read_densely, recall_windows
from prunezero.models.attending.observing import Measured, query_moments
from prunezero.pruning.testbed import Testbed

# Of fewer tokens nothing is left of the shortest part.
_SHORTEST = 16


@dataclass(frozen=True)
class PromptSizes:
    """How a window is divided, in tokens."""

    prompt: int
    """read before keys go"""
    following: int
    """behind it"""
    repeated: int
    """of a prompt's beginning, that come again in recall"""
    skipped: int
    """of these, that are only given"""

    @classmethod
    def of(cls, window: int) -> PromptSizes:
        """The parts of a window of so many tokens.

        Raises:
            RecipeError: it is too short to be divided.
        """
        if window < _SHORTEST:
            raise RecipeError(
                f"windows of {window} tokens are too short for a prompt and what follows it; give "
                f"--sequence-length {_SHORTEST} or more"
            )
        prompt = 3 * window // 4
        return cls(prompt, window - prompt, 3 * window // 16, max(1, window // 64))


def texts_of(testbed: Testbed, split: str) -> dict[str, Continuations]:
    """`text` that goes on as it is, and `recall` of beginnings, as the dense model read them.

    Raises:
        RecipeError: windows are too short.
        TextError: the split holds fewer than two windows.
        ModelError: the model has no attention that can be watched.
    """
    model, windows = testbed.language_model, testbed.windows(split)
    sizes = PromptSizes.of(testbed.settings.sequence_length)
    prompt = sizes.prompt
    again = recall_windows(windows, prompt=prompt, repeated=sizes.repeated, language_model=model)
    return {
        "text": read_densely(model, windows, prompt=prompt),
        "recall": read_densely(model, again, prompt=prompt, skipped=sizes.skipped),
    }


def coming_queries(testbed: Testbed) -> dict[int, Measured]:
    """How queries behind a prompt are distributed on calibration text, by layer; for EXPECTED.

    Raises:
        RecipeError, ModelError: as `texts_of`.
    """
    sizes = PromptSizes.of(testbed.settings.sequence_length)
    return query_moments(testbed.language_model, testbed.windows("calibration"), sizes.prompt)
