"""Which values of a recipe's other keys may a search space offer, and what do they look at?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunezero.errors import RecipeError, did_you_mean
from prunezero.formula.feature_row import WEIGHT_SIGNALS
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe

# Keys of a recipe that a space may offer values for.
CHOOSABLE = ("compare", "allocate", "update", "permute", "damping")

Choices = Mapping[str, tuple[Any, ...]]


def check_choices(choices: Choices) -> None:
    """Refuse what no recipe may hold.

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
                _example_of(key, value)
            except RecipeError as error:
                raise ValueError(str(error)) from error


def signal_of(key: str, value: Any) -> str:
    """The costliest signal that a value of a recipe's key looks at, one of WEIGHT_SIGNALS."""
    # It is a share of Gram matrices, and without them it changes nothing.
    return WEIGHT_SIGNALS[-1] if key == "damping" else _example_of(key, value).signal


def within(choices: Choices, signal: str) -> dict[str, tuple[Any, ...]]:
    """The choices that look at no costlier signal than this one; keys that keep a value."""
    kept = {
        key: tuple(value for value in values if is_within(signal_of(key, value), signal))
        for key, values in choices.items()
    }
    return {key: values for key, values in kept.items() if values}


def is_within(signal: str, costliest: str) -> bool:
    """Whether a signal costs no more than another one."""
    return WEIGHT_SIGNALS.index(signal) <= WEIGHT_SIGNALS.index(costliest)


def example(key: str, value: Any, pattern: str) -> Recipe:
    """A recipe with this one choice.

    Raises:
        RecipeError: there is no such recipe.
    """
    fields = {"name": "example", "criterion": "abs(W)", "pattern": pattern, key: value}
    return validated(Recipe, fields, f"choices: {key}: {value}")


def is_usable(key: str, value: Any, pattern: str) -> bool:
    """Whether a recipe of this pattern may make the choice."""
    try:
        example(key, value, pattern)
    except RecipeError:
        return False
    return True


def alike(key: str, left: Any, right: Any) -> bool:
    """Whether two spellings of a value of this key say the same, such as `admm` and `[admm]`."""
    return _example_of(key, left) == _example_of(key, right)


def _example_of(key: str, value: Any) -> Recipe:
    """A recipe with the choice, of a pattern under which it may stand."""
    return example(key, value, "2:4" if key == "permute" else "free")
