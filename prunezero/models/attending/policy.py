"""Policy: which keys of a prompt attention goes on with, by a formula and a budget.

formula -> scores -> which keys stay -> a cache without the others -> measured model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.errors import ScoreError, SelectionError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.formula.feature_row import SIMULATED_SIGNALS, costliest
from prunezero.models.attending.observing import Attended, Looks, Measured
from prunezero.models.attending.values import column_features
from prunezero.scoring.column_selection import (
    falling_counts,
    keep_blocks,
    keep_columns,
    keep_highest,
    keep_in_two_stages,
    keep_together,
    kept_count,
    protected,
)
from prunezero.scoring.score import evaluate


@dataclass(frozen=True)
class Policy:
    """How many keys of a prompt stay in each head, and which."""

    criterion: Criterion
    """of one value for each key; the lowest go"""
    kept: float
    """share of the prompt's keys that stay, above 0 and at most 1"""
    together: bool = False
    """whether the heads of a layer compete, so that some keep more than others"""
    share: str = "kv_head"
    """who keeps the same keys: a key-value head by itself, or all of a "layer", by the mean of
    their scores"""
    sinks: int = 4
    """first keys that always stay, inside the budget"""
    recent: int = 32
    """last keys that always stay, inside the budget"""
    block: int = 1
    """neighbouring keys that stay or go together"""
    safeguard: float = 0.2
    """where heads compete: share of a head's budget that it has for itself"""
    falling: float = 1.0
    """how many times less than the mean the last layer keeps, beside what always stays"""
    first: Criterion | None = None
    """a formula that spends a part of the budget before"""
    first_share: float = 0.5
    """which part"""
    each_step: bool = False
    """whether a key goes whenever another comes, so that as many stay as at the prompt's end"""
    heads: bool = False
    """whether the budget buys whole heads of the model: those keep all keys, and all others what
    always stays; `together`, for they are unequal"""
    looks: Looks = Looks()
    """how far features look"""

    def __post_init__(self) -> None:
        """Refuse two ways to choose at once.

        Raises:
            SelectionError: names them.
        """
        ways = {
            "spend: heads": self.heads,
            "compare: layer": self.together and not self.heads and self.share == "kv_head",
            "first": self.first is not None,
            "block": self.block > 1,
        }
        named = [word for word, is_chosen in ways.items() if is_chosen]
        if len(named) > 1:
            raise SelectionError(
                f"{' and '.join(named)} are two ways to choose keys; leave one of them out"
            )
        beforehand = {"ATT_NEXT", "ATT_READ"} & set(self.features)
        if self.each_step and beforehand:
            raise SelectionError(
                f"{' and '.join(sorted(beforehand))} is measured of a prompt, so it says nothing "
                "at each step; leave when: step out"
            )

    def retrieving(
        self, known: Mapping[int, Measured], layers: Sequence[int], keys: int
    ) -> dict[int, Tensor]:
        """Which key-value heads keep all of a prompt's keys, bool [key-value heads], by layer.

        As many of the model as the budget holds, once all others keep what always stays; of equal
        scores the lower index goes first.

        Args:
            known: how heads of each layer stream.
            layers: that remember.
            keys: of the prompt.

        Raises:
            StatisticsError: how heads stream was not measured.
        """
        parts = []
        for layer in layers:
            error = known[layer].streaming_error if layer in known else None
            if error is None:
                raise StatisticsError(
                    f"whole heads are chosen by how they stream, which was not measured for layer "
                    f"{layer}; measure it before by streaming_errors"
                )
            shape = (len(error), 1, 1)
            parts.append(evaluate(self.criterion, {"STREAM": error.view(shape)}, shape).flatten())
        fixed = int(protected(keys, self.sinks, self.recent).sum())
        free = (kept_count(keys, self.kept) - fixed) * sum(map(len, parts))
        count = free // (keys - fixed) if keys > fixed else sum(map(len, parts))
        found = keep_highest(torch.cat(parts)[None], count)[0]
        return dict(zip(layers, torch.split(found, [len(one) for one in parts]), strict=True))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that it looks at."""
        formulas = [self.criterion, *([self.first] if self.first else [])]
        return tuple(dict.fromkeys(name for one in formulas for name in one.features))

    @property
    def signal(self) -> str:
        """The costliest signal that it looks at, one of SIGNALS."""
        formulas = [self.criterion, *([self.first] if self.first else [])]
        return costliest(one.signal for one in formulas)

    @property
    def is_simulated(self) -> bool:
        """Whether it looks at too much to save work, or has budgets that one tensor cannot have."""
        return self.together or self.signal in SIMULATED_SIGNALS

    def counts(self, keys: int, layers: int) -> list[int]:
        """How many of so many keys each layer keeps of a head, on the mean of its heads.

        Raises:
            SelectionError: fewer than always stay.
        """
        count = kept_count(keys, self.kept)
        fixed = int(protected(keys, self.sinks, self.recent).sum())
        if count < fixed:
            raise SelectionError(
                f"{count} of {keys} keys may stay, but {fixed} always do, the first (sinks) and "
                "the most recent; keep more, or lower the recipe's sinks or recent"
            )
        if self.falling == 1.0:
            return [count] * layers
        return falling_counts(keys, count, fixed, layers, self.falling)

    def scores(self, attended: Attended) -> Tensor:
        """How much each key matters, float32 [key-value heads, keys], or [1, keys] for a layer.

        Raises:
            ScoreError: a score is NaN or infinite.
            StatisticsError: a feature looks at what was not measured.
        """
        return self._scored(attended, self.criterion)

    def chosen(self, attended: Attended, count: int) -> Tensor:
        """Which keys stay, bool [key-value heads, keys].

        Args:
            count: of each head, on the mean where they compete.

        Raises:
            SelectionError: more keys always stay than may.
            ScoreError, StatisticsError: as `scores`.
        """
        heads, keys = attended.keys.shape[:2]
        if count >= keys:
            return torch.ones(heads, keys, dtype=torch.bool, device=attended.keys.device)
        return self._selected(attended, count).expand(heads, keys)

    def _selected(self, attended: Attended, count: int) -> Tensor:
        scores = self.scores(attended)
        always = protected(scores.shape[1], self.sinks, self.recent).to(scores.device)
        if self.first is not None:
            first = self._scored(attended, self.first)
            return keep_in_two_stages(first, scores, count, always, self.first_share)
        if self.block > 1:
            return keep_blocks(scores, count, always, self.block)
        if self.together:
            return keep_together(scores, count, always, self.safeguard)
        return keep_columns(scores, count, always)

    def _scored(self, attended: Attended, criterion: Criterion) -> Tensor:
        heads, keys = attended.keys.shape[:2]
        features = column_features(criterion.features, attended, self.looks)
        scores = evaluate(criterion, features, (heads, 1, keys))[:, 0]
        if not bool(torch.isfinite(scores).all()):
            raise ScoreError(
                f"criterion {criterion.text} gives a key of layer {attended.layer} a score that is "
                "NaN or infinite; such scores never choose"
            )
        return scores.mean(0, keepdim=True) if self.share == "layer" else scores


def looked_at(policies: Iterable[Policy]) -> frozenset[str]:
    """Names of the features that some policies look at."""
    return frozenset(name for policy in policies for name in policy.features)
