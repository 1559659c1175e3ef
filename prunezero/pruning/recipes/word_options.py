"""Which numbers go with the words that a recipe chooses, what do they mean, and what may they be?

One class for each word that has numbers; `words.WORDS` says where they belong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from prunezero.pruning.recipes.documents import MOST_WORDS, LayerPattern, LayerPatterns


class Options(BaseModel):
    """The numbers of a word that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def limits(self) -> dict[str, Any]:
        """What they say of every group of units, by the fields of `Group`."""
        return {}

    def limits_in(self, block: int, blocks: int) -> dict[str, Any]:
        """What they say of the groups of one of so many blocks, by the fields of `Group`."""
        return self.limits

    @classmethod
    def described(cls) -> list[str]:
        """One line for each number: its usual value, its range, and what it does."""
        return [_described(name, field) for name, field in cls.model_fields.items()]


class Neurons(Options):
    """How the neurons of one MLP are scored, and how many stay."""

    members: Literal["consumer", "producers", "all"] = Field(
        default="consumer",
        description="matrices whose part of a unit is scored: the one that reads it, those that "
        "make it, or all",
    )
    combine: Literal["sum", "mean", "max"] = Field(
        default="sum", description="how scores of several matrices become one"
    )
    least: int = Field(default=1, ge=1, le=10**6, description="units of a group that stay anyway")
    multiple_of: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="units that stay are a multiple of this, so fewer go",
    )

    @property
    def limits(self) -> dict[str, Any]:
        """How many units of each group stay anyway, and of what they are a multiple."""
        return {"least": self.least, "multiple_of": self.multiple_of}


class Depth(Options):
    """Which blocks lose nothing of their depth, and which noise formulas see."""

    keep_first: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the beginning that stay whole"
    )
    keep_last: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the end that stay whole"
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RND")

    def limits_in(self, block: int, blocks: int) -> dict[str, Any]:
        """Nothing may go of the first and the last blocks."""
        stays = block < self.keep_first or block >= blocks - self.keep_last
        return {"least": 1, "is_protected": True} if stays else {}


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


class Tune(Options):
    """Short fine-tuning of the weights that stay, after each pruning step; the mask is held."""

    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="of torch")
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="highest, after a warm-up; falls to 0"
    )
    sequences: int = Field(
        default=128, ge=1, le=1_000_000, description="training sequences after each pruning step"
    )
    batch: int = Field(
        default=4,
        ge=1,
        le=4096,
        description="sequences whose gradients make one step of the optimizer",
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
