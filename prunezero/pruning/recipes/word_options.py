"""Which numbers go with the words that a recipe chooses, what do they mean, and what may they be?

One class for each word that has numbers; `words.WORDS` says where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import Feature
from prunezero.pruning.recipes.documents import MOST_WORDS, LayerPattern, LayerPatterns


class Options(BaseModel):
    """The numbers of a word that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """What they say of the groups of units of a block, by the fields of `Group`.

        Args:
            block: its index.
            blocks: how many the model has.
        """
        return {}

    def fault_of(self, features: Sequence[Feature]) -> str:
        """Why units so chosen do not have what a formula looks at; nothing where they do."""
        return ""

    def of_factors(self) -> str:
        """What they do with low-rank factors in training; nothing where they need none."""
        return ""

    @property
    def formulas(self) -> tuple[Criterion, ...]:
        """Formulas that choose beside the recipe's own."""
        return ()

    @classmethod
    def described(cls) -> list[str]:
        """One line for each number: its usual value, its range, and what it does."""
        return [_described(name, field) for name, field in cls.model_fields.items()]


class Subsets(Options):
    """Subsets of experts by what their layer's output loses, Lu et al. 2024, arXiv:2402.14800."""

    most: int = Field(
        default=2_000,
        ge=1,
        le=10**9,
        description="subsets of one mixture that are all tried; where there are more, experts go "
        "one by one and are then exchanged",
    )
    swaps: int = Field(
        default=100, ge=0, le=10**6, description="exchanges at most, where they went one by one"
    )


class Owl(Options):
    """Outlier-weighed layer-wise sparsity, Yin et al. 2024 (ICML), arXiv:2310.05175."""

    outlier: float = Field(
        default=5.0,
        gt=1,
        le=1e6,
        description="an outlier's score is this many times the mean of its block",
    )
    spread: float = Field(
        default=0.08, ge=0, lt=1, description="kept fractions of blocks span twice this"
    )


class Sensitivity(Options):
    """Mixed sparsity by the trace of the loss's Hessian, Shao et al. 2024, arXiv:2310.09499."""

    spread: float = Field(
        default=0.1, ge=0, lt=1, description="kept fractions of matrices span twice this"
    )
    sequences: int = Field(
        default=4, ge=1, le=100_000, description="calibration sequences to look at"
    )
    samples: int = Field(default=1, ge=1, le=1000, description="random vectors for each sequence")


class HeavyTail(Options):
    """AlphaPruning: power-law exponents of weight spectra, Lu et al. 2024, arXiv:2410.10912."""

    spread: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="a block's sparsity is scaled by 1 - spread to 1 + spread",
    )


class Table(Options):
    """Ratios by layer pattern, scaled so that the model as a whole loses what was asked for."""

    ratios: Annotated[dict[LayerPattern, Annotated[float, Field(ge=0, le=1e6)]], MOST_WORDS] = (
        Field(
            min_length=1,
            description="removed share relative to other layers, by layer pattern, such as "
            "{mlp: 1.2, 'layers.0': 0.5}; the last that matches counts, other layers have 1",
        )
    )


class Slopes(Options):
    """What each group costs by itself, measured by KL to the dense model on calibration text."""

    steps: int = Field(
        default=16,
        ge=1,
        le=10_000,
        description="parts that the largest group is taken away in, or fewer of a unit each",
    )
    windows: int = Field(default=4, ge=1, le=100_000, description="calibration windows to look at")


class Evolve(Slopes):
    """Level switches by KL, Sieberling et al. 2024, EvoPress, arXiv:2410.14649."""

    evaluations: int = Field(
        default=200, ge=2, le=10**6, description="allocations measured, beside each group's own"
    )
    offspring: int = Field(default=16, ge=1, le=10_000, description="children of a generation")
    first_windows: int = Field(
        default=4, ge=1, le=100_000, description="calibration windows that all of them see"
    )
    windows: int = Field(
        default=16, ge=1, le=100_000, description="calibration windows that the best of them see"
    )
    proposals: Literal["fitted", "random"] = Field(
        default="fitted",
        description="whether steps move as costs say that are fitted to all measurements, or at "
        "random",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of chance")


class Admm(Options):
    """Re-fit of the kept weights, Boža 2024 (TMLR), arXiv:2401.02938."""

    iterations: int = Field(default=20, ge=1, le=10_000, description="steps of the re-fit")
    damping: float = Field(
        default=0.1,
        gt=0,
        le=1000,
        description="share of the mean diagonal added to the scaled Gram matrix, ADMM's own",
    )
    rho: float = Field(
        default=1.0, gt=0, le=1e6, description="strength of the pull towards the mask"
    )


class Swaps(Options):
    """Exchanges of a kept and a removed weight of a row that lower its output error the most."""

    swaps: int = Field(default=50, ge=1, le=10_000, description="exchanges per row at most")


class Dsnot(Options):
    """Dynamic sparse no training, Zhang et al. 2024 (ICLR), arXiv:2310.08915."""

    cycles: int = Field(default=50, ge=1, le=10_000, description="exchanges per row at most")
    threshold: float = Field(
        default=0.1, ge=0, le=1e6, description="a row whose expected error is smaller is left alone"
    )
    power: float = Field(
        default=1.0,
        ge=0,
        le=8,
        description="the growing criterion divides by the variance to this power",
    )


class Refit(Options):
    """Least squares on the columns that stay, towards the outputs before."""

    damping: float = Field(
        default=0.01,
        gt=0,
        le=1000,
        description="share of the mean Gram diagonal that is added to it",
    )


class Permutation(Options):
    """Which layers' input channels are put into another order before an N:M mask is chosen."""

    layers: LayerPatterns = Field(
        default=(),
        description="layers to permute, as in `targets`; all whose order neighbours can follow, if "
        "empty",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_simulation(cls, numbers: Any) -> Any:
        """Older recipes may say that nothing is simulated; simulating is no more."""
        if isinstance(numbers, dict) and numbers.get("simulate") is False:
            return {key: value for key, value in numbers.items() if key != "simulate"}
        return numbers


class Iterative(Options):
    """Several pruning steps of growing sparsity."""

    steps: int = Field(default=4, ge=2, le=1000, description="pruning steps")
    # Cubic: Zhu & Gupta 2017, arXiv:1710.01878.
    shape: Literal["linear", "cubic"] = Field(
        default="cubic", description="share removed after step k of n: k/n, or 1 - (1 - k/n)^3"
    )
    anew: bool = Field(
        default=False,
        description="whether each step looks at the model as pruned so far, gradients included",
    )


class WhileTraining(Options):
    """Units go step by step while low-rank factors train, Zhang et al. 2024, arXiv:2305.18403."""

    every: int = Field(
        default=10, ge=1, le=1_000_000, description="steps of the optimizer before more units go"
    )
    begin: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps before which no unit goes"
    )
    end: float = Field(
        default=0.9, gt=0, le=1, description="share of the steps by which all have gone"
    )
    # Cubic: Zhu & Gupta 2017, arXiv:1710.01878.
    shape: Literal["linear", "cubic"] = Field(
        default="cubic",
        description="share gone at a part p of the way from begin to end: p, or 1 - (1 - p)^3",
    )
    momentum: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="share of the average of the scores that each step leaves as it is",
    )
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="step of gradient descent that G_lora looks at; 0 is the first order alone",
    )

    @model_validator(mode="after")
    def _ends_behind_its_beginning(self) -> WhileTraining:
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin:g} is not before end {self.end:g}")
        return self

    def of_factors(self) -> str:
        """Units are scored by them."""
        return "takes units out while low-rank factors train"


class Periods(Options):
    """Units go in periods of a training, in each the lowest of those that stay: they shrink."""

    periods: int = Field(
        default=5, ge=1, le=10_000, description="in each as many go as in any other"
    )
    begin: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps before the first period"
    )
    end: float = Field(
        default=0.9, gt=0, le=1, description="share of the steps by which the last has ended"
    )
    cycles: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="trials before the first period, at most: in each the units that would go "
        "shrink to nothing and come back, and others that rank low meanwhile are tried in the "
        "next; what goes is then chosen by the mean of all scores; 0 chooses by those of one step",
    )
    cycles_end: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="share of the steps by which the last trial has ended, if there are any; the "
        "periods lie behind it",
    )
    tolerance: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="units left to try with which trials are over, however few there were",
    )
    direction: Literal["optimizer", "change"] = Field(
        default="optimizer",
        description="what features T_ compare weights with: what the coming step of the optimizer "
        "takes from them, or the change that low-rank factors make",
    )
    shrink: Literal["linear", "half_space"] = Field(
        default="linear",
        description="how units go within their period: weight and change by the same share of "
        "what they were, or the weight alone, which takes up the change, until it has turned away",
    )
    epsilon: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="of shrink: half_space, a unit whose next weights have less than this share "
        "of its own square in its direction is gone at once",
    )
    transfer: bool = Field(
        default=False,
        description="whether weights that stay take up the change of their factors when a period "
        "ends, and the factors begin at no change again",
    )
    protect: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the places that lose nothing: those without whose smallest units the "
        "loss grows most, tried one by one before the training; 0 tries none",
    )
    probe: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.25, 0.5),
        min_length=1,
        max_length=100,
        description="shares of its units that a place so tried is without",
    )
    probe_windows: int = Field(
        default=8, ge=1, le=100_000, description="windows on which a place is so tried"
    )

    @model_validator(mode="after")
    def _ends_behind_its_beginning(self) -> Periods:
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin:g} is not before end {self.end:g}")
        if self.cycles and not self.begin < self.cycles_end < self.end:
            raise ValueError(
                f"cycles_end {self.cycles_end:g} is not between begin {self.begin:g} and end "
                f"{self.end:g}"
            )
        return self

    def of_factors(self) -> str:
        """Some choices speak of the change that factors make."""
        if self.direction == "change":
            return "with direction: change looks at the change that low-rank factors make"
        if self.shrink == "half_space":
            return "with shrink: half_space hands the change of low-rank factors to weights"
        return "with transfer hands the change of low-rank factors to weights" * self.transfer


class Part(Options):
    """A stage that takes so much of what is asked for."""

    of: float = Field(gt=0, lt=1, description="fraction of the parameters that all stages remove")


class Power(Options):
    """How many attentions go beside neurons, Sandri et al. 2025, 2SSP, arXiv:2501.17771."""

    divisor: float = Field(
        default=1.5,
        gt=0,
        le=100,
        description="round(units * sparsity ** (parameters of the other stages' units / its own / "
        "divisor)) of its units go",
    )


def _described(name: str, field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {getattr(rule, key):g}"
        for rule in field.metadata
        for key, sign in signs.items()
        if hasattr(rule, key)
    ]
    usual = "" if field.is_required() else f" {field.default}"
    allowed = f" ({', '.join(bounds)})" if bounds else ""
    return f"{name}{usual}{allowed}: {field.description}"
