"""What a recipe is: one choice at each arrow from formula to smaller model, as a YAML file.

    formula -> scores -> mask -> mended weights -> measured model

`baselines/*.yaml` are recipes that people published; a search writes recipes; `prunezero prune`
takes either. The sparsity is an argument, never part of a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from prunezero.errors import (
    CriterionError,
    PruneZeroError,
    RecipeError,
    reason,
)
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import costliest
from prunezero.formula.features import FEATURES
from prunezero.models.anatomy.patterns import fitting
from prunezero.pruning.recipes.choices import (
    Allocate,
    Choice,
    Permute,
    Recover,
    Schedule,
    Unit,
    UnitWord,
    Update,
    chosen,
    chosen_unit,
)
from prunezero.pruning.recipes.documents import (
    MAX_BYTES,
    MOST_WORDS,
    Document,
    LayerPattern,
    LayerPatterns,
    checked,
    find_document,
    read_document,
    validated,
)
from prunezero.pruning.recipes.measured_rows import check_provenance
from prunezero.pruning.recipes.training_options import LowRank, Training
from prunezero.pruning.recipes.word_options import Iterative, Periods
from prunezero.scoring.request import parse_pattern

STATISTICS = ("dense", "sequential")


def _criterion(value: object) -> Criterion:
    if isinstance(value, Criterion):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a formula such as abs(W) * X is expected, but got {value!r}")
    try:
        return Criterion.parse(value)
    except PruneZeroError as error:
        raise ValueError(str(error)) from error


Formula = Annotated[
    Criterion,
    BeforeValidator(_criterion),
    PlainSerializer(lambda criterion: criterion.text),
    WithJsonSchema({"type": "string"}),
]


def refuse_features(unit: Unit, criterion: Criterion) -> None:
    """Refuse a formula that looks at what a recipe's units do not have.

    Raises:
        CriterionError: names the feature.
    """
    fault = unit.options.fault_of([FEATURES[name] for name in criterion.features])
    if fault:
        raise CriterionError(f"criterion {criterion.text}: {fault}")


# Keys that change no result.
TOLD_ONLY = {"schema_version", "name", "source", "published", "note", "provenance"}


class Recipe(Document):
    """How to prune a model: a criterion and the choices around it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        arbitrary_types_allowed=True,
        populate_by_name=True,
    )

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str = Field(min_length=1, max_length=100)
    # paper, arXiv number; or the search that found it
    source: str = ""
    # the formula: the lowest values go first
    criterion: Formula
    # formulas of some layers instead: full name, last parts of it, or re:PATTERN; none fits two
    criteria: Annotated[dict[LayerPattern, Formula], MOST_WORDS] = Field(default_factory=dict)
    # what may be removed, one of UNITS, with its numbers
    unit: UnitWord = chosen_unit("weight")
    # which weights compete: row, layer, model or N columns; of units: group or model
    compare: str = "row"
    # how much each layer loses
    allocate: Allocate = chosen("allocate", "uniform")
    # free, or N:M to keep N of every M consecutive weights
    pattern: str = "free"
    # whether input channels are put into another order before an N:M mask is chosen
    permute: Permute = chosen("permute", "none")
    # inputs of the dense model in one pass, or of the model as pruned so far, block by block
    statistics: Literal["dense", "sequential"] = "dense"
    # share of the mean Gram diagonal that is added before an inversion, at least
    damping: float = Field(default=0.01, gt=0, le=1)
    # how the weights that stay are mended: one update, or several in their order
    update: Update = (chosen("update", "none"),)
    # in how many steps the sparsity is reached, and what follows each of them
    schedule: Schedule = chosen("schedule", "one-shot")
    recover: Recover = chosen("recover", "none")
    # layers to prune and to leave alone: full name, last parts of it, or re:PATTERN
    targets: LayerPatterns = ()
    ignore: LayerPatterns = ()
    # results in the source, with model, sparsity and sequence length
    published: tuple[dict[str, Any], ...] = ()
    # what a reader should know
    note: str = ""
    # where a found recipe comes from, and what was measured
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _as_written_before(cls, value: object) -> object:
        # Files once held the command of their first line under a key as well.
        if isinstance(value, Mapping):
            return {key: part for key, part in value.items() if key != "command"}
        return value

    @field_validator("targets", "ignore", "published", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("provenance")
    @classmethod
    def _with_rows(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_provenance(value)
        return value

    @field_validator("compare")
    @classmethod
    def _known_group(cls, value: str, info: ValidationInfo) -> str:
        unit = info.data.get("unit")
        if not isinstance(unit, Unit):
            # It was refused already.
            return value
        return checked(partial(unit.row.axes_of, pattern="free"), value)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        return checked(parse_pattern, value)

    @model_validator(mode="after")
    def _fits_its_unit(self) -> Recipe:
        kind = self.unit.row
        if self.criteria and kind.domain.name != "matrix":
            raise ValueError(
                f"criteria: they rank single weights of some layers, so unit: {kind.word} has one "
                "criterion for all"
            )
        try:
            competing = kind.axes_of(self.compare, self.pattern)
            for criterion in self.formulas:
                kind.domain.refuse(criterion)
                refuse_features(self.unit, criterion)
        except PruneZeroError as error:
            raise ValueError(str(error)) from error
        for criterion in self.formulas:
            # Ties would go from the left: a mask that looks like one and says nothing. One number
            # for a whole layer is refused where it is scored, by the name of the layer.
            if criterion.shape != "scalar" and not kind.domain.ranks(criterion.shape, competing):
                raise ValueError(
                    f"criterion {criterion.text} is the same for all weights of a row, so it "
                    "ranks nothing there; use a feature that varies along the row, or compare: "
                    "layer"
                )
        return self

    @model_validator(mode="after")
    def _speaks_of_its_unit(self) -> Recipe:
        for choice in self.choices:
            if self.unit.word not in choice.row.units:
                known = ", ".join(sorted(choice.row.units))
                raise ValueError(
                    f"{choice.arrow}: {choice.word} is for unit {known}, not for {self.unit.word}"
                )
        for name in dict.fromkeys(name for one in self.formulas for name in one.features):
            kinds = FEATURES[name].kinds
            if kinds and self.unit.word not in kinds:
                raise ValueError(
                    f"feature {name} is for unit {', '.join(kinds)}, not for {self.unit.word}"
                )
        if getattr(self.unit.options, "swaps", 0) and "refit" not in self.updates:
            raise ValueError(
                f"unit: {self.unit.word}: swaps lowers what is lost once columns are refitted, so "
                "it needs update: refit"
            )
        if self._stretches and not self.schedule.is_usual:
            raise ValueError(
                f"unit: {self.unit.word}: normalise: slope looks at the units that go first, which "
                f"later steps of schedule: {self.schedule.word} no longer have; use schedule: "
                "one-shot, or another word at normalise"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.pattern != "free" and not self.allocate.is_usual:
            raise ValueError(
                f"pattern {self.pattern} takes the same share of every layer, so it cannot be "
                f"allocated by {self.allocate.word}; use allocate: uniform, or pattern: free"
            )
        if self.pattern == "free" and not self.permute.is_usual:
            raise ValueError(
                f"permute: {self.permute.word} needs an N:M pattern; with pattern: free the order "
                "of channels changes nothing"
            )
        if self.pattern != "free" and not self.schedule.is_usual:
            raise ValueError(
                f"schedule: {self.schedule.word} passes through other sparsities than the one that "
                f"pattern {self.pattern} fixes; use schedule: one-shot, or pattern: free"
            )
        refining = [choice.word for choice in self.update if choice.row.changes_mask]
        if not self.schedule.is_usual and refining:
            raise ValueError(
                f"update: {' and '.join(sorted(refining))} brings removed weights back, which "
                f"later steps of schedule: {self.schedule.word} no longer have; use schedule: "
                "one-shot"
            )
        if self.schedule.word == "subsets" and (
            self.criterion.text != "LOO" or self.compare != "group"
        ):
            raise ValueError(
                "schedule: subsets measures the loss of whole subsets of each mixture's experts, "
                "which of one expert is LOO; use criterion: LOO and compare: group"
            )
        if getattr(self.unit.options, "sums", None) and (
            self.statistics != "dense" or self.schedule.word == "subsets"
        ):
            raise ValueError(
                f"unit: {self.unit.word}: guard and instead look at all mixtures before the first "
                "loses an expert, so they need statistics: dense and schedule: one-shot"
            )
        is_at_once = self.statistics == "dense" and self.schedule.is_usual
        if self.unit.word == "expert" and self.allocate.row.tries and not is_at_once:
            raise ValueError(
                f"allocate: {self.allocate.word} tries experts of the dense model by their scores, "
                "so it needs statistics: dense and schedule: one-shot"
            )
        if self.compare == "model" and not self.allocate.is_usual:
            raise ValueError(
                "compare: model lets all layers compete, so it says itself how much each loses; "
                "use allocate: uniform"
            )
        return self

    @model_validator(mode="after")
    def _trains_as_it_prunes(self) -> Recipe:
        for name in self.features:
            needed = FEATURES[name].schedule
            if needed not in ("", self.schedule.word):
                whose = "low-rank factors" if needed == "while_training" else "units"
                raise ValueError(
                    f"feature {name} looks at {whose} while they train, so it needs schedule: "
                    f"{needed}"
                )
        if not self.schedule.row.in_training:
            return self
        options, what = self.recover.options, f"schedule: {self.schedule.word}"
        has_factors = isinstance(options, LowRank) and getattr(options, "through", "lora") == "lora"
        needs_factors = self.schedule.options.of_factors()
        if needs_factors and not has_factors:
            raise ValueError(
                f"{what} {needs_factors}, so it needs recover: lora, or distil through lora"
            )
        if self.recover.is_usual:
            raise ValueError(
                f"{what} takes units out of a training, so it needs recover: tune, lora or distil"
            )
        if isinstance(options, Training) and options.patience:
            raise ValueError(
                f"{what} needs all steps of recover: {self.recover.word}, so patience, by which "
                "they may end early, has to be 0"
            )
        others = [one for one in self.update if not one.is_usual]
        others += [self.allocate] if self.allocate.row.tries else []
        if others:
            raise ValueError(
                f"{others[0].arrow}: {others[0].word} looks at units that go at once, and by "
                f"{what} they go while weights change"
            )
        if self.statistics != "dense":
            raise ValueError(f"{what} has no walk over the blocks, so it needs statistics: dense")
        return self

    def on_unit(self, word: str) -> Recipe:
        """The same recipe for other units; numbers of its own unit go along, where both have them.

        Raises:
            RecipeError: the recipe says nothing of such units.
        """
        if word == self.unit.word:
            return self
        numbers = self.unit.options.model_dump(exclude_defaults=True)
        fields = self.model_dump(by_alias=True) | {"unit": {word: numbers}}
        return validated(Recipe, fields, f"recipe {self.name}")

    @property
    def formulas(self) -> tuple[Criterion, ...]:
        """The criterion, then those that some layers have instead, or that choose beside it."""
        others = (*self.criteria.values(), *self.unit.options.formulas)
        return tuple(dict.fromkeys((self.criterion, *others)))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that its scores are made from, by formulas or around them."""
        of_formulas = [name for one in self.formulas for name in one.features]
        return tuple(dict.fromkeys([*of_formulas, *(["SLOPE"] if self._stretches else [])]))

    @property
    def _stretches(self) -> bool:
        """Whether scores are stretched to what was measured of the first units of each place."""
        return getattr(self.unit.options, "normalise", "") == "slope"

    @property
    def text(self) -> str:
        """All its formulas on one line."""
        return "; ".join([self.criterion.text, *with_patterns(self.criteria)])

    def criterion_of(self, layer: str) -> Criterion:
        """The formula that ranks the weights of the layer of this name."""
        return fitting(self.criteria, layer, self.criterion)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What it chooses around the formula and its group, in the order of the work."""
        return (self.allocate, *self.update, self.permute, self.schedule, self.recover)

    @property
    def updates(self) -> tuple[str, ...]:
        """The words of the updates, in their order; none is no word."""
        return tuple(choice.word for choice in self.update if not choice.is_usual)

    @property
    def effect(self) -> dict[str, Any]:
        """What of it changes results, in the spelling of its YAML; what is usual is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude=TOLD_ONLY, exclude_defaults=True)

    @property
    def mends(self) -> bool:
        """Whether weights that stay are solved for, so that rounding is seen in the result."""
        return any(choice.row.mends for choice in self.update)

    @property
    def competes_freely(self) -> bool:
        """Whether how much each group loses shows only when all of them have been looked at."""
        return self.compare == "model" or self.allocate.row.tries

    @property
    def tries(self) -> bool:
        """Whether something is measured on trial: how far a model moves without some units."""
        is_probed = isinstance(self.schedule.options, Periods) and self.schedule.options.protect > 0
        return self.allocate.row.tries or "SLOPE" in self.features or is_probed

    @property
    def looks_anew(self) -> bool:
        """Whether each step of its schedule looks at the model as pruned so far."""
        return isinstance(self.schedule.options, Iterative) and self.schedule.options.anew

    def trains_after(self, step: int, steps: int) -> bool:
        """Whether a training follows one of so many pruning steps, the first of which is 0."""
        options = self.recover.options
        return isinstance(options, Training) and options.follows(step, steps)

    @property
    def needs_biases(self) -> bool:
        """Whether an update changes biases, so that all layers that are pruned must have them."""
        return any(choice.row.needs_biases for choice in self.update)

    @property
    def extras(self) -> tuple[Choice, ...]:
        """The choices around the formula and its group that are not the usual ones."""
        return tuple(choice for choice in self.choices if not choice.is_usual)

    @property
    def signal(self) -> str:
        """The costliest signal that the criterion and the choices around it look at."""
        signals = [choice.row.cost for choice in self.choices]
        return costliest([*signals, *(FEATURES[name].cost for name in self.features)])

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """A published recipe by name, or any recipe by the path of its file.

        A .json file is read as a tree of Pruner-Zero, see `from_pruner_zero`.

        Raises:
            RecipeError: no such recipe (the message names the nearest), or faults in the file.
        """
        if Path(name).suffix == ".json":
            return cls.from_pruner_zero(Path(name))
        path = find_document(name, published_recipes(), "recipe")
        document = read_document(path)
        if "stages" in document:
            raise RecipeError(
                f"{path} is a recipe of several stages, and one without stages is needed here; "
                "name one, or read it by load_recipe"
            )
        return validated(cls, document, str(path))

    @classmethod
    def from_pruner_zero(cls, path: Path) -> Recipe:
        """The recipe of a tree in Pruner-Zero's JSON form, compared by rows as its paper does.

        Raises:
            RecipeError: the file cannot be read, or holds no such tree.
        """
        try:
            with path.open("rb") as file:
                tree = json.loads(file.read(MAX_BYTES))
            criterion = Criterion.from_pruner_zero(tree)
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path} cannot be read as JSON: {reason(error, path)}") from error
        except CriterionError as error:
            raise RecipeError(f"{path}: {error}") from error
        source = "a tree in the form of Pruner-Zero, arXiv:2406.02924"
        fields = {"name": path.stem, "source": source, "criterion": criterion}
        return validated(cls, fields, str(path))


def with_patterns(criteria: Mapping[str, Criterion]) -> list[str]:
    """Each formula of some layers behind their pattern."""
    return [f"{pattern}: {criterion.text}" for pattern, criterion in criteria.items()]


def folder(name: Literal["baselines", "search_spaces"]) -> Path:
    """Where the YAML files of that kind are: inside an installed package, or in the checkout."""
    package = Path(__file__).resolve().parents[2]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def published_of(unit: str) -> list[Recipe]:
    """The recipes of `baselines/` that remove such units alone, in the order of their names."""
    documents = {str(path): read_document(path) for path in published_recipes().values()}
    found = [
        validated(Recipe, document, path)
        for path, document in documents.items()
        if "stages" not in document
    ]
    return [recipe for recipe in found if recipe.unit.word == unit]


def published_recipes() -> dict[str, Path]:
    """The files of `baselines/`, by recipe name."""
    return {path.stem: path for path in sorted(folder("baselines").glob("*.yaml"))}
