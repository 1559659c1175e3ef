"""Which formulas may a search write: the words, the numbers, the size; one YAML file each."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from prunezero.errors import PruneZeroError, RecipeError, did_you_mean
from prunezero.formula.canonical import MAX_EXPONENT, number
from prunezero.formula.code import steps
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import OPERATORS
from prunezero.pruning.documents import find_document, read_document, validated
from prunezero.pruning.recipe import Formula, Recipe, folder
from prunezero.scoring.request import group_columns
from prunezero.searching.nesting import computed_words, nested_words

# Keys of a recipe that a space may offer values for.
CHOOSABLE = ("compare", "allocate", "update", "permute", "damping")
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class SearchSpace(BaseModel):
    """The words and sizes of formulas, and how large a generation of a search is."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(min_length=1, max_length=100)
    source: str = ""
    note: str = ""
    # leaves of a formula: features, or formulas of features
    terminals: tuple[Formula, ...] = Field(min_length=1)
    operators: tuple[str, ...] = Field(min_length=1)
    # numbers a formula may add or multiply, and exponents of `power`
    constants: tuple[Number, ...] = ()
    exponents: tuple[Number, ...] = ()
    # operator: those that may not stand anywhere inside its arguments; PySR's nested_constraints.
    # A formula is looked at as it is computed: x**2 is sqr, x**0.5 is sqrt, x**-1 is div, x**3 is
    # sqr and mul, x - y is sub, sqrt(x) and log(x) hold the abs that they see. `power` means every
    # other exponent, and sqr and sqrt too. A terminal is one word, and not looked into.
    forbid: dict[str, tuple[str, ...]] = {}
    # largest formula, in words and in nesting
    max_complexity: PositiveInt = 20
    max_depth: PositiveInt = 8
    # depth of a freshly drawn formula
    fresh_depth: PositiveInt = 4
    # whether screening weighs the error of an output by its loss gradient: one backward pass
    weighted_by_gradient: bool = True
    # which weights compete, where the search does not choose it
    compare: str = "row"
    # values that the search may give to other keys of its recipes; none: it finds formulas alone
    choices: dict[str, tuple[Any, ...]] = {}
    # layers, by pattern, whose share of the sparsity the search may change, in an allocation table;
    # those that the model lacks are left out, and N:M patterns have no shares
    ratios: tuple[str, ...] = ()
    # candidates with a new mask in one generation
    generation: PositiveInt = 32
    # candidates that breed, the best by screening
    population: PositiveInt = 50
    # how many are drawn to find one parent
    tournament: PositiveInt = 5
    # populations that breed apart, with now and then a father from elsewhere
    islands: PositiveInt = 2
    # share of children by crossover, by other choices, and fresh; the rest are mutants
    crossover: Share = 0.3
    chosen: Share = 0.2
    fresh: Share = 0.1
    # skeletons of each generation whose numbers are tuned, and how many numbers are tried for each
    tuned: NonNegativeInt = 2
    trials: PositiveInt = 30
    # candidates of each generation that are glanced at, and that are measured on all search text
    glanced: PositiveInt = 6
    measured: PositiveInt = 2

    @field_validator("operators")
    @classmethod
    def _known_operators(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            _check_operator(word)
        return value

    @field_validator("forbid")
    @classmethod
    def _known_nestings(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for word in itertools.chain(value, *value.values()):
            _check_operator(word)
            if OPERATORS[word].torch is None:
                raise ValueError(
                    f"'{word}' becomes other words before a formula is computed, so it is never "
                    "found in one; name those (divide_by_norm becomes div and layer_norm)"
                )
        return value

    @field_validator("constants", "exponents")
    @classmethod
    def _usable_numbers(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        try:
            for number_of_space in value:
                number(number_of_space)
        except PruneZeroError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("exponents")
    @classmethod
    def _usable_exponents(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for exponent in value:
            if exponent == 0 or abs(exponent) > MAX_EXPONENT:
                raise ValueError(
                    f"an exponent is {exponent:g}; it must be within -{MAX_EXPONENT} and "
                    f"{MAX_EXPONENT}, and not 0"
                )
        return value

    @field_validator("ratios")
    @classmethod
    def _readable_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return value

    @field_validator("compare")
    @classmethod
    def _known_group(cls, value: str) -> str:
        try:
            group_columns(value)
        except PruneZeroError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("choices")
    @classmethod
    def _known_choices(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in value.items():
            if key not in CHOOSABLE:
                near = did_you_mean(key, CHOOSABLE) or "."
                raise ValueError(
                    f"'{key}' is no key that a search may choose{near} Known: "
                    f"{', '.join(CHOOSABLE)}"
                )
            for one in values:
                pattern = "2:4" if key == "permute" else "free"
                try:
                    _example(key, one, pattern)
                except RecipeError as error:
                    raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _can_rank_weights(self) -> SearchSpace:
        if not any(terminal.shape == "element" for terminal in self.terminals):
            raise ValueError("terminals: none varies by weight, so no formula could rank weights")
        if "power" in self.operators and not self.exponents:
            raise ValueError("exponents: 'power' needs some, for example [0.5, 2]")
        return self

    @model_validator(mode="after")
    def _forbids_its_own_words(self) -> SearchSpace:
        if not self.forbid:
            return self
        usable = computed_words(self.operators)
        for word in itertools.chain(self.forbid, *self.forbid.values()):
            if word not in usable:
                raise ValueError(
                    f"forbid: '{word}' is no operator of this space, so nothing is nested in it or "
                    "around it; leave it out, or add it to the operators"
                )
        return self

    @classmethod
    def load(cls, name: str | Path) -> SearchSpace:
        """A space of `search_spaces/` by name, or any by the path of its file.

        Raises:
            RecipeError: no such space, or faults in the file, all listed.
        """
        path = find_document(name, search_spaces(), "search space")
        return validated(cls, read_document(path), str(path))

    @property
    def features(self) -> tuple[str, ...]:
        """Every feature that some formula of the space may use."""
        used = {name for terminal in self.terminals for name in terminal.features}
        return tuple(name for name in FEATURES if name in used)

    @property
    def widest_group(self) -> str:
        """The widest group of its recipes: what no mask can see there, none sees anywhere."""
        groups = [self.compare, *self.choices.get("compare", ())]
        widest = [group for group in ("model", "layer") if group in groups]
        inside = [group for group in groups if group != "row"]
        return [*widest, *inside, "row"][0]

    def choices_for(self, pattern: str) -> dict[str, tuple[Any, ...]]:
        """The values of each key that make a recipe of this pattern; keys with two or more."""
        # Inside an N:M pattern, only its own groups compete.
        usable = {
            key: tuple(value for value in values if _is_usable(key, value, pattern))
            for key, values in self.choices.items()
            if key != "compare" or pattern == "free"
        }
        return {key: values for key, values in usable.items() if len(values) > 1}

    def examples(self, pattern: str) -> list[Recipe]:
        """A recipe for every choice, whose needs are those of the whole space."""
        chosen = self.choices_for(pattern)
        return [_example(key, value, pattern) for key in chosen for value in chosen[key]]

    def holds(self, criterion: Criterion) -> bool:
        """Whether a formula ranks weights, is small enough, and nests nothing that is forbidden."""
        return (
            criterion.shape == "element"
            and criterion.complexity <= self.max_complexity
            and criterion.depth <= self.max_depth
            and not self.forbids(criterion)
        )

    def forbids(self, criterion: Criterion) -> bool:
        """Whether an operator of the formula stands inside one that may not hold it."""
        if not self.forbid:
            return False
        return any(
            not inside.isdisjoint(self.forbid.get(word, ()))
            for own, inside in nested_words(criterion, self.terminals)
            for word in own
        )

    def watched(self, criterion: Criterion) -> frozenset[str]:
        """Its operators that some operator may not hold: what decides where it may be put."""
        if not self.forbid:
            return frozenset()
        found = (own for own, _ in nested_words(criterion, self.terminals))
        return frozenset(itertools.chain(*found)).intersection(
            itertools.chain(*self.forbid.values())
        )

    def speaks(self, criterion: Criterion) -> bool:
        """Whether a formula from elsewhere uses the words of this space alone."""
        words = {step.operator.name for step in steps(criterion)}
        inside = {step.operator.name for terminal in self.terminals for step in steps(terminal)}
        known = {*self.operators, *inside}
        return set(criterion.features) <= set(self.features) and words <= known


def _check_operator(word: str) -> None:
    try:
        is_known = word in OPERATORS
    except PruneZeroError as error:
        raise ValueError(str(error)) from error
    if not is_known:
        near = did_you_mean(word, OPERATORS) or "."
        raise ValueError(f"'{word}' is not a known operator{near} Known: {', '.join(OPERATORS)}")


def _example(key: str, value: Any, pattern: str) -> Recipe:
    """A recipe with this one choice.

    Raises:
        RecipeError: there is no such recipe.
    """
    fields = {"name": "example", "criterion": "abs(W)", "pattern": pattern, key: value}
    return validated(Recipe, fields, f"choices: {key}: {value}")


def _is_usable(key: str, value: Any, pattern: str) -> bool:
    try:
        _example(key, value, pattern)
    except RecipeError:
        return False
    return True


def search_spaces() -> dict[str, Path]:
    """The files of `search_spaces/`, by name."""
    return {path.stem: path for path in sorted(folder("search_spaces").glob("*.yaml"))}
