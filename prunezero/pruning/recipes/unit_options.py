"""Which numbers go with the words of a recipe's `unit`, and what may they be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from prunezero.formula.feature_row import Feature
from prunezero.pruning.recipes.word_options import Options


class Depth(Options):
    """Which blocks lose nothing, what a share is a share of, and which noise formulas see."""

    protect_first: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the beginning that keep all units"
    )
    protect_last: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the end that keep all units"
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RND")
    measure: Literal["parameters", "flops", "kv bytes", "milliseconds", "units"] = Field(
        default="parameters",
        description="what the sparsity is a share of; milliseconds are measured on this machine",
    )

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """Whether a block is one of the first or last, of which nothing may go."""
        is_protected = block < self.protect_first or block >= blocks - self.protect_last
        return {"is_protected": is_protected}


class Units(Depth):
    """How the units of one place are scored, and how many stay."""

    members: Literal["consumer", "producers", "all"] = Field(
        default="consumer",
        description="matrices whose part of a unit is scored: the one that reads it, those that "
        "make it, or all",
    )
    combine: Literal["sum", "mean", "max", "product"] = Field(
        default="sum", description="how scores of several matrices become one"
    )
    channels: Literal["whole", "sum", "mean", "max", "l2"] = Field(
        default="whole",
        description="whether units of several channels, such as heads, are scored as a whole, or "
        "each channel by itself, and how those scores become one",
    )
    normalise: Literal["none", "zscore", "mean", "l2", "max", "slope"] = Field(
        default="none",
        description="what scores of a group are made comparable by; slope is how far the model "
        "moves when the first of them go, and what they cost",
    )
    least: int = Field(default=1, ge=1, le=10**6, description="units of a group that stay anyway")
    multiple_of: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="channels of units that stay are a multiple of this, so fewer go",
    )
    rescore: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="units that go before the others are scored anew, with the columns that stay "
        "refitted; of fewer than 64 each by itself; 0 is never, and else the formula holds Lr0 or "
        "Lrb",
    )
    swaps: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="exchanges at most of a unit that stays and one that goes, each the one that "
        "lowers the most what refitted columns lose; 0 is none, and else the recipe has update: "
        "refit",
    )

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """How many units of a group stay anyway, and of what they are a multiple."""
        told = super().limits(block, blocks)
        return told | {"least": self.least, "multiple_of": self.multiple_of}


class Channels(Options):
    """How channels of the residual stream are scored, and how many stay."""

    members: Literal["inputs", "readers", "writers", "all"] = Field(
        default="inputs",
        description="what is scored of a channel: its activation once for each norm that hands it "
        "on, or its part of the matrices that read it, write it, or do either",
    )
    combine: Literal["sum", "mean", "max", "product"] = Field(
        default="sum", description="how scores of several members become one"
    )
    least: int = Field(default=1, ge=1, le=10**6, description="channels that stay anyway")
    multiple_of: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="channels that stay are a multiple of this, so fewer go",
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RND")

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """How many channels stay anyway, and of what they are a multiple."""
        return {"least": self.least, "multiple_of": self.multiple_of}

    def fault_of(self, features: Sequence[Feature]) -> str:
        """Norms have no weights of matrices, and what writes to the stream reads nothing of it."""
        for one in features:
            if self.members == "inputs" and one.shape == "element":
                return (
                    f"{one.name} has a value for each weight, but members: inputs looks at what "
                    "norms hand on; use members: readers, writers or all"
                )
            if self.members in ("writers", "all") and one.shape != "element" and one.sums:
                return (
                    f"{one.name} is of what norms hand on, which matrices that write to the stream "
                    "do not see; use members: inputs or readers"
                )
        return ""


class Directions(Options):
    """How many directions of the residual stream stay in each place."""

    least: int = Field(default=1, ge=1, le=10**6, description="directions that stay anyway")
    multiple_of: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="directions that stay are a multiple of this, so fewer go",
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RND")

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """How many directions stay anyway, and of what they are a multiple."""
        return {"least": self.least, "multiple_of": self.multiple_of}

    def fault_of(self, features: Sequence[Feature]) -> str:
        """Of a direction is known what norms hand on along it, and what it costs."""
        return next(
            (
                f"{one.name} has a value for each weight, but of a direction is known what norms "
                "hand on along it; use A, A_mean, A_var, A1 or A2"
                for one in features
                if one.shape == "element"
            ),
            "",
        )


class Experts(Options):
    """Which mixtures lose no experts, and which of their experts stay anyway."""

    protect_first: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the beginning that keep all experts"
    )
    protect_last: int = Field(
        default=0, ge=0, le=10**6, description="blocks at the end that keep all experts"
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RND")
    measure: Literal["units", "parameters"] = Field(
        default="units", description="what the sparsity is a share of"
    )
    guard: Literal["none", "super"] = Field(
        default="none",
        description="super lets experts go last whose largest activation is above 99.5 % of all "
        "and a tenth of the largest, in the first three quarters of the mixtures",
    )
    instead: Literal["others", "mean"] = Field(
        default="others",
        description="what tokens get that were sent to an expert that went: others in its place, "
        "or its mean output on calibration text, with which a model runs but cannot be saved",
    )
    skip: Literal["none", "median"] = Field(
        default="none",
        description="whether tokens skip experts that stay, while the model runs: those that weigh "
        "less beside a token's others than with half of the calibration tokens",
    )

    @model_validator(mode="after")
    def _skips_what_stays(self) -> Experts:
        if self.skip != "none" and self.instead != "others":
            raise ValueError("skip looks at experts that stay alone, so it needs instead: others")
        return self

    def limits(self, block: int, blocks: int) -> dict[str, Any]:
        """Whether a block is one of the first or last, of which nothing may go."""
        is_protected = block < self.protect_first or block >= blocks - self.protect_last
        return {"is_protected": is_protected}

    @property
    def sums(self) -> frozenset[str]:
        """Names of the sums of mixtures that these numbers look at, whatever the formula."""
        of_guard = {"largest_activations"} if self.guard == "super" else set()
        of_means = {"expert_output_sum", "routed_count"} if self.instead == "mean" else set()
        return frozenset(of_guard | of_means)
