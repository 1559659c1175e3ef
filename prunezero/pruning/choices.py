"""What may a recipe choose at each arrow, and which numbers go with a word?

A choice is a word, or a word with its numbers: `update: obs`, `allocate: {owl: {spread: 0.1}}`.
Every row here has its function in the dict of the same words elsewhere on this floor
(`ALLOCATIONS`, `UPDATES`, ...); a test holds the two together. No torch here, so that recipes can
be read and listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from prunezero.errors import did_you_mean


class Options(BaseModel):
    """The numbers of a word that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Owl(Options):
    """Outlier-weighed layer-wise sparsity, Yin et al. 2024 (ICML), arXiv:2310.05175."""

    # an outlier's score is this many times the mean of its block
    outlier: float = Field(default=5.0, gt=1)
    # kept fractions of blocks span twice this, before the whole is moved to the budget
    spread: float = Field(default=0.08, ge=0, lt=1)


class Sensitivity(Options):
    """Mixed sparsity by the trace of the loss's Hessian, Shao et al. 2024, arXiv:2310.09499."""

    # kept fractions of matrices span twice this, before the whole is moved to the budget
    spread: float = Field(default=0.1, ge=0, lt=1)
    # calibration sequences, and random vectors for each
    sequences: int = Field(default=4, ge=1)
    samples: int = Field(default=1, ge=1)


class HeavyTail(Options):
    """AlphaPruning: power-law exponents of weight spectra, Lu et al. 2024, arXiv:2410.10912."""

    # a block's sparsity is scaled by 1 - spread to 1 + spread
    spread: float = Field(default=0.3, ge=0, lt=1)


class Table(Options):
    """Ratios by layer pattern, scaled so that the model as a whole loses what was asked for."""

    # removed share relative to other layers, by pattern; the last that matches counts, others are 1
    ratios: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class Admm(Options):
    """Re-fit of the kept weights, Boža 2024 (TMLR), arXiv:2401.02938."""

    iterations: int = Field(default=20, ge=1)
    # share of the mean diagonal added to the scaled Gram matrix
    damping: float = Field(default=0.1, gt=0)
    # strength of the pull towards the mask
    rho: float = Field(default=1.0, gt=0)


class Swaps(Options):
    """Exchanges of a kept and a removed weight of a row that lower its output error the most."""

    # exchanges per row at most
    swaps: int = Field(default=50, ge=1)


class Dsnot(Options):
    """Dynamic sparse no training, Zhang et al. 2024 (ICLR), arXiv:2310.08915."""

    cycles: int = Field(default=50, ge=1)
    # a row whose expected error is smaller is left alone
    threshold: float = Field(default=0.1, ge=0)
    # the growing criterion divides by the variance to this power
    power: float = Field(default=1.0, ge=0)


class Permutation(Options):
    """Which layers' input channels are put into another order before an N:M mask is chosen."""

    # layers to permute, as in `targets`; if empty, all whose order neighbours can follow
    layers: tuple[str, ...] = ()
    # permute the masks alone: measures accuracy, and the saved model is not N:M in memory
    simulate: bool = False


class Iterative(Options):
    """Several pruning steps of growing sparsity."""

    steps: int = Field(default=4, ge=2)
    # removed share after step k of n: k/n, or 1 - (1 - k/n)^3 (Zhu & Gupta 2017, arXiv:1710.01878)
    shape: Literal["linear", "cubic"] = "cubic"


class Tune(Options):
    """Short fine-tuning of the weights that stay, after each pruning step; the mask is held."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0)
    # training sequences after each pruning step
    sequences: int = Field(default=128, ge=1)
    # sequences whose gradients are added up for one step of the optimizer
    batch: int = Field(default=4, ge=1)


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


# What must stand before what: the mask is settled among dense weights, then weights are mended, and
# biases take over what is left.
ORDER = {"swaps": 0, "dsnot": 0, "obs": 1, "admm": 2, "bias": 3}


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


def _fault(word: str, fault: Any, known: Iterable[str]) -> str:
    where = ".".join(str(part) for part in (word, *fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"'{where}' is not a known number; known: {', '.join(known) or 'none'}"
    return f"{where}: {fault['msg']}"


def _field(check: Callable[[object], Any], spell: Callable[[Any], Any]) -> Any:
    return (BeforeValidator(check), PlainSerializer(spell), WithJsonSchema({}))


Allocate = Annotated[Choice, *_field(lambda value: chosen("allocate", value), spelled)]
Permute = Annotated[Choice, *_field(lambda value: chosen("permute", value), spelled)]
Schedule = Annotated[Choice, *_field(lambda value: chosen("schedule", value), spelled)]
Recover = Annotated[Choice, *_field(lambda value: chosen("recover", value), spelled)]
Update = Annotated[tuple[Choice, ...], *_field(chain, spelled_chain)]
