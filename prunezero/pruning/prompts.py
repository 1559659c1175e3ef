"""Prompts of a testbed: which texts are recipes of run time measured on?

Three quarters of a window are a prompt, which is read densely, and the last quarter follows it. In
recall, as many tokens as three sixteenths of a window come again behind the prompt of another one;
a sixty-fourth of a window of them is given, and the others have to be found in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prunezero.errors import RecipeError
from prunezero.models.attending.continuing import Continuations, read_densely, recall_windows
from prunezero.models.attending.installing import Known
from prunezero.models.attending.links import LinkPolicy
from prunezero.models.attending.observing import (
    Measured,
    merged,
    query_moments,
    streaming_errors,
)
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.probes import SEVERAL, Probe, clozes, needles
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.testbed import Testbed

# Tokens of a window where nothing else is asked for.
WINDOW = 1024
# Texts whose KL a search goes by.
OBJECTIVES = ("text", "recall")
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


def window_tokens(window: int) -> dict[str, int]:
    """How many tokens of each text are usually read, in windows of so many, by field."""
    counts = {"calibration_tokens": 8, "evaluation_tokens": 6, "test_tokens": 6}
    return {key: count * window for key, count in counts.items()}


def texts_of(
    testbed: Testbed, split: str, names: Sequence[str] = OBJECTIVES
) -> dict[str, Continuations]:
    """Prompts of these texts and what follows them, as the dense model read them.

    Texts that cannot be made of the split are left out: sentences that do not fit in a prompt, or
    no word that comes again.

    Args:
        names: of TEXTS.

    Raises:
        RecipeError: windows are too short.
        TextError: the split holds fewer than two windows.
        ModelError: the model has no attention that can be watched.
    """
    windows = testbed.windows(split)
    sizes = PromptSizes.of(testbed.settings.sequence_length)
    found = {name: TEXTS[name](testbed.language_model, windows, sizes) for name in names}
    return {name: text for name, text in found.items() if text is not None}


def _going_on(model: LanguageModel, windows: Tensor, sizes: PromptSizes) -> Continuations:
    return read_densely(model, windows, prompt=sizes.prompt)


def _recall(model: LanguageModel, windows: Tensor, sizes: PromptSizes) -> Continuations:
    prompt, repeated = sizes.prompt, sizes.repeated
    again = recall_windows(windows, prompt=prompt, repeated=repeated, language_model=model)
    return read_densely(model, again, prompt=prompt, skipped=sizes.skipped)


def _told(
    keys: int, model: LanguageModel, windows: Tensor, sizes: PromptSizes
) -> Continuations | None:
    return _asked(model, needles(windows, model, prompt=sizes.prompt, keys=keys), sizes)


def _cloze(model: LanguageModel, windows: Tensor, sizes: PromptSizes) -> Continuations | None:
    return _asked(model, clozes(windows, model, prompt=sizes.prompt), sizes)


def _asked(
    model: LanguageModel, probes: Sequence[Probe], sizes: PromptSizes
) -> Continuations | None:
    if not probes:
        return None
    given = [one.given for one in probes]
    return read_densely(model, [one.ids for one in probes], prompt=sizes.prompt, skipped=given)


TEXTS: dict[str, Callable[[LanguageModel, Tensor, PromptSizes], Continuations | None]] = {
    "text": _going_on,
    "recall": _recall,
    "needle": partial(_told, 1),
    "needles": partial(_told, SEVERAL),
    "cloze": _cloze,
}
"""Kinds of text: going on as written; a prompt's beginning that comes again; a number that one
sentence, or one of several, tells; the last word that stood in the prompt."""


def streaming_heads(testbed: Testbed, *, sinks: int, recent: int) -> dict[int, Measured]:
    """How heads stream on beginnings of calibration text that come again, by layer; for STREAM.

    What a head finds far behind is seen where something far behind is needed.

    Raises:
        RecipeError, TextError, ModelError: as `texts_of`.
    """
    model, sizes = testbed.language_model, PromptSizes.of(testbed.settings.sequence_length)
    prompt, repeated = sizes.prompt, sizes.repeated
    again = recall_windows(
        testbed.windows("calibration"), prompt=prompt, repeated=repeated, language_model=model
    )
    return streaming_errors(model, again, prompt, sinks=sinks, recent=recent)


def known_of(testbed: Testbed, policy: Policy | LinkPolicy, coming: Known) -> Known:
    """What has to be measured on calibration text for a policy, by layer.

    Args:
        coming: what was measured for all policies (`coming_queries`).
    """
    if not isinstance(policy, Policy) or "STREAM" not in policy.features:
        return coming
    streaming = streaming_heads(testbed, sinks=policy.sinks, recent=policy.recent)
    return merged(coming, streaming)


def coming_queries(testbed: Testbed) -> dict[int, Measured]:
    """How queries behind a prompt are distributed on calibration text, by layer; for EXPECTED.

    Raises:
        RecipeError, ModelError: as `texts_of`.
    """
    sizes = PromptSizes.of(testbed.settings.sequence_length)
    return query_moments(testbed.language_model, testbed.windows("calibration"), sizes.prompt)
