"""The numbers of a recipe that chooses what attention goes on with, and what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from pydantic import Field, field_validator, model_validator

from prunezero.errors import PruneZeroError
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import Feature
from prunezero.pruning.recipes.word_options import Options

_MOST = 10**6


class Columns(Options):
    """How many keys of a prompt stay, and how their scores are read."""

    sinks: int = Field(
        default=4, ge=0, le=_MOST, description="first keys that always stay, inside the budget"
    )
    recent: int = Field(
        default=32, ge=1, le=_MOST, description="last keys that always stay, inside the budget"
    )
    window: int = Field(
        default=32, ge=1, le=_MOST, description="last queries that the feature ATT_W looks at"
    )
    pool: int = Field(
        default=5,
        ge=1,
        le=1001,
        description="neighbouring keys that ATT_W is averaged over, an odd number; 1 is none",
    )
    share: Literal["kv_head", "layer"] = Field(
        default="kv_head",
        description="who keeps the same keys: a key-value head by itself, or all of a layer, by "
        "the mean of their scores",
    )
    block: int = Field(
        default=1, ge=1, le=_MOST, description="neighbouring keys that stay or go together"
    )
    safeguard: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="with compare: layer, the share of its budget that each head has for itself",
    )
    falling: float = Field(
        default=1.0,
        ge=1,
        le=1000,
        description="how many times less than the mean the last layer keeps, sinks and recent "
        "keys aside; budgets fall from layer to layer; 1 is the same everywhere",
    )
    first: str = Field(
        default="",
        max_length=1000,
        description="a formula that spends a part of the budget before the criterion spends the "
        "rest; nothing where there is none",
    )
    first_share: float = Field(default=0.5, ge=0, le=1, description="that part of the budget")
    when: Literal["prompt", "step"] = Field(
        default="prompt",
        description="whether keys go once, behind the prompt, or one more for every token that "
        "comes",
    )
    spend: Literal["keys", "heads"] = Field(
        default="keys",
        description="what the budget buys: keys of every head, or with compare: model whole heads "
        "that keep all keys, while all others keep sinks and recent ones",
    )
    lag: int = Field(
        default=128,
        ge=2,
        le=_MOST,
        description="tokens of a chunk that LAGK and LAGV compare with the next",
    )
    seed: int = Field(default=0, ge=0, le=2**31, description="of the feature RNDK")

    @field_validator("pool")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"an odd number of keys has one in its middle, but got {value}")
        return value

    @field_validator("first")
    @classmethod
    def _formula(cls, value: str) -> str:
        try:
            return _parsed(value).text if value else value
        except PruneZeroError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Columns:
        if self.first and self.block > 1:
            raise ValueError("first and block are two ways to choose; leave one of them out")
        return self

    def fault_of(self, features: Sequence[Feature]) -> str:
        """Why heads so chosen do not have what a formula looks at; nothing where they do."""
        others = [one.name for one in features if one.inputs != ("streaming_error",)]
        if self.spend == "heads" and others:
            return (
                f"whole heads are chosen before a prompt is read, by STREAM alone, and "
                f"{' and '.join(others)} is of a prompt; leave spend: heads out"
            )
        return ""

    @property
    def formulas(self) -> tuple[Criterion, ...]:
        """The formula that chooses first."""
        return (_parsed(self.first),) if self.first else ()


class Links(Options):
    """How many links between tokens each query keeps, and how their scores are read."""

    sinks: int = Field(
        default=4, ge=0, le=_MOST, description="first keys that every query keeps, in its budget"
    )
    recent: int = Field(
        default=32,
        ge=1,
        le=_MOST,
        description="keys at a query and just before it that it keeps, in its budget",
    )
    page: int = Field(
        default=1,
        ge=1,
        le=_MOST,
        description="neighbouring keys that stay or go together; one that is not full before a "
        "query stays",
    )
    share: Literal["head", "layer"] = Field(
        default="head",
        description="who keeps the same links: a query head by itself, or all of a layer, by the "
        "mean of their scores",
    )
    when: Literal["following", "all", "prompt"] = Field(
        default="following",
        description="which links go: those of what follows a prompt, all, or those of the prompt "
        "alone, where the queries of a page choose together",
    )

    def fault_of(self, features: Sequence[Feature]) -> str:
        """Why links so chosen do not have what a formula looks at; nothing where they do."""
        if self.when != "prompt" and any("block_products" in one.inputs for one in features):
            return (
                "BLOCK is of all queries of a block, which are there only of a prompt; add when: "
                "prompt to unit: link"
            )
        return ""


@lru_cache(maxsize=64)
def _parsed(text: str) -> Criterion:
    return Criterion.parse(text)
