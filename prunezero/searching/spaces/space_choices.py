"""Which values of a recipe's other keys may a search space offer, and what do they look at?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prunezero.errors import RecipeError, did_you_mean
from prunezero.formula.feature_row import SIGNALS, WEIGHT_SIGNALS
from prunezero.formula.ranking import AS_IT_IS
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.choices import chosen_unit
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe

# Keys of a recipe that a space may offer values for.
CHOOSABLE = ("compare", "allocate", "update", "permute", "damping", "unit", "schedule")
# Those that a training consists of.
TRAINING = ("schedule", "recover")
# A formula that every kind of unit has, and that costs nothing.
_CHEAPEST = {"weight": "abs(W)", "kv_column": "RNDK"}
_OF_UNITS = "RND"

Choices = Mapping[str, tuple[Any, ...]]


def word_of(choice: Any) -> str:
    """The word of a choice, with its numbers or without."""
    return str(next(iter(choice), "") if isinstance(choice, Mapping) else choice)


def check_training(training: Mapping[str, Any], unit: str) -> None:
    """Refuse what is no training in which such units go.

    Raises:
        RecipeError: keys are missing or others, or no recipe has such a training.
    """
    if not training:
        return
    if set(training) != set(TRAINING):
        raise RecipeError("a training has the keys schedule and recover, both and no other")
    made = validated(Recipe, _fields_of(unit) | dict(training), "training")
    if not made.schedule.row.in_training:
        raise RecipeError(
            f"schedule: {made.schedule.word} takes nothing out of a training; use while_training "
            "or periods"
        )


def check_choices(
    choices: Choices, unit: str = "weight", training: Mapping[str, Any] | None = None
) -> None:
    """Refuse what no recipe may hold.

    Args:
        training: what each of them has.

    Raises:
        ValueError: a key is none that a search may choose, or a value none of its key.
    """
    for key, values in choices.items():
        if key not in CHOOSABLE:
            near = did_you_mean(key, CHOOSABLE) or "."
            raise ValueError(
                f"'{key}' is no key that a search may choose{near} Known: {', '.join(CHOOSABLE)}"
            )
        for value in values:
            try:
                made = _example_of(key, value, unit)
                if training:
                    fields = _fields_of(unit) | {key: value} | dict(training)
                    validated(Recipe, fields, f"choices: {key}: {value}")
            except RecipeError as error:
                raise ValueError(str(error)) from error
            if made.unit.word != unit:
                raise ValueError(
                    f"unit: {made.unit.word} is another than the space's own, {unit}; offer other "
                    "numbers of that one, or write a space for each"
                )


def signal_of(key: str, value: Any, unit: str = "weight") -> str:
    """The costliest signal that a value of a recipe's key looks at, one of SIGNALS."""
    # It is a share of Gram matrices, and without them it changes nothing.
    return WEIGHT_SIGNALS[-1] if key == "damping" else _example_of(key, value, unit).signal


def within(choices: Choices, signal: str, unit: str = "weight") -> dict[str, tuple[Any, ...]]:
    """The choices that look at no costlier signal than this one; keys that keep a value."""
    kept = {
        key: tuple(value for value in values if is_within(signal_of(key, value, unit), signal))
        for key, values in choices.items()
    }
    return {key: values for key, values in kept.items() if values}


def is_within(signal: str, costliest: str) -> bool:
    """Whether a signal costs no more than another one."""
    return SIGNALS.index(signal) <= SIGNALS.index(costliest)


def example(key: str, value: Any, pattern: str, unit: str = "weight") -> Recipe:
    """A recipe with this one choice.

    Raises:
        RecipeError: there is no such recipe.
    """
    fields = _fields_of(unit) | {"pattern": pattern, key: value}
    return validated(Recipe, fields, f"choices: {key}: {value}")


def _fields_of(unit: str) -> dict[str, Any]:
    """A recipe of such units that chooses nothing."""
    compare = next(iter(UNITS[unit].compare))
    criterion = _CHEAPEST.get(unit, _OF_UNITS)
    return {"name": "example", "criterion": criterion, "unit": unit, "compare": compare}


def is_usable(key: str, value: Any, pattern: str, unit: str = "weight") -> bool:
    """Whether a recipe of this pattern may make the choice."""
    try:
        example(key, value, pattern, unit)
    except RecipeError:
        return False
    return True


def alike(key: str, left: Any, right: Any, unit: str = "weight") -> bool:
    """Whether two spellings of a value of this key say the same, such as `admm` and `[admm]`."""
    with suppress(RecipeError):
        return _example_of(key, left, unit) == _example_of(key, right, unit)
    # What stands only beside another choice is none that a space can offer by itself.
    return False


def _example_of(key: str, value: Any, unit: str) -> Recipe:
    """A recipe with the choice, of a pattern under which it may stand."""
    return example(key, value, "2:4" if key == "permute" else "free", unit)


def competing_units(unit: Any, compare: str) -> str:
    """Who competes under a recipe's `unit` and `compare`, as far as a formula can tell.

    Where values of several channels or matrices are added up, or made comparable, or where a unit
    of each stratum goes at a time, the values themselves count, and not their order: AS_IT_IS.
    """
    made = chosen_unit(unit)
    options = made.options.model_dump(exclude_defaults=True)
    if made.word == "kv_column":
        # Means over heads and over blocks are of values; else a key-value head is a row by itself.
        is_mean = options.get("share") == "layer" or "block" in options
        return AS_IT_IS if is_mean else {"layer": "model", "model": "model"}.get(compare, "row")
    counts = {"members", "channels", "normalise", "rescore"}.intersection(options)
    return AS_IT_IS if counts or made.word == "head" else compare
