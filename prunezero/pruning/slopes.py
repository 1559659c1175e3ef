"""How far does a model move, for each unit of a place, when the first of them go?

The feature `SLOPE`, and `normalise: slope`: every group loses one step by itself, those units that
`M2` ranks lowest, the columns that stay are refitted, and the distance to the dense model is
measured on calibration text. It is one number for a group, which formulas set off against what
tells its units apart: scores of one place say little of another place, and a forward pass says it.

What is measured is kept in the cache, for a model and what was seen of it, its calibration text,
processor and number of threads, so that a search measures it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prunezero.files.cache import cache_dir
from prunezero.files.digests import joined_digest, tensor_digest
from prunezero.files.machine import conditions
from prunezero.files.measured import keep_numbers, numbers_in
from prunezero.models.anatomy.groups import Group
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.text.windows import windows_fingerprint
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.trials import Trials
from prunezero.pruning.unit_allocation import LEAST_DISTANCE, first_steps
from prunezero.scoring.statistics import Statistics, sum_of

# Calibration windows that the distance is measured on.
_WINDOWS = 4
# Raise it when what is measured changes: older numbers are then never read.
_FORMAT = 2


def with_slopes(
    groups: Sequence[Group],
    language_model: LanguageModel,
    unit: str,
    statistics: Mapping[str, Statistics],
    windows: Tensor,
    *,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Group]:
    """The groups, whose costs say by how many nats per token the model moves for a unit.

    Args:
        language_model: as it was seen, and so again afterwards.
        unit: the word of a recipe that has these groups.
        statistics: of the model by layer name, those of the feature's row.
        windows: calibration token ids [count, length], of which the first are looked at.
        cache: holds what was measured before; that of prunezero if None.
        progress: told (what, done, total) as the work goes on.

    Raises:
        ScoreError, StatisticsError, FactorizationError: as the scores and the refit.
    """
    words = _conditions(language_model, unit, windows, groups, statistics)
    path = (cache or cache_dir()) / "slopes" / f"{joined_digest(words)}.json"
    known = numbers_in(path)
    fields = {"name": "slope", "criterion": "M2", "compare": "group", "update": "refit"}
    recipe = validated(Recipe, {**fields, "unit": unit}, "the recipe of SLOPE")
    counts = first_steps(groups, recipe.unit.measure)
    # How many go in a first step follows from the recipe and from what else it prunes.
    keys = {name: f"{name} without {count}" for name, count in counts.items()}
    if missing := [group for group in groups if keys[group.name] not in known]:
        seen = windows[:_WINDOWS]
        with torch.no_grad(), Trials(language_model, recipe, groups, statistics, seen) as trials:
            for done, group in enumerate(missing, start=1):
                count = counts[group.name]
                moved = trials.kl({group.name: count}, len(seen)) if count else 0.0
                known[keys[group.name]] = max(moved, LEAST_DISTANCE) / max(count, 1)
                if progress is not None:
                    progress("distances without some units, of group", done, len(missing))
        keep_numbers(path, known)
    return [
        replace(one, cost={**one.cost, "slope": known[keys[one.name]]}, first=counts[one.name])
        for one in groups
    ]


def _conditions(
    language_model: LanguageModel,
    unit: str,
    windows: Tensor,
    groups: Sequence[Group],
    statistics: Mapping[str, Statistics],
) -> list[str]:
    """Words that change with whatever could change a distance."""
    model, text = language_model, windows_fingerprint(windows)
    # A later stage measures a model that is no longer the one of the fingerprint.
    seen = [
        tensor_digest(sum_of(statistics.get(group.reader.linear.name), "mask_gradients").sum(0))
        for group in groups
    ]
    words = (model.fingerprint, str(model.dtype), unit, text, *conditions(model.device))
    return [*words, *seen, str(_FORMAT)]
