"""Every strategy finds what is there to be found, by its seed alone; controls pay what they say."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import ScoreError
from prunezero.formula import Criterion
from prunezero.pruning.recipe import Recipe
from prunezero.scoring.feature_values import feature
from prunezero.scoring.score import evaluate
from prunezero.searching.candidate import Candidate
from prunezero.searching.catalogue import STRATEGIES
from prunezero.searching.controls import POPULATION
from prunezero.searching.enumeration import Blocks, enumerate_formulas
from prunezero.searching.fitness import Sample, mask_digest, masks_on
from prunezero.searching.genetics import random_criterion
from prunezero.searching.judge import ProbeMask
from prunezero.searching.memory import Memory
from prunezero.searching.search import search
from prunezero.searching.strategies import generator
from prunezero.searching.task import Rule, Task
from tests.searching.bench import tiny_space

PLANTED = Criterion.parse("abs(W)*sqrt(X)/C1")
SPACE = tiny_space(
    terminals=["abs(W)", "X", "R1", "C1"],
    operators=["add", "mul", "div", "sqrt"],
    constants=[],
    exponents=[],
    max_complexity=9,
    fresh_depth=3,
    population=16,
    tuned=0,
)
# Enough for each of three seeds; a strategy that looks at nothing needs the most.
BUDGETS = {"plain-gp": 1500, "no-memory": 600, "optuna": 150}


class PlantedLadder:
    """Rungs without a model: all say how far a ranking is from that of the planted formula."""

    def __init__(self, seed: int = 0, space: Any = SPACE) -> None:
        self.task = Task(space, 0.5, "free", seed, ())
        self.asked: Counter[str] = Counter()
        numbers = torch.Generator().manual_seed(5)
        weight = torch.randn((8, 24), generator=numbers)
        features = {name: feature(name, weight) for name in ("W", "R1", "C1")}
        features["X"] = torch.rand((1, 24), generator=numbers) * 4 + 0.1
        self._layer = Sample("layer", features, None, torch.ones(8))

    def probe(self, rule: Rule | Criterion) -> ProbeMask | None:
        criterion = rule.criterion if isinstance(rule, Rule) else rule
        try:
            masks = masks_on([self._layer], criterion, 0.5, "row", "free")
        except ScoreError:
            return None
        return ProbeMask(mask_digest(masks), masks[0].numpy().ravel())

    def errors(self, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
        for rule in rules:
            self.asked["layer error"] += 1
            yield {"layer_error": self.distance(rule.criterion), "seconds": 1.0}

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        for rule in rules:
            yield {"formula": rule.criterion.text}

    def rows(self, recipes: Sequence[Recipe], splits: Sequence[str]) -> Iterator[dict[str, Any]]:
        for recipe in recipes:
            distance = self.distance(recipe.criterion)
            self.asked.update(splits)
            yield {f"{split}_perplexity": distance for split in splits} | {"kl": distance}

    def distance(self, criterion: Criterion) -> float:
        """1 minus the mean rank correlation over rows; a little more than 0 at the least."""
        mine, planted = (self._ranks(one) for one in (criterion, PLANTED))
        return 1.01 - float(np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(mine, planted)]))

    def _ranks(self, criterion: Criterion) -> Any:
        features = {name: self._layer.features[name] for name in criterion.features}
        scores = evaluate(criterion, features, self._layer.weight.shape)
        return scores.argsort(1).argsort(1).double().numpy()


def run(strategy: str, budget: int | None, *, seed: int = 0) -> tuple[list[Candidate], Any]:
    ladder: Any = PlantedLadder(seed)
    found = search(ladder, strategy=strategy, budget=budget)
    return list({one.slot: one for one in found}.values()), ladder


def told(candidates: list[Candidate]) -> list[tuple[object, ...]]:
    return [
        (one.slot, one.criterion.text, one.origin, one.parents, one.status, one.search_perplexity)
        for one in candidates
    ]


def test_there_are_strategies() -> None:
    assert {"evolution", "random", "no-memory", "enumeration", "optuna", "plain-gp"} <= set(
        STRATEGIES
    )
