"""Candidate: one rule that a search tried, and what it measured of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import costliest
from prunezero.models.measures import TO_DENSE
from prunezero.searching.experiment.objectives import OBJECTIVES, USUAL
from prunezero.searching.experiment.rule import Rule

# A new mask; a mask seen before; a formula whose scores are not finite or rank nothing.
STATUSES = ("new", "known", "invalid")
# Columns of candidates that were stopped early.
BOUNDS = ("search_at_least", "validation_at_least")


@dataclass(frozen=True)
class Candidate:
    """One rule that a search tried, and how far up the rungs it came."""

    slot: int
    """its place in the order of proposals"""
    generation: int
    """0 holds the seeds and fresh formulas"""
    criterion: Criterion
    """the formula"""
    origin: str
    """seed, random, mutate, cross, tune, choose, enumerate or the name of a proposer"""
    parents: tuple[int, ...]
    """slots of the candidates it was made from"""
    status: str
    """one of STATUSES"""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """values of recipe keys that are not those of the task"""
    mask: str = ""
    """digest of its mask on the probe"""
    behaviour: int = 0
    """how far its mask is from that of |W| * X, in few steps"""
    layer_error: float | None = None
    """gradient-weighted error of the layers' outputs on sampled rows"""
    kl: float | None = None
    """nats per token from the dense model to the pruned one, on a little search text"""
    top1_agreement: float | None = None
    """share of tokens whose most likely follower is the same, on that text"""
    top5_agreement: float | None = None
    """where it is among the pruned model's five, on that text"""
    acceptance: float | None = None
    """share of tokens that speculative sampling keeps, on that text"""
    search_perplexity: float | None = None
    """of the pruned model on search text; None unless it earned that"""
    validation_perplexity: float | None = None
    """on text that no other rung looks at; None unless it earned that"""
    objective: str = USUAL
    """what the search measures by"""
    search_objective: float | None = None
    """that on search text, as measured, where it is not perplexity"""
    validation_objective: float | None = None
    """the same on validation text"""
    search_at_least: float | None = None
    """bound of its `search_fitness`, lower is better, of one that was stopped before the end of
    search text: with the confidence of `early_stop.py` it is not less"""
    validation_at_least: float | None = None
    """the same of validation text"""
    seconds: float = 0.0
    """spent on it"""
    is_replayed: bool = False
    """whether its last result was read from the journal of an earlier session"""
    fault: str = ""
    """why it is invalid; nothing of any other"""

    @cached_property
    def rule(self) -> Rule:
        """The formula and the choices around it."""
        return Rule(self.criterion, self.choices)

    @cached_property
    def complexity(self) -> int:
        """Words of all its formulas together."""
        return sum(criterion.complexity for criterion in self.rule.formulas)

    @cached_property
    def signal(self) -> str:
        """The costliest signal that one of its formulas looks at."""
        return costliest(one.signal for one in self.rule.formulas)

    @property
    def search_fitness(self) -> float | None:
        """What orders candidates on search text, lower is better; None unless it earned that."""
        return self._turned(self.search_perplexity, self.search_objective)

    @property
    def validation_fitness(self) -> float | None:
        """What orders candidates on validation text, lower is better; None likewise."""
        return self._turned(self.validation_perplexity, self.validation_objective)

    @property
    def search_rank(self) -> float | None:
        """Its `search_fitness`, or what that is at least: an order of all that were looked at."""
        return self.search_at_least if self.search_fitness is None else self.search_fitness

    def _turned(self, perplexity: float | None, value: float | None) -> float | None:
        if self.objective == USUAL:
            return perplexity
        return None if value is None else OBJECTIVES[self.objective].turned(value)

    def row(self) -> dict[str, Any]:
        """The candidate as one flat row of a table."""
        return {
            "slot": self.slot,
            "generation": self.generation,
            "origin": self.origin,
            "parents": list(self.parents),
            "status": self.status,
            "formula": self.criterion.text,
            "choices": json.dumps(self.choices, sort_keys=True) if self.choices else "",
            "complexity": self.complexity,
            "depth": self.criterion.depth,
            "signal": self.signal,
            "fingerprint": self.criterion.fingerprint,
            "mask": self.mask,
            "layer_error": self.layer_error,
            **{key: getattr(self, key) for key in TO_DENSE},
            "search_perplexity": self.search_perplexity,
            "validation_perplexity": self.validation_perplexity,
            **self._by_objective(),
            **self._bounds(),
            "seconds": self.seconds,
            "fault": self.fault,
        }

    def _bounds(self) -> dict[str, float]:
        """Columns of what it is at least, where it was stopped early."""
        bounds = {key: getattr(self, key) for key in BOUNDS}
        return {key: value for key, value in bounds.items() if value is not None}

    def _by_objective(self) -> dict[str, float | None]:
        """Columns of what the search measures by, where that is not perplexity."""
        if self.objective == USUAL:
            return {}
        own = OBJECTIVES[self.objective]
        return {
            own.key("search"): self.search_objective,
            own.key("validation"): self.validation_objective,
        }
