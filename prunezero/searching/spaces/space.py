"""SearchSpace: which formulas a search may write, their words and sizes; one YAML file each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from prunezero.formula.code import steps
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import WEIGHT_SIGNALS, costliest
from prunezero.formula.features import FEATURES
from prunezero.formula.ranking import AS_IT_IS
from prunezero.formula.reading import MAX_DEPTH, MAX_NODES
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import find_document, read_document, validated
from prunezero.pruning.recipes.recipe import Recipe, folder
from prunezero.searching.spaces.nesting import computed_words, nested_words
from prunezero.searching.spaces.space_choices import (
    competing_units,
    example,
    is_usable,
    signal_of,
)
from prunezero.searching.spaces.space_types import (
    Count,
    CountOrNone,
    Exponents,
    GradientWeights,
    Group,
    LayerPatterns,
    Nestings,
    Numbers,
    OpenChoices,
    Operators,
    Share,
    Signal,
    Terminals,
    Training,
    UnitWord,
)


class SearchSpace(BaseModel):
    """The words and sizes of formulas, and how large a generation of a search is.

    `signals` is the costliest signal that a rule may look at, one of WEIGHT_SIGNALS, by cost.
    Terminals and choices that look at costlier ones are left out when the space is read, and the
    space that is kept and shown lacks them: at `activations` no feature of gradients or of Gram
    matrices, no update `obs`, `admm` or `swaps`, and no damping. What the search itself measures
    goes without gradient weights then, and looks at Gram matrices for its layer error all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(min_length=1, max_length=100)
    source: str = ""
    note: str = ""
    # what is removed, a word of a recipe's `unit`; choices may offer numbers of it
    unit: UnitWord = "weight"
    # the costliest signal that a rule may look at
    signals: Signal = WEIGHT_SIGNALS[-1]
    # a training that every rule has, in which its units go: `schedule` and `recover` of a recipe
    training: Training = {}
    # leaves of a formula: features, or formulas of features
    terminals: Terminals
    operators: Operators
    # numbers a formula may add or multiply, and exponents of `power`
    constants: Numbers = ()
    exponents: Exponents = ()
    # operator: those that may not stand anywhere inside its arguments; PySR's nested_constraints.
    # A formula is looked at as it is computed: x**2 is sqr, x**0.5 is sqrt, x**-1 is div, x**3 is
    # sqr and mul, x - y is sub, sqrt(x) and log(x) hold the abs that they see. `power` means every
    # other exponent, and sqr and sqrt too. A terminal is one word, and not looked into.
    forbid: Nestings = {}
    # largest formula, in words and in nesting
    max_complexity: int = Field(default=20, ge=1, le=MAX_NODES)
    max_depth: int = Field(default=8, ge=1, le=MAX_DEPTH)
    # depth of a freshly drawn formula
    fresh_depth: int = Field(default=4, ge=1, le=8)
    # whether screening weighs the error of an output by its loss gradient: one backward pass, and
    # none where `signals` are cheaper
    weighted_by_gradient: GradientWeights = True
    # which weights compete, where the search does not choose it
    compare: Group = "row"
    # values that the search may give to other keys of its recipes; none: it finds formulas alone
    choices: OpenChoices = {}
    # layers, by pattern, whose share of the sparsity the search may change, in an allocation table;
    # those that the model lacks are left out, and N:M patterns have no shares
    ratios: LayerPatterns = ()
    # layers, by pattern, that the search may give a formula of their own; those that the model
    # lacks are left out, and of two patterns that match one layer the later one
    criteria: LayerPatterns = ()
    # candidates with a new mask in one generation
    generation: Count = 32
    # candidates that breed, the best by screening
    population: Count = 50
    # how many are drawn to find one parent
    tournament: Count = 5
    # populations that breed apart, but for a father from elsewhere and the best of every kind
    islands: Count = 2
    # share of children by crossover, by other choices, and fresh; the rest are mutants
    crossover: Share = 0.3
    chosen: Share = 0.2
    fresh: Share = 0.1
    # skeletons of each generation whose numbers are tuned, and how many numbers are tried for each
    tuned: CountOrNone = 2
    trials: Count = 30
    # candidates of each generation whose quick KL is taken (`glanced` in older files), and that are
    # measured on all search text
    quick_kl: Count = Field(default=6, validation_alias=AliasChoices("quick_kl", "glanced"))
    measured: Count = 2

    @model_validator(mode="after")
    def _has_exponents(self) -> SearchSpace:
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
    def load(cls, name: str | Path, *, signals: str | None = None) -> SearchSpace:
        """A space of `search_spaces/` by name, or any by the path of its file.

        Args:
            signals: stands in for those of the file.

        Raises:
            RecipeError: no such space, or faults in the file, all listed; or nothing is left of it.
        """
        path = find_document(name, search_spaces(), "search space")
        limit = {} if signals is None else {"signals": signals}
        return validated(cls, read_document(path) | limit, str(path))

    def decides(self) -> dict[str, Any]:
        """What of it decides how a search goes, as JSON."""
        found = self.model_dump(mode="json")
        # Journals began before there were others.
        if self.unit == "weight":
            del found["unit"]
        if not self.training:
            del found["training"]
        return found

    @property
    def features(self) -> tuple[str, ...]:
        """Every feature that some formula of the space may use."""
        used = {name for terminal in self.terminals for name in terminal.features}
        return tuple(name for name in FEATURES if name in used)

    @property
    def costliest_signal(self) -> str:
        """The costliest signal that a rule of the space can look at, whatever it may."""
        chosen = [
            signal_of(key, one, self.unit) for key, values in self.choices.items() for one in values
        ]
        return costliest([*(terminal.signal for terminal in self.terminals), *chosen])

    @property
    def widest_group(self) -> str:
        """The widest group of its recipes: what no mask can see there, none sees anywhere."""
        groups = [self.compare, *self.choices.get("compare", ())]
        if self.unit != "weight":
            units = self.choices.get("unit", (self.unit,))
            found = {competing_units(unit, one) for unit in units for one in groups}
            return next(word for word in (AS_IT_IS, "model", "group", "row") if word in found)
        widest = [group for group in ("model", "layer") if group in groups]
        inside = [group for group in groups if group != "row"]
        return [*widest, *inside, "row"][0]

    def choices_for(self, pattern: str) -> dict[str, tuple[Any, ...]]:
        """The values of each key that make a recipe of this pattern; keys with two or more."""
        # Inside an N:M pattern, only its own groups compete.
        usable = {
            key: tuple(value for value in values if is_usable(key, value, pattern, self.unit))
            for key, values in self.choices.items()
            if key != "compare" or pattern == "free"
        }
        return {key: values for key, values in usable.items() if len(values) > 1}

    def examples(self, pattern: str) -> list[Recipe]:
        """A recipe for every choice, whose needs are those of the whole space."""
        chosen = self.choices_for(pattern)
        return [example(key, value, pattern, self.unit) for key in chosen for value in chosen[key]]

    def holds(self, criterion: Criterion) -> bool:
        """Whether a formula ranks units, is small enough, and nests nothing that is forbidden."""
        # A formula of weights that is the same along a matrix would rank nothing in some groups.
        domain = UNITS[self.unit].domain
        is_ranking = (
            criterion.shape == "element" if self.unit == "weight" else domain.takes(criterion)
        )
        return (
            is_ranking
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


def search_spaces() -> dict[str, Path]:
    """The files of `search_spaces/`, by name."""
    return {path.stem: path for path in sorted(folder("search_spaces").glob("*.yaml"))}
