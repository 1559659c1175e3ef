"""How many milliseconds does a unit take on this machine?

A block is timed at full width and without some of its units; the slope of a line through the
medians is what one unit takes. A part of the depth takes what its block takes less without it, and
a layer all of that. Groups that look alike are timed once.

What is measured is kept in the cache, for a model, machine and number of threads, so that later
prunings and a search that goes on see the same numbers. Elsewhere they are others: nothing that has
to be the same on two machines may depend on them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunezero.errors import ModelError, PruneZeroWarning
from prunezero.files.cache import cache_dir
from prunezero.files.digests import joined_digest
from prunezero.files.machine import conditions
from prunezero.files.measured import keep_numbers, numbers_in
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_blocks
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import applied, first_units, slices_of
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.walk import hidden_of, record_calls
from prunezero.pruning.costs import CONTEXT
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.speed import wait_for

# Shares of a group's units that stay while its block is timed.
_WIDTHS = (1.0, 0.75, 0.5, 0.25)
# Measurements at each width.
_TURNS = 9
# Of groups that differ, so many are told of.
_TOLD = 4
# Raise it when what is measured changes: older numbers are then never read.
_FORMAT = 2
# Under this name a model keeps what was measured of it, by file of the cache.
_FOUND = "_prunezero_milliseconds"

Clock = Callable[[], float]


def are_needed(recipe: Recipe) -> bool:
    """Whether a recipe counts in milliseconds, or looks at them."""
    return recipe.unit.measure == "milliseconds" or "MS" in recipe.features


def with_milliseconds(
    groups: Sequence[Group],
    language_model: LanguageModel,
    *,
    cache: Path | None = None,
    clock: Clock = time.perf_counter,
) -> list[Group]:
    """The groups, whose costs say how many milliseconds a unit takes.

    Of a forward pass over 128 tokens, or as many as the model takes. What is measured anew is told
    in one sentence, a `PruneZeroWarning`.

    Args:
        language_model: the same afterwards.
        cache: holds what was measured before; that of prunezero if None.
        clock: seconds.

    Raises:
        ModelError: a block without some units does not take less time, or cannot be called.
    """
    length = _length(language_model)
    path = (cache or cache_dir()) / "milliseconds" / f"{_machine(language_model, length)}.json"
    memo = vars(language_model.model).setdefault(_FOUND, {})
    found: dict[str, float] = memo.setdefault(str(path), {})
    found |= {key: value for key, value in numbers_in(path).items() if key not in found}
    kinds = {group.name: _looks_of(group, language_model) for group in groups}
    new: dict[str, Group] = {}
    for group in groups:
        if kinds[group.name] not in found:
            new.setdefault(kinds[group.name], group)
    if new:
        seconds = _Stopwatch.of(language_model, length, clock)
        measured = {kind: 1000 * seconds.of_unit(group) for kind, group in new.items()}
        # What another process has measured meanwhile counts, so that all see the same.
        found |= {**measured, **numbers_in(path)}
        keep_numbers(path, found)
        told = [f"{found[kind]:.3g} for a {one.called} of {one.name}" for kind, one in new.items()]
        more = [f"{len(told) - _TOLD} more"] if len(told) > _TOLD else []
        warnings.warn(
            f"milliseconds of {length} tokens were measured on this machine, and another has "
            f"others: {', '.join([*told[:_TOLD], *more])}",
            PruneZeroWarning,
            stacklevel=2,
        )
    return [
        replace(group, cost={**group.cost, "milliseconds": found[kinds[group.name]]})
        for group in groups
    ]


def _length(language_model: LanguageModel) -> int:
    longest = getattr(language_model.model.config, "max_position_embeddings", None)
    return min(CONTEXT, longest) if isinstance(longest, int) and longest > 0 else CONTEXT


def _machine(language_model: LanguageModel, length: int) -> str:
    """Hexadecimal digits that change with whatever could change a time."""
    model = language_model
    words = (model.fingerprint, str(model.dtype), *conditions(model.device), str(length))
    return joined_digest([*words, str(_FORMAT)])


def _looks_of(group: Group, language_model: LanguageModel) -> str:
    """Hexadecimal digits that are equal for groups whose units take equally long."""
    block = find_blocks(language_model.model)[group.block]
    parameters = ((name, tuple(one.shape), one.dtype) for name, one in block.named_parameters())
    members = (
        (*(getattr(one, key) for key in ("role", "start", "units", "width", "strata", "gap")),)
        for one in group.members
    )
    names = (one.linear.name.rsplit(".", 1)[-1] for one in group.members)
    parts = (group.kind, group.shape, group.strata, type(block).__name__)
    return joined_digest(map(str, (*parts, *parameters, *members, *names)))


@dataclass(frozen=True)
class _Stopwatch:
    """Times blocks of a model, as the model calls them."""

    language_model: LanguageModel
    calls: Sequence[Callable[[], Any]]
    """of each block, on hidden states as they are behind the first"""
    clock: Clock

    @classmethod
    def of(cls, language_model: LanguageModel, length: int, clock: Clock) -> _Stopwatch:
        """A stopwatch of a model on a text of so many tokens."""
        blocks = find_blocks(language_model.model)
        vocabulary = language_model.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(length, device=language_model.device)[None] % vocabulary
        extras, output = record_calls(language_model.model.base_model, blocks, ids)
        state = hidden_of(output)
        calls = [
            partial(block, state, *rest, **named)
            for block, (rest, named) in zip(blocks, extras, strict=True)
        ]
        return cls(language_model, calls, clock)

    def of_unit(self, group: Group) -> float:
        """Seconds that one unit of a group takes.

        Raises:
            ModelError: see `with_milliseconds`.
        """
        times = self._of_layer(group) if group.kind == "layer" else self._by_width(group)
        slope = float(np.polyfit(list(times), list(times.values()), 1)[0])
        if slope <= 0:
            told = ", ".join(f"{1000 * took:.3g} at {count}" for count, took in times.items())
            raise ModelError(
                f"what a {group.called} of {group.name} takes cannot be told from noise on this "
                f"machine (milliseconds by units that stay: {told}); count in flops or parameters"
            )
        return slope

    def _of_layer(self, group: Group) -> dict[int, float]:
        return self._medians({1: nullcontext}, group.block) | {0: 0.0}

    def _by_width(self, group: Group) -> dict[int, float]:
        """Median seconds of the group's block, by how many of its units stay."""
        # What may not go in the end may go for a while, and no kernel minds.
        free = replace(group, least=0, multiple_of=1, is_protected=False)
        ways: dict[int, Callable[[], AbstractContextManager[None]]] = {}
        for count in _counts(free):
            selection = Selection((free,), (first_units(free, count).to(free.device),))
            slices = slices_of(self.language_model, selection)
            ways[count] = partial(applied, self.language_model, slices)
        return self._medians(ways, group.block)

    def _medians(
        self, ways: Mapping[int, Callable[[], AbstractContextManager[None]]], block: int
    ) -> dict[int, float]:
        """Median seconds of a block under each way, which take turns."""
        taken: dict[int, list[float]] = {count: [] for count in ways}
        for _ in range(_TURNS):
            for count, way in ways.items():
                with way(), torch.no_grad():
                    # The first call finds tensors that are in no cache of the processor.
                    self._seconds(block)
                    taken[count].append(self._seconds(block))
        return {count: float(np.median(seconds)) for count, seconds in taken.items()}

    def _seconds(self, block: int) -> float:
        begin = self.clock()
        self.calls[block]()
        wait_for(self.language_model)
        return self.clock() - begin


def _counts(group: Group) -> list[int]:
    """How many units stay while a block is timed, the most first; of one unit, it or none."""
    if group.units == group.strata:
        return [group.units, 0]
    each = group.units // group.strata
    return sorted({max(1, round(each * width)) * group.strata for width in _WIDTHS}, reverse=True)
