"""What may a recipe choose at each arrow, and which numbers go with a word?

A choice is a word, or a word with its numbers: `update: obs`, `allocate: {owl: {spread: 0.1}}`.
Every row here has its function in the dict of the same words elsewhere on this floor
(`ALLOCATIONS`, `UPDATES`, ...); a test holds the two together. No torch here, so that recipes can
be read and listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from prunezero.errors import did_you_mean
from prunezero.pruning.recipes.documents import fault_in_words
from prunezero.pruning.recipes.word_options import (
    Admm,
    Dsnot,
    HeavyTail,
    Iterative,
    Options,
    Owl,
    Permutation,
    Sensitivity,
    Swaps,
    Table,
    Tune,
)


@dataclass(frozen=True)
class Word:
    """One word that a recipe may choose."""

    options: type[Options]
    meaning: str
    # what it looks at, one of `SIGNALS` of the vocabulary
    signal: str = "none"


WORDS: dict[str, dict[str, Word]] = {
    "allocate": {
        "uniform": Word(Options, "every layer loses the same fraction"),
        "owl": Word(Owl, "blocks with more outliers lose less", "activations"),
        "sensitivity": Word(
            Sensitivity, "matrices with a larger trace of the Hessian lose less", "gradients"
        ),
        "heavy_tail": Word(HeavyTail, "blocks with heavier-tailed spectra lose less"),
        "table": Word(Table, "ratios by layer pattern"),
    },
    "update": {
        "none": Word(Options, "weights that stay are not changed"),
        "obs": Word(Options, "optimal brain surgeon, column by column", "second order"),
        "admm": Word(Admm, "kept weights are fitted again to the outputs before", "second order"),
        "bias": Word(Options, "biases take over the mean of what was removed", "activations"),
        "swaps": Word(Swaps, "the mask is improved by a row's best exchanges", "second order"),
        "dsnot": Word(Dsnot, "the mask is improved by DSnoT's exchanges", "activations"),
    },
    "permute": {
        "none": Word(Options, "channels stay in their order"),
        "heuristic": Word(Permutation, "channels are dealt out to groups by importance"),
        "assignment": Word(Permutation, "dealt out, then improved by linear sum assignment"),
    },
    "schedule": {
        "one-shot": Word(Options, "one pruning step"),
        "iterative": Word(Iterative, "several pruning steps of growing sparsity"),
    },
    "recover": {
        "none": Word(Options, "no training"),
        "tune": Word(Tune, "short fine-tuning with the mask held", "gradients"),
    },
}


# Choices that are a word or a number alone, for those who ask what there is.
PLAIN_WORDS = {
    "compare": {
        "row": "weights of one output compete",
        "layer": "all weights of a matrix compete",
        "model": "all weights of the model compete",
        "N columns": "in each row, N neighbouring weights compete, such as 128 columns",
    },
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

# What must stand before what: the mask is settled among dense weights, then weights are mended, and
# biases take over what is left.
ORDER = {"swaps": 0, "dsnot": 0, "obs": 1, "admm": 2, "bias": 3}
# Updates that solve for the weights that stay. What they solve is so close to singular that the
# rounding of sums is seen in the result.
MENDING = frozenset({"obs", "admm"})


@dataclass(frozen=True)
class Choice:
    """A word with its numbers."""

    word: str
    options: Options

    @property
    def text(self) -> str:
        """The word, and in brackets the numbers that are not the usual ones."""
        changed = self.options.model_dump(exclude_defaults=True)
        numbers = ", ".join(f"{key} {value}" for key, value in changed.items())
        return f"{self.word} ({numbers})" if numbers else self.word


def chosen(arrow: str, value: object) -> Choice:
    """The choice that a recipe's value at an arrow spells.

    Raises:
        ValueError: the word or one of its numbers is not known; said in words.
    """
    if isinstance(value, Choice):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"a word, or one word with its numbers such as {{word: {{number: 1}}}}, is expected, "
            f"but got {value!r}"
        )
    ((word, numbers),) = value.items()
    if word not in WORDS[arrow]:
        near = did_you_mean(str(word), WORDS[arrow]) or "."
        raise ValueError(f"'{word}' is not a known word{near} Known: {', '.join(WORDS[arrow])}")
    try:
        return Choice(word, WORDS[arrow][word].options.model_validate(numbers or {}))
    except ValidationError as error:
        known = WORDS[arrow][word].options.model_fields
        faults = "; ".join(_fault(word, fault, known) for fault in error.errors())
        raise ValueError(faults) from error


def spelled(choice: Choice) -> str | dict[str, Any]:
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
    places = [ORDER.get(word, 0) for word in words]
    if places != sorted(places):
        raise ValueError(
            "updates stand in the order swaps or dsnot (they choose among dense weights), obs, "
            f"admm, bias, but got {words}"
        )
    return choices


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


def _field(check: Callable[[object], Any], spell: Callable[[Any], Any]) -> Any:
    return (BeforeValidator(check), PlainSerializer(spell), WithJsonSchema({}))


Allocate = Annotated[Choice, *_field(lambda value: chosen("allocate", value), spelled)]
Permute = Annotated[Choice, *_field(lambda value: chosen("permute", value), spelled)]
Schedule = Annotated[Choice, *_field(lambda value: chosen("schedule", value), spelled)]
Recover = Annotated[Choice, *_field(lambda value: chosen("recover", value), spelled)]
Update = Annotated[tuple[Choice, ...], *_field(chain, spelled_chain)]
