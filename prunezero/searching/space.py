"""Which formulas may a search write: the words, the numbers, the size; one YAML file each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from prunezero.errors import PruneZeroError, did_you_mean
from prunezero.formula.canonical import MAX_EXPONENT, number
from prunezero.formula.code import steps
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.formula.vocabulary import OPERATORS
from prunezero.pruning.documents import find_document, read_document, validated
from prunezero.pruning.recipe import Formula, folder
from prunezero.scoring.request import group_columns

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
    # largest formula, in words and in nesting
    max_complexity: PositiveInt = 20
    max_depth: PositiveInt = 8
    # depth of a freshly drawn formula
    fresh_depth: PositiveInt = 4
    # whether screening weighs the error of an output by its loss gradient: one backward pass
    weighted_by_gradient: bool = True
    # which weights compete in every recipe that the search writes
    compare: str = "row"
    # candidates with a new mask in one generation
    generation: PositiveInt = 32
    # candidates that breed, the best by screening
    population: PositiveInt = 50
    # how many are drawn to find one parent
    tournament: PositiveInt = 5
    # share of children by crossover, by tuning of constants, and fresh; the rest are mutants
    crossover: Share = 0.3
    tuned: Share = 0.2
    fresh: Share = 0.1
    # candidates of each generation that are measured on the model
    measured: PositiveInt = 2

    @field_validator("operators")
    @classmethod
    def _known_operators(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if word not in OPERATORS:
                near = did_you_mean(word, OPERATORS) or "."
                raise ValueError(
                    f"'{word}' is not a known operator{near} Known: {', '.join(OPERATORS)}"
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

    @field_validator("compare")
    @classmethod
    def _known_group(cls, value: str) -> str:
        try:
            group_columns(value)
        except PruneZeroError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _can_rank_weights(self) -> SearchSpace:
        if not any(terminal.shape == "element" for terminal in self.terminals):
            raise ValueError("terminals: none varies by weight, so no formula could rank weights")
        if "power" in self.operators and not self.exponents:
            raise ValueError("exponents: 'power' needs some, for example [0.5, 2]")
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

    def holds(self, criterion: Criterion) -> bool:
        """Whether a formula ranks weights and is small enough."""
        return (
            criterion.shape == "element"
            and criterion.complexity <= self.max_complexity
            and criterion.depth <= self.max_depth
        )

    def speaks(self, criterion: Criterion) -> bool:
        """Whether a formula from elsewhere uses the words of this space alone."""
        words = {step.operator.name for step in steps(criterion)}
        return set(criterion.features) <= set(self.features) and words <= set(self.operators)


def search_spaces() -> dict[str, Path]:
    """The files of `search_spaces/`, by name."""
    return {path.stem: path for path in sorted(folder("search_spaces").glob("*.yaml"))}
