"""Types of the keys of a search space, for each that is more than a word or a number.

Keys after `signals` in the class see what it says: what looks at costlier signals is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from prunezero.errors import CriterionError, PruneZeroError, did_you_mean
from prunezero.formula.constants import MAX_EXPONENT, number
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import SIGNALS, WEIGHT_SIGNALS
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import OPERATORS, current_word
from prunezero.models.anatomy.patterns import check_pattern
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import MOST_WORDS, Words
from prunezero.pruning.recipes.recipe import Formula
from prunezero.scoring.request import group_columns
from prunezero.searching.spaces.space_choices import (
    check_choices,
    check_training,
    is_within,
    within,
    word_of,
)


def _limit(info: ValidationInfo) -> str:
    """The costliest signal that is allowed; the usual one where that key is at fault itself."""
    return str(info.data.get("signals", WEIGHT_SIGNALS[-1]))


def _unit(info: ValidationInfo) -> str:
    """What is removed; single weights where that key is at fault itself."""
    return str(info.data.get("unit", "weight"))


def _known_unit(value: str) -> str:
    if value not in UNITS:
        near = did_you_mean(value, UNITS) or "."
        raise ValueError(f"'{value}' is nothing that is removed{near} Known: {', '.join(UNITS)}")
    if value == "channel":
        raise ValueError(
            "channels of the residual stream are one group for the whole model, of which no block "
            "by itself loses anything, so their formulas cannot be screened; prune by one"
        )
    if value == "link":
        raise ValueError(
            "links are left out query by query, of which no rung of a search knows anything; "
            "measure formulas of them by prunezero.pruning.attention"
        )
    if UNITS[value].walker:
        raise ValueError(
            f"unit: {value} has units that are known only on a walk through the model, so their "
            "formulas cannot be screened; prune by one"
        )
    return value


def _known_signal(value: str, info: ValidationInfo) -> str:
    known = WEIGHT_SIGNALS if _unit(info) == "weight" else SIGNALS
    if value not in known:
        near = did_you_mean(value, known) or "."
        raise ValueError(f"'{value}' is no signal{near} Known: {', '.join(known)}")
    return value


def _cheap_terminals(value: tuple[Criterion, ...], info: ValidationInfo) -> tuple[Criterion, ...]:
    unit = _unit(info)
    for terminal in value:
        try:
            UNITS[unit].domain.refuse_words(terminal)
        except CriterionError as error:
            raise ValueError(str(error)) from error
        for name in terminal.features:
            if FEATURES[name].kinds and unit not in FEATURES[name].kinds:
                raise ValueError(f"feature {name} says nothing of a {unit.replace('_', ' ')}")
            needed = FEATURES[name].schedule
            if needed not in ("", word_of(info.data.get("training", {}).get("schedule", ""))):
                raise ValueError(
                    f"feature {name} is known only while layers train; give the space a training "
                    f"with schedule: {needed}, or prune by it"
                )
    if unit != "weight":
        return _cheap_terminals_of_units(value, unit, _limit(info))
    if not any(terminal.shape == "element" for terminal in value):
        raise ValueError("none varies by weight, so no formula could rank weights")
    limit = _limit(info)
    kept = tuple(terminal for terminal in value if is_within(terminal.signal, limit))
    if not any(terminal.shape == "element" for terminal in kept):
        raise ValueError(
            f"none that varies by weight looks at '{limit}' or less, so no formula could rank "
            "weights; allow costlier signals, or add abs(W)"
        )
    return kept


def _cheap_terminals_of_units(
    value: tuple[Criterion, ...], unit: str, limit: str
) -> tuple[Criterion, ...]:
    kept = tuple(terminal for terminal in value if is_within(terminal.signal, limit))
    shapes = {"element", *UNITS[unit].domain.shapes}
    if shapes.isdisjoint(terminal.shape for terminal in kept):
        free = "AGE" if unit == "kv_column" else "PARAMS"
        raise ValueError(
            f"none that varies by {unit.replace('_', ' ')} looks at '{limit}' or less, so no "
            f"formula could rank them; allow costlier signals, or add {free}"
        )
    return kept


def _cheap_choices(
    value: dict[str, tuple[Any, ...]], info: ValidationInfo
) -> dict[str, tuple[Any, ...]]:
    check_choices(value, _unit(info), info.data.get("training", {}))
    return within(value, _limit(info), _unit(info))


def _cheap_weights(value: bool, info: ValidationInfo) -> bool:
    return value and is_within("gradients", _limit(info))


def _known_training(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    _refused_by(lambda training: check_training(training, _unit(info)), value)
    return value


def _known_operators(value: tuple[str, ...]) -> tuple[str, ...]:
    now = tuple(map(current_word, value))
    for word in now:
        _check_operator(word)
    return now


def _known_nestings(value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    value = {current_word(word): tuple(map(current_word, held)) for word, held in value.items()}
    for word in itertools.chain(value, *value.values()):
        _check_operator(word)
        if OPERATORS[word].torch is None:
            raise ValueError(
                f"'{word}' becomes other words before a formula is computed, so it is never "
                "found in one; name those (divide_by_norm becomes div and matrix_norm)"
            )
    return value


def _check_operator(word: str) -> None:
    try:
        is_known = word in OPERATORS
    except PruneZeroError as error:
        raise ValueError(str(error)) from error
    if not is_known:
        near = did_you_mean(word, OPERATORS) or "."
        raise ValueError(f"'{word}' is not a known operator{near} Known: {', '.join(OPERATORS)}")


def _refused_by(check: Callable[[Any], Any], value: Any) -> None:
    """Let a check of ours speak through pydantic, which gathers faults of all keys."""
    try:
        check(value)
    except PruneZeroError as error:
        raise ValueError(str(error)) from error


def _usable_numbers(value: tuple[float, ...]) -> tuple[float, ...]:
    for number_of_space in value:
        _refused_by(number, number_of_space)
    return value


def _usable_exponents(value: tuple[float, ...]) -> tuple[float, ...]:
    for exponent in value:
        if exponent == 0 or abs(exponent) > MAX_EXPONENT:
            raise ValueError(
                f"an exponent is {exponent:g}; it must be within -{MAX_EXPONENT} and "
                f"{MAX_EXPONENT}, and not 0"
            )
    return value


def _readable_patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in value:
        _refused_by(check_pattern, pattern)
    return value


def _known_group(value: str, info: ValidationInfo) -> str:
    unit = _unit(info)
    if unit == "weight":
        _refused_by(group_columns, value)
        return value
    # Left out, it is the first of those that such units know.
    known = UNITS[unit].compare
    if value != "row":
        _refused_by(lambda word: UNITS[unit].axes_of(word, "free"), value)
    return value if value in known else next(iter(known))


# What a search does in each generation is at most so much.
Count = Annotated[int, Field(ge=1, le=100_000)]
CountOrNone = Annotated[int, Field(ge=0, le=100_000)]
Share = Annotated[float, Field(ge=0, le=1)]
UnitWord = Annotated[str, AfterValidator(_known_unit)]
Signal = Annotated[str, AfterValidator(_known_signal)]
Training = Annotated[dict[str, Any], MOST_WORDS, AfterValidator(_known_training)]
Terminals = Annotated[
    tuple[Formula, ...], Field(min_length=1), MOST_WORDS, AfterValidator(_cheap_terminals)
]
Operators = Annotated[Words, Field(min_length=1), AfterValidator(_known_operators)]
Numbers = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], ...],
    MOST_WORDS,
    AfterValidator(_usable_numbers),
]
Exponents = Annotated[Numbers, AfterValidator(_usable_exponents)]
Nestings = Annotated[dict[str, Words], MOST_WORDS, AfterValidator(_known_nestings)]
Group = Annotated[str, Field(validate_default=True), AfterValidator(_known_group)]
OpenChoices = Annotated[
    dict[str, Annotated[tuple[Any, ...], MOST_WORDS]], AfterValidator(_cheap_choices)
]
LayerPatterns = Annotated[Words, AfterValidator(_readable_patterns)]
# Costs a backward pass, so it is off where those are not allowed, whoever asked for it.
GradientWeights = Annotated[bool, Field(validate_default=True), AfterValidator(_cheap_weights)]
