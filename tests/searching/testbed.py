"""A tiny model on a bench, in milliseconds, for tests of the search."""

from __future__ import annotations

import random
from typing import Any

from prunezero.models.text.splits import SPLITS, Text
from prunezero.pruning.testbed import Settings, Testbed
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_models import tiny_model

SETTINGS = Settings(
    sequence_length=16, calibration_tokens=64, evaluation_tokens=64, test_tokens=64, seed=0
)


def tiny_text() -> Text:
    """Random letters, other ones for each split."""
    rng = random.Random(0)
    documents: dict[str, tuple[str, ...]] = {
        split: ("".join(rng.choices("abcdefgh ,.", k=2000)),) for split in SPLITS
    }
    return Text("letters", documents, "letters")


def tiny_testbed(family: str = "llama", **changes: Any) -> Testbed:
    """The bench; `changes` go to the model's configuration."""
    return Testbed(tiny_model(family, **changes), tiny_text(), SETTINGS)


def tiny_space(**changes: Any) -> SearchSpace:
    """The space of `search_spaces/formulas.yaml`, in small generations."""
    fields = SearchSpace.load("formulas").model_dump(mode="json")
    small = {"generation": 6, "population": 8, "measured": 2, "max_complexity": 12}
    return SearchSpace.model_validate({**fields, **small, **changes})
