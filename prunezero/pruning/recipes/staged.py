"""What is a recipe of several stages: recipes of whole units that run one after another?

    stages:
    - recipe: minitron_neurons
    - {share: power, recipe: attention_greedy}

A stage is a published recipe by its name, or the body of one, and says how much of the asked
sparsity it takes; together they remove a share of the parameters of all blocks. Each looks at the
model as those before it left it. The stages of `docs/architecture.md`; who runs them is
`prunezero/pruning/staging.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from prunezero.errors import PruneZeroError, RecipeError, did_you_mean
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import costliest
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.choices import field_of, read_word, spelled, with_numbers
from prunezero.pruning.recipes.documents import (
    Document,
    find_document,
    read_document,
    validated,
)
from prunezero.pruning.recipes.recipe import TOLD_ONLY, Recipe, published_recipes
from prunezero.pruning.recipes.word_options import Options, Part, Power

# Kinds of units that cut rows and columns of the same matrices, or are one another's parts.
_SAME_ROWS = (
    frozenset({"neuron", "width", "direction"}),
    frozenset({"head", "kv_group", "width", "direction"}),
    frozenset({"attention", "block", "layer", "channel", "direction"}),
    frozenset({"mlp", "block", "layer", "channel", "direction"}),
)


@dataclass(frozen=True)
class ShareWord:
    """One word that a stage may choose for its share: all but the arithmetic."""

    options: type[Options]
    meaning: str
    code: str
    """where its function is, on this floor, as "module:name\""""

    @property
    def function(self) -> Callable[..., float | None]:
        """What says how many parameters a stage takes beforehand; None where it takes the rest."""
        module, _, name = self.code.partition(":")
        found: Callable[..., float | None] = getattr(
            import_module(f"prunezero.pruning.{module}"), name
        )
        return found


SHARES = {
    "rest": ShareWord(
        Options,
        "what other stages leave; several such stages lose one share of their units",
        "stage_shares:rest",
    ),
    "part": ShareWord(Part, "a part of what is asked for", "stage_shares:part"),
    "power": ShareWord(
        Power, "so many units as a power of the sparsity says", "stage_shares:power"
    ),
}


@dataclass(frozen=True)
class Share:
    """How much a stage takes of what is asked for, with its numbers."""

    word: str
    options: Options

    @property
    def row(self) -> ShareWord:
        """All that is known of the word."""
        return SHARES[self.word]

    @property
    def text(self) -> str:
        """The word, and in brackets the numbers that are not the usual ones."""
        return with_numbers(self.word, self.options)


def chosen_share(value: object) -> Share:
    """The share that a stage spells.

    Raises:
        ValueError: the word or one of its numbers is not known; said in words.
    """
    return value if isinstance(value, Share) else Share(*read_word(value, SHARES, "no share"))


class Stage(BaseModel):
    """One recipe of several, and what it takes of the sparsity that is asked for."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )

    share: Annotated[Share, *field_of(chosen_share, spelled)] = chosen_share("rest")
    recipe: Recipe

    @model_validator(mode="before")
    @classmethod
    def _as_spelled(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            raise ValueError(
                "a stage is {recipe: NAME}, or the body of a recipe, with its share beside it, but "
                f"got {value!r:.60}"
            )
        body = {str(key): part for key, part in value.items() if key != "share"}
        share = {"share": value["share"]} if "share" in value else {}
        if isinstance(body.get("recipe"), Recipe):
            return share | {"recipe": _without_tale(body["recipe"])}
        if "stages" in body:
            raise ValueError("a stage has no stages of its own; list them one after another")
        if "recipe" in body:
            body = _published(body)
        body.setdefault("name", _word_of(body.get("unit")))
        try:
            recipe = validated(Recipe, body, f"stage {body['name']}")
        except PruneZeroError as error:
            raise ValueError(str(error)) from error
        return share | {"recipe": _without_tale(recipe)}

    @model_serializer
    def _spelled(self) -> dict[str, Any]:
        return {"share": spelled(self.share), "name": self.recipe.name, **self.recipe.effect}


def _without_tale(recipe: Recipe) -> Recipe:
    """The recipe as far as it changes results, and its name."""
    usual = {name: Recipe.model_fields[name] for name in TOLD_ONLY - {"name"}}
    return recipe.model_copy(
        update={name: field.get_default(call_default_factory=True) for name, field in usual.items()}
    )


def _published(body: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a published recipe that a stage names.

    Raises:
        ValueError: there is none of that name, it has stages, or the stage says more beside it.
    """
    known, name = published_recipes(), body["recipe"]
    more = [key for key in body if key != "recipe"]
    if more:
        raise ValueError(
            f"a stage names a published recipe or has the keys of one, but not both, and beside "
            f"recipe stands {more[0]}"
        )
    if name not in known:
        near = did_you_mean(str(name), known) or "."
        raise ValueError(f"'{name}' is no published recipe{near} See `prunezero list recipes`")
    document = read_document(known[name])
    if "stages" in document:
        raise ValueError(f"{name} has stages of its own; list those")
    return document


def _word_of(unit: object) -> str:
    return str(next(iter(unit), "")) if isinstance(unit, Mapping) else str(unit or "weight")


@dataclass(frozen=True)
class StagedUnits:
    """What a recipe of several stages removes."""

    stages: tuple[Stage, ...]

    is_usual = False
    measure = "parameters"

    @property
    def word(self) -> str:
        """The kinds of units, in the order of the stages."""
        return "+".join(stage.recipe.unit.word for stage in self.stages)

    @property
    def text(self) -> str:
        """The kinds with their numbers, each with what its stage takes."""
        return ", then ".join(
            f"{stage.recipe.unit.text} by share {stage.share.text}" for stage in self.stages
        )

    @property
    def several(self) -> str:
        """What all units together are called."""
        *first, last = (stage.recipe.unit.several for stage in self.stages)
        return f"{', '.join(first)} and {last}"

    @property
    def zeros_suffice(self) -> bool:
        """Whether zeros in linear maps alone make the model compute as if units were gone."""
        return all(stage.recipe.unit.row.edit.zeros_suffice for stage in self.stages)


class StagedRecipe(Document):
    """Recipes of whole units, one after another on the same model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str = Field(min_length=1, max_length=100)
    source: str = ""
    stages: tuple[Stage, ...]
    published: tuple[dict[str, Any], ...] = ()
    note: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("stages", "published", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _can_be_composed(self) -> StagedRecipe:
        for fault in _faults_of(self.stages):
            raise ValueError(fault)
        return self

    @property
    def unit(self) -> StagedUnits:
        """What all stages remove."""
        return StagedUnits(self.stages)

    @property
    def pattern(self) -> str:
        """What N:M pattern is left: units that go leave none."""
        return "free"

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes of the stages, in their order."""
        return tuple(stage.recipe for stage in self.stages)

    @property
    def text(self) -> str:
        """All formulas on one line."""
        return "; then ".join(f"{one.unit.word}: {one.text}" for one in self.recipes)

    @property
    def formulas(self) -> tuple[Criterion, ...]:
        """The criteria of the stages."""
        return tuple(one.criterion for one in self.recipes)

    @property
    def compare(self) -> str:
        """Who competes, of each stage."""
        return ", then ".join(one.compare for one in self.recipes)

    @property
    def signal(self) -> str:
        """The costliest signal that some stage looks at."""
        return costliest(one.signal for one in self.recipes)

    @property
    def mends(self) -> bool:
        """Whether some stage solves for weights that stay."""
        return any(one.mends for one in self.recipes)

    def with_recipes(self, recipes: tuple[Recipe, ...]) -> StagedRecipe:
        """The same stages with other recipes, checked like any.

        Raises:
            RecipeError: they cannot be composed.
        """
        stages = [
            {"share": stage.share, "recipe": recipe}
            for stage, recipe in zip(self.stages, recipes, strict=True)
        ]
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return validated(StagedRecipe, fields | {"stages": stages}, f"recipe {self.name}")


AnyRecipe = Recipe | StagedRecipe


def recipes_of(recipe: AnyRecipe) -> tuple[Recipe, ...]:
    """The recipes of all its stages; a recipe without stages is the one."""
    return (recipe,) if isinstance(recipe, Recipe) else recipe.recipes


def load_recipe(name: str | Path) -> AnyRecipe:
    """A published recipe by name, or any by the path of its file; it may have stages.

    Raises:
        RecipeError: as `Recipe.load`.
    """
    if Path(name).suffix != ".json":
        path = find_document(name, published_recipes(), "recipe")
        document = read_document(path)
        if "stages" in document:
            return validated(StagedRecipe, document, str(path))
    return Recipe.load(name)


def refuse_stages(recipe: AnyRecipe, why: str) -> Recipe:
    """The recipe, if it has no stages.

    Raises:
        RecipeError: it has; the sentence goes on with the reason.
    """
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError(
        f"recipe {recipe.name} has stages ({recipe.unit.word.replace('+', ', then ')}), {why}"
    )


def _faults_of(stages: tuple[Stage, ...]) -> Iterator[str]:
    """Why stages cannot be composed, in a sentence each."""
    words = [stage.recipe.unit.word for stage in stages]
    if len(words) < 2:
        yield f"a recipe has two stages or more, but got {len(words)}; leave stages out for one"
    if "weight" in words:
        yield (
            "stages remove whole units, and one of these has unit: weight, whose zeros make "
            "nothing smaller; prune the saved model by that recipe"
        )
    if "expert" in words:
        yield (
            "unit: expert cannot be a stage, since no zeros stand for experts that are gone, and "
            "other stages look at the model with zeros in the place of what went; prune the saved "
            "model by the other recipes"
        )
    for word in words:
        if UNITS[word].domain.is_run_time:
            yield (
                f"unit: {word} is left out while a model runs, so it is no stage of a pruning; "
                "prune by the other stages, and compare this recipe on the saved model"
            )
    for word in words:
        if words.count(word) > 1:
            yield (
                f"two stages have unit: {word}; one recipe of it with schedule: iterative looks "
                "at the model as pruned so far, too"
            )
    for same in _SAME_ROWS:
        both = [word for word in words if word in same]
        if len(both) > 1:
            yield (
                f"unit: {both[0]} and unit: {both[1]} cannot be stages of one recipe, since what "
                "one of them removes is part of the other, or leaves the model in another way"
            )
    if "channel" in words[:-1]:
        yield (
            "unit: channel has to be the last stage, since no zeros stand for channels that are "
            "gone, and later stages look at the model with zeros in the place of what went"
        )
    for stage in stages:
        one = stage.recipe
        is_uneven = one.competes_freely and not one.unit.row.is_of_depth
        if {"channel", "layer"} & set(words) and is_uneven:
            yield (
                f"layers would keep different numbers of {one.unit.row.several}, which no "
                "configuration says of a model that loses channels or layers too; use compare: "
                f"group and allocate: uniform in the stage of unit: {one.unit.word}"
            )
        if one.unit.measure != "parameters":
            yield (
                f"stages share parameters, but unit: {one.unit.word} counts {one.unit.measure}; "
                "leave its measure out"
            )
    yield from _faults_of_shares(stages)


def _faults_of_shares(stages: tuple[Stage, ...]) -> Iterator[str]:
    rests = sum(stage.share.word == "rest" for stage in stages)
    parts = sum(getattr(stage.share.options, "of", 0.0) for stage in stages)
    has_power = any(stage.share.word == "power" for stage in stages)
    if rests == 0 and (abs(parts - 1) > 1e-9 or has_power):
        yield (
            f"no stage takes the rest, and the parts of the others are {parts:g} of what is asked "
            "for; leave the share of one stage out"
        )
    if rests and parts >= 1:
        yield f"parts of {parts:g} leave nothing of what is asked for to the other stages"
