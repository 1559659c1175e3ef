"""Choice: a word of a recipe with its numbers, as it is read from a file and spelled in one.

Which words there are stands in `words.py` and, of what may be removed, in `pruning/kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from prunezero.errors import did_you_mean
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import fault_in_words
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.recipes.word_row import Word
from prunezero.pruning.recipes.words import WORDS
from prunezero.pruning.unit_kind import UnitKind


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
