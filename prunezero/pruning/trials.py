"""Trials: how far a model moves from the dense one when its groups lose so many units.

What goes in each group is settled by the recipe's scores and swaps; what is tried is how many. The
columns that stay are mended as the recipe says, each reader by itself, and remembered, so a trial
costs little more than the forward pass that measures it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.models.evaluation import DenseReference, dense_reference, evaluate
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.local_search import improved
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.updates.mend import Work, mend
from prunezero.scoring.selection import lowest_first
from prunezero.scoring.statistics import Statistics, sum_of
from prunezero.scoring.unit_features import centred

# Bytes of mended weights that are remembered.
_REMEMBERED = 2**31


class Trials:
    """A dense model whose groups lose units on trial; leaving it, the model is dense again."""

    def __init__(
        self,
        language_model: LanguageModel,
        recipe: Recipe,
        groups: Sequence[Group],
        statistics: Mapping[str, Statistics],
        windows: Tensor,
    ) -> None:
        """Score the units of all groups, and keep what the dense model answers.

        Args:
            statistics: of the dense model by layer name, for the recipe's formula and updates.
            windows: token ids [count, length] to measure on.

        Raises:
            ScoreError, StatisticsError: as the scores of the recipe's unit.
        """
        self._model, self._recipe = language_model, recipe
        self._statistics, self._windows = statistics, windows
        self._groups = {group.name: group for group in groups}
        self._order = {group.name: self._ascending(group) for group in groups}
        self._readers = {group.name: group.reader.linear for group in groups}
        self._reference = dense_reference(language_model, windows)
        self._dense = {
            name: (reader.weight.clone(), None if reader.bias is None else reader.bias.clone())
            for name, reader in self._readers.items()
        }
        self._now = dict.fromkeys(self._groups, 0)
        self._mended: OrderedDict[tuple[str, int], tuple[Tensor, Tensor | None]] = OrderedDict()
        self._bytes = 0
        self.count = 0
        """measurements so far"""

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *fault: object) -> None:
        for name in self._groups:
            self._put(name, *self._dense[name])
        self._now = dict.fromkeys(self._groups, 0)

    def kl(self, removed: Mapping[str, int], windows: int) -> float:
        """KL to the dense model, in nats per token, on the first windows.

        Args:
            removed: units that go, by the name of the group; of groups left out none.
            windows: how many.
        """
        for name in self._groups:
            self._set(name, removed.get(name, 0))
        known = self._reference
        reference = DenseReference(known.states[:windows], known.head, known.versions)
        result = evaluate(self._model, self._windows[:windows], reference=reference)
        assert result.kl is not None  # a reference was given; for the type checker
        self.count += 1
        return result.kl

    def lost(self, name: str, count: int) -> float:
        """Energy for each token of what the outputs of a group's reader lose without so many units.

        Raises:
            StatisticsError: a sum was not collected.
        """
        if count == 0:
            return 0.0
        reader = self._readers[name]
        change = self._dense[name][0].double() - self._of(name, count)[0].double()
        known = self._statistics.get(reader.name)
        gram = sum_of(known, "gram").double()
        assert known is not None  # sum_of refused it; for the type checker
        if "bias" in self._recipe.updates:
            gram = centred(gram, sum_of(known, "input_sum"), known.tokens)
        return float(((change @ gram) * change).sum()) / known.tokens

    def _set(self, name: str, count: int) -> None:
        if self._now[name] == count:
            return
        self._put(name, *(self._dense[name] if count == 0 else self._of(name, count)))
        self._now[name] = count

    def _put(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        reader = self._readers[name]
        reader.weight.copy_(weight)
        if reader.bias is not None and bias is not None:
            reader.bias.copy_(bias)

    def _of(self, name: str, count: int) -> tuple[Tensor, Tensor | None]:
        """The mended weight and bias of a group's reader without so many units."""
        key = (name, count)
        if key not in self._mended:
            found = self._mend(self._groups[name], count)
            self._mended[key] = found
            self._bytes += found[0].nbytes
            while self._bytes > _REMEMBERED and len(self._mended) > 1:
                _, (oldest, _) = self._mended.popitem(last=False)
                self._bytes -= oldest.nbytes
        self._mended.move_to_end(key)
        return self._mended[key]

    def _mend(self, group: Group, count: int) -> tuple[Tensor, Tensor | None]:
        reader = self._readers[group.name]
        self._put(group.name, *self._dense[group.name])
        kept = torch.ones(group.units, dtype=torch.bool, device=reader.weight.device)
        kept[self._order[group.name][:count]] = False
        chosen = improved(Selection((group,), (kept,)), self._recipe, self._statistics)
        mask = chosen.matrix_masks()[reader.name]
        known = self._statistics.get(reader.name)
        mend([Work(self._recipe, reader, known, count / group.units, mask)])
        return reader.weight.clone(), None if reader.bias is None else reader.bias.clone()

    def _ascending(self, group: Group) -> Tensor:
        recipe = self._recipe
        criterion = recipe.criterion_of(group.members[0].linear.name)
        scores = recipe.unit.row.scores(
            group,
            criterion,
            self._statistics,
            damping=recipe.damping,
            options=recipe.unit.options,
        )
        return lowest_first(scores, group.strata)
