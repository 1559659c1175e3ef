"""What may a recipe choose at each arrow, and which numbers go with a word?

A choice is a word, or a word with its numbers: `update: obs`, `allocate: {owl: {spread: 0.1}}`.
A row of `WORDS` is all that is known of a word but its arithmetic, which is one function elsewhere
on this floor; whoever applies a recipe asks the row. No torch here, so that recipes can be read and
listed without it: a row names its function, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from prunezero.errors import did_you_mean
from prunezero.pruning.kinds import UNITS, UnitKind
from prunezero.pruning.recipes.documents import fault_in_words
from prunezero.pruning.recipes.training_options import Distil, Lora, Tune
from prunezero.pruning.recipes.word_options import (
    Admm,
    Dsnot,
    Evolve,
    HeavyTail,
    Iterative,
    Options,
    Owl,
    Permutation,
    Refit,
    Sensitivity,
    Slopes,
    Swaps,
    Table,
    WhileTraining,
)
from prunezero.pruning.recipes.word_row import Word
from prunezero.scoring.request import GROUPS

# Words that mean the same whatever is removed.
_EVERY = frozenset(UNITS)
# Words that take columns out of matrices.
_WIDTH = frozenset({"neuron", "head", "kv_group", "width"})
# Those without which a norm divides by another number, so that no zeros stand for them.
_STREAM = frozenset({"channel", "direction"})
_OF_DEPTH = frozenset(word for word, kind in UNITS.items() if kind.observer)
_GRAM = frozenset({"gram"})
_SEEN_BY_READERS = frozenset({"gram", "input_sum"})
_INPUTS = frozenset({"input_sum", "input_square_sum"})
_ALL_BLOCKS = "looks at all blocks before the first is pruned"
_TRAINS = "trains all blocks together"
_REORDERS = "reorders the model as a whole"

WORDS: dict[str, dict[str, Word]] = {
    "allocate": {
        "uniform": Word(
            Options,
            "every layer loses the same fraction",
            "allocation:uniform",
            is_usual=True,
            units=_EVERY,
        ),
        "owl": Word(
            Owl,
            "blocks with more outliers lose less",
            "allocation:owl",
            "activations",
            frozenset({"input_square_sum"}),
            whole_model=_ALL_BLOCKS,
        ),
        "sensitivity": Word(
            Sensitivity,
            "matrices with a larger trace of the Hessian lose less",
            "allocation:sensitivity",
            "gradients",
            needs_text=True,
            whole_model=_ALL_BLOCKS,
        ),
        "heavy_tail": Word(
            HeavyTail,
            "blocks with heavier-tailed spectra lose less",
            "allocation:heavy_tail",
            whole_model=_ALL_BLOCKS,
        ),
        "table": Word(Table, "ratios by layer pattern", "allocation:table"),
        "slopes": Word(
            Slopes,
            "groups that move the model less by themselves lose more",
            "unit_allocation:slopes",
            sums=_SEEN_BY_READERS,
            needs_text=True,
            whole_model=_ALL_BLOCKS,
            units=_WIDTH,
            tries=True,
        ),
        "evolve": Word(
            Evolve,
            "the best of many allocations by KL to the dense model",
            "unit_allocation:evolve",
            sums=_SEEN_BY_READERS,
            needs_text=True,
            whole_model=_ALL_BLOCKS,
            units=_WIDTH,
            tries=True,
        ),
    },
    "update": {
        "none": Word(
            Options,
            "weights that stay are not changed",
            "updates.mend:keep",
            is_usual=True,
            units=_EVERY,
        ),
        "obs": Word(
            Options,
            "optimal brain surgeon, column by column",
            "updates.mend:obs",
            "second order",
            _GRAM,
            order=1,
            mends=True,
        ),
        "admm": Word(
            Admm,
            "kept weights are fitted again to the outputs before",
            "updates.mend:admm",
            "second order",
            _GRAM,
            order=2,
            mends=True,
            sees_dense=True,
        ),
        "refit": Word(
            Refit,
            "least squares on the columns that stay",
            "updates.mend:refit_columns",
            "second order",
            _SEEN_BY_READERS,
            order=2,
            mends=True,
            sees_dense=True,
            units=_WIDTH,
        ),
        "bias": Word(
            Options,
            "biases take over the mean of what was removed",
            "updates.mend:take_over_mean",
            "activations",
            frozenset({"input_sum"}),
            order=3,
            sees_dense=True,
            needs_biases=True,
            units=_EVERY - _OF_DEPTH - _STREAM,
        ),
        "swaps": Word(
            Swaps,
            "the mask is improved by a row's best exchanges",
            "updates.mend:swaps",
            "second order",
            _GRAM,
            changes_mask=True,
        ),
        "dsnot": Word(
            Dsnot,
            "the mask is improved by DSnoT's exchanges",
            "updates.mend:refine_by_dsnot",
            "activations",
            _INPUTS,
            changes_mask=True,
        ),
    },
    "permute": {
        "none": Word(
            Options,
            "channels stay in their order",
            "permutation:stay",
            is_usual=True,
            units=_EVERY,
        ),
        "heuristic": Word(
            Permutation,
            "channels are dealt out to groups by importance",
            "permutation:deal_out",
            whole_model=_REORDERS,
        ),
        "assignment": Word(
            Permutation,
            "dealt out, then improved by linear sum assignment",
            "permutation:assign",
            whole_model=_REORDERS,
        ),
    },
    "schedule": {
        "one-shot": Word(
            Options, "one pruning step", "schedule:one_shot", is_usual=True, units=_EVERY
        ),
        "iterative": Word(
            Iterative,
            "several pruning steps of growing sparsity",
            "schedule:iterative",
            units=_EVERY - _OF_DEPTH - _STREAM,
            whole_model="prunes the model several times",
        ),
        "greedy": Word(
            Options,
            "one unit goes, and all others are scored anew, until enough are gone",
            "schedule:greedy",
            units=_OF_DEPTH,
            chooser="depth:one_by_one",
        ),
        "span": Word(
            Options,
            "neighbouring layers go, those that score lowest as a whole",
            "schedule:span",
            units=frozenset({"layer"}),
            chooser="depth:best_span",
        ),
        "while_training": Word(
            WhileTraining,
            "units go step by step while the recovery trains low-rank factors",
            "schedule:while_training",
            "gradients",
            units=_WIDTH,
            whole_model=_TRAINS,
            in_training=True,
        ),
    },
    "recover": {
        "none": Word(
            Options, "no training", "recovery.words:no_training", is_usual=True, units=_EVERY
        ),
        "tune": Word(
            Tune,
            "short fine-tuning with the mask held",
            "recovery.words:tune",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_EVERY - _STREAM,
        ),
        "lora": Word(
            Lora,
            "low-rank factors under the mask, merged into the weights",
            "recovery.words:lora",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_EVERY - _STREAM,
        ),
        "distil": Word(
            Distil,
            "towards the dense model's next-token distribution, with the mask held",
            "recovery.words:distil",
            "gradients",
            needs_text=True,
            whole_model=_TRAINS,
            units=_EVERY - _STREAM,
        ),
    },
}


# Choices that are a word or a number alone, for those who ask what there is.
PLAIN_WORDS = {
    "compare": {**GROUPS, "group": "units of one place, such as the neurons of one MLP"},
    "pattern": {
        "free": "zeros may stand anywhere",
        "N:M": "N of every M neighbouring weights are kept, such as 2:4",
    },
    "statistics": {
        "dense": "layers see the dense model",
        "sequential": "layers see the model as pruned so far, block by block",
    },
    "damping": {
        "0.01": "share of the mean Gram diagonal added before an inversion; above 0, at most 1"
    },
}


@dataclass(frozen=True)
class Choice:
    """A word with its numbers."""

    # the recipe's key, such as update
    arrow: str
    word: str
    options: Options

    @property
    def row(self) -> Word:
        """All that is known of the word."""
        return WORDS[self.arrow][self.word]

    @property
    def is_usual(self) -> bool:
        """Whether it is what recipes have that say nothing."""
        return self.row.is_usual

    @property
    def text(self) -> str:
        """The word, and in brackets the numbers that are not the usual ones."""
        return with_numbers(self.word, self.options)


@dataclass(frozen=True)
class Unit:
    """What a recipe removes, with its numbers."""

    word: str
    options: Options

    @property
    def row(self) -> UnitKind:
        """All that is known of such units."""
        return UNITS[self.word]

    @property
    def is_usual(self) -> bool:
        """Whether it is what recipes have that say nothing."""
        return self == Unit("weight", Options())

    @property
    def several(self) -> str:
        """What several of them are called."""
        return self.row.several

    @property
    def measure(self) -> str:
        """What a sparsity is a share of."""
        chosen: str = getattr(self.options, "measure", self.row.measure)
        return chosen

    @property
    def text(self) -> str:
        """The word, and in brackets the numbers that are not the usual ones."""
        return with_numbers(self.word, self.options)


def with_numbers(word: str, options: Options) -> str:
    """A word, and in brackets those of its numbers that are not the usual ones."""
    changed = options.model_dump(exclude_defaults=True)
    numbers = ", ".join(f"{key} {value}" for key, value in changed.items())
    return f"{word} ({numbers})" if numbers else word


class _Spelled(Protocol):
    """What a recipe spells by a word and its numbers."""

    @property
    def word(self) -> str: ...

    @property
    def options(self) -> Options: ...


class _Row(Protocol):
    """A row of a table of words, as far as reading one needs to know it."""

    @property
    def options(self) -> type[Options]:
        """The numbers that go with the word."""
        ...


def chosen(arrow: str, value: object) -> Choice:
    """The choice that a recipe's value at an arrow spells.

    Raises:
        ValueError: the word or one of its numbers is not known; said in words.
    """
    if isinstance(value, Choice):
        return value
    return Choice(arrow, *read_word(value, WORDS[arrow], "not a known word"))


def chosen_unit(value: object) -> Unit:
    """The unit that a recipe spells.

    Raises:
        ValueError: as `chosen`.
    """
    return value if isinstance(value, Unit) else Unit(*read_word(value, UNITS, "no kind of unit"))


def read_word(value: object, rows: Mapping[str, _Row], what: str) -> tuple[str, Options]:
    """The word and the numbers that a value spells.

    Args:
        what: a word that is in no row, in a sentence.

    Raises:
        ValueError: the word or one of its numbers is not known; said in words.
    """
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"a word, or one word with its numbers such as {{word: {{number: 1}}}}, is expected, "
            f"but got {value!r}"
        )
    ((word, numbers),) = value.items()
    if word not in rows:
        near = did_you_mean(str(word), rows) or "."
        raise ValueError(f"'{word}' is {what}{near} Known: {', '.join(rows)}")
    try:
        return word, rows[word].options.model_validate(numbers or {})
    except ValidationError as error:
        known = rows[word].options.model_fields
        faults = "; ".join(_fault(word, fault, known) for fault in error.errors())
        raise ValueError(faults) from error


def spelled(choice: _Spelled) -> str | dict[str, Any]:
    """How a recipe file spells a choice."""
    numbers = choice.options.model_dump(mode="json", exclude_defaults=True)
    return {choice.word: numbers} if numbers else choice.word


def chain(value: object) -> tuple[Choice, ...]:
    """The updates that a recipe names, in their order; `none` is no update.

    Raises:
        ValueError: as `chosen`, or an update stands twice or beside `none`.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    choices = tuple(chosen("update", part) for part in parts)
    words = [choice.word for choice in choices]
    if len(set(words)) < len(words) or ("none" in words and len(words) > 1) or not words:
        raise ValueError(f"each update may stand once, and none alone, but got {words}")
    places = [choice.row.order for choice in choices]
    if places != sorted(places):
        raise ValueError(f"updates stand in the order {_order_of_updates()}, but got {words}")
    return choices


def _order_of_updates() -> str:
    """The words in the order in which they may stand, in a sentence.

    The mask is settled among dense weights, then weights are mended, then biases follow.
    """
    rows = [(row.order, word) for word, row in WORDS["update"].items() if not row.is_usual]
    groups = groupby(sorted(rows, key=lambda row: row[0]), key=lambda row: row[0])
    return ", ".join(" or ".join(word for _, word in group) for _, group in groups)


def spelled_chain(choices: tuple[Choice, ...]) -> Any:
    """How a recipe file spells its updates."""
    parts = [spelled(choice) for choice in choices]
    return parts[0] if len(parts) == 1 else parts


def _fault(word: str, fault: Any, known: Mapping[str, FieldInfo]) -> str:
    where = ".".join(str(part) for part in (word, *fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = did_you_mean(str(fault["loc"][-1]), known) or "."
        return f"'{where}' is not a known number{near} Known: {', '.join(known) or 'none'}"
    if fault["type"] == "missing":
        number = fault["loc"][-1]
        return f"{word} needs its {number} ({known[number].description})"
    return f"{where}: {fault_in_words(fault)}"


def field_of(check: Callable[[object], Any], spell: Callable[[Any], Any]) -> Any:
    """What makes a type one that a recipe spells by words."""
    return (BeforeValidator(check), PlainSerializer(spell), WithJsonSchema({}))


Allocate = Annotated[Choice, *field_of(lambda value: chosen("allocate", value), spelled)]
Permute = Annotated[Choice, *field_of(lambda value: chosen("permute", value), spelled)]
Schedule = Annotated[Choice, *field_of(lambda value: chosen("schedule", value), spelled)]
Recover = Annotated[Choice, *field_of(lambda value: chosen("recover", value), spelled)]
UnitWord = Annotated[Unit, *field_of(chosen_unit, spelled)]
Update = Annotated[tuple[Choice, ...], *field_of(chain, spelled_chain)]
