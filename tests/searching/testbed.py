"""A tiny model on a testbed, in milliseconds, and tasks for it, for tests of the search."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from prunezero.models.text.splits import SPLITS, Text
from prunezero.pruning.testbed import Settings, Testbed
from prunezero.searching import session
from prunezero.searching.experiment.config import SearchConfig, starting_rules
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
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
    """The testbed; `changes` go to the model's configuration."""
    return Testbed(tiny_model(family, **changes), tiny_text(), SETTINGS)


def tiny_space(name: str = "formulas", /, **changes: Any) -> SearchSpace:
    """A space of `search_spaces/`, in small generations."""
    fields = SearchSpace.load(name).model_dump(mode="json")
    small = {"generation": 6, "population": 8, "measured": 2, "max_complexity": 12}
    if fields["unit"] != "weight":
        small |= {"quick_kl": 3, "trials": 4}
    return SearchSpace.model_validate({**fields, **small, **changes})


def config_of(
    space: SearchSpace,
    sparsity: float | None = None,
    *,
    start: Sequence[Rule] = (),
    testbeds: Sequence[Testbed] = (),
    **named: Any,
) -> SearchConfig:
    """The experiment of this space on these testbeds, or on the tiny one."""
    own, *others = testbeds or [tiny_testbed()]
    rules = starting_rules(start)
    return SearchConfig.on(
        own, others, space_content=space, sparsity=sparsity, start=rules, **named
    )


def make_task(space: SearchSpace, sparsity: float | None = None, **named: Any) -> Task:
    """The task of `config_of`, with the rules that it starts from."""
    return session.make_task(config_of(space, sparsity, **named))


def bare_task(space: SearchSpace, sparsity: float | None = 0.5, **named: Any) -> Task:
    """The task of `config_of` that starts from nothing."""
    return Task(config_of(space, sparsity, **named))
