"""Trials of experts: how far a model moves from the dense one when mixtures lose so many of them.

What goes of each mixture is settled by the recipe's scores; what is tried is how many. Nothing is
mended, so a trial is one narrowed router for each mixture and the forward pass that measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.evaluation import DenseReference, dense_reference, evaluate
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.routing import watching
from prunezero.models.observing.subset_losses import SubsetLosses
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.feature_values import needed_sums
from prunezero.scoring.selection import lowest_first


class ExpertTrials:
    """A dense model whose mixtures lose experts on trial; nothing of it is ever touched."""

    def __init__(
        self,
        language_model: LanguageModel,
        recipe: Recipe,
        groups: Sequence[Group],
        seen: Tensor,
        windows: Tensor,
    ) -> None:
        """Score the experts of all mixtures, and keep what the dense model answers.

        Args:
            seen: token ids [count, length] by which experts are scored.
            windows: token ids [count, length] to measure on.

        Raises:
            ScoreError, StatisticsError: as the scores of the recipe's unit.
        """
        self._model, self._windows = language_model, windows
        self._groups = {group.name: group for group in groups}
        kind, options = recipe.unit.row, recipe.unit.options
        of_options: frozenset[str] = getattr(options, "sums", frozenset())
        sums = needed_sums([recipe]) | of_options
        known = kind.observe(language_model, groups, seen, sums) if sums else {}
        self._order = {}
        for group in groups:
            scores = kind.scores(
                group, recipe.criterion, known, damping=recipe.damping, options=options
            )
            self._order[group.name] = lowest_first(scores, group.strata)
        self._reference = dense_reference(language_model, windows)
        self._losses: dict[str, SubsetLosses] = {}
        self.count = 0
        """measurements so far"""

    def __enter__(self) -> ExpertTrials:
        return self

    def __exit__(self, *fault: object) -> None:
        self._losses.clear()

    def kl(self, removed: Mapping[str, int], windows: int) -> float:
        """KL to the dense model, in nats per token, on the first windows.

        Args:
            removed: experts that go, by the name of the mixture; of mixtures left out none.
            windows: how many.
        """
        groups = tuple(self._groups.values())
        kept = (self._kept(group, removed.get(group.name, 0)) for group in groups)
        known = self._reference
        reference = DenseReference(known.states[:windows], known.head, known.versions)
        with without_experts(self._model, Selection(groups, tuple(kept))):
            result = evaluate(self._model, self._windows[:windows], reference=reference)
        assert result.kl is not None  # a reference was given; for the type checker
        self.count += 1
        return result.kl

    def lost(self, name: str, count: int) -> float:
        """Energy for each token of what a mixture's output changes by without so many experts.

        The first window says it.
        """
        if count == 0:
            return 0.0
        if name not in self._losses:
            self._losses[name] = self._seen(self._groups[name])
        known = self._losses[name]
        kept = self._kept(self._groups[name], count)
        return float(known.squares(kept[None]).sum()) / len(known.tokens)

    def _seen(self, group: Group) -> SubsetLosses:
        ids = self._windows[:1].to(self._model.device)
        with watching(self._model.model, [group]) as seen, torch.no_grad():
            self._model.model.base_model(ids, use_cache=False)
        return SubsetLosses.of(self._model, group, [seen[group.name].tokens])

    def _kept(self, group: Group, count: int) -> Tensor:
        kept = torch.ones(group.units, dtype=torch.bool, device=group.device)
        kept[self._order[group.name][:count].to(group.device)] = False
        return kept
