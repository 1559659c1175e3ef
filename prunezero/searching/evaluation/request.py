"""Request: what is asked of an evaluator; plain data, so that it travels and is remembered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunezero.files.digests import joined_digest
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.second_order import DAMPING


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluator; its result is plain data too."""

    splits: tuple[str, ...]
    """texts to measure the pruned model on; none asks for the layer error"""
    recipe: Mapping[str, Any] | None
    """what of the recipe changes results, in its YAML's spelling; None is the dense model"""
    trials: int = 0
    """numbers to try in its formula; more than none asks for the best ones"""
    rival: tuple[float, ...] = ()
    """the objective of who has to be reached on one text, turned, by window; none for nobody"""

    @classmethod
    def of(
        cls,
        recipe: Recipe | None,
        splits: Sequence[str] = (),
        *,
        trials: int = 0,
        rival: Sequence[float] = (),
    ) -> Request:
        """The request what a recipe does, on some texts or to the layers' outputs."""
        if recipe is None:
            return cls(tuple(splits), None)
        return cls(tuple(splits), recipe.effect, trials, tuple(rival))

    @property
    def kind(self) -> str:
        """The rung that answers it."""
        if self.trials:
            return "tuning"
        return "measurement" if self.splits else "layer error"

    @property
    def damping(self) -> float:
        """That of the recipe."""
        return float((self.recipe or {}).get("damping", DAMPING))

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        asked = [self.recipe, self.trials, *self.splits]
        if self.rival:
            asked.append(f"to reach {joined_digest(map(repr, self.rival))}")
        return json.dumps(asked, sort_keys=True)

    @property
    def whole(self) -> Request:
        """The request for all windows, whoever is to be reached."""
        return replace(self, rival=())

    @property
    def named(self) -> Recipe:
        """The recipe that it is about."""
        return validated(Recipe, {"name": "candidate", **(self.recipe or {})}, "a request")
