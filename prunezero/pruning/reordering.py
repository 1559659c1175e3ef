"""Which channels change places before a block is pruned, and do the statistics follow?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence

from torch import Tensor

from prunezero.errors import RecipeError
from prunezero.models.anatomy.linears import Linear, by_block, matching
from prunezero.models.editing.permuting import PermutableChannels, find_permutables, refusals
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.permutation import permute_block
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.request import parse_pattern
from prunezero.scoring.statistics import Statistics


class Reordering:
    """The permutations that a recipe asks for, block by block.

    A permutation is folded into the weights: the layer's columns and the rows that make its
    channels move together, so the function stays and the mask is N:M in memory.
    """

    def __init__(
        self, language_model: LanguageModel, recipe: Recipe, layers: Sequence[Linear]
    ) -> None:
        """Find what can be moved.

        Raises:
            RecipeError: a layer that the recipe names cannot be moved, or none can.
            ModelError: a name in the recipe matches none of the layers that are pruned.
        """
        self._recipe = recipe
        self._source = language_model.source
        self._pattern = parse_pattern(recipe.pattern)
        self._permutables: dict[int, list[PermutableChannels]] = defaultdict(list)
        if recipe.permute.is_usual:
            return
        wanted = _wanted(recipe, layers)
        self._find(language_model, [layer for layer in layers if layer.name in wanted])

    def _find(self, language_model: LanguageModel, layers: list[Linear]) -> None:
        for block, inside in by_block(layers).items():
            self._permutables[block] = find_permutables(language_model, inside)
            names_layers = bool(self._recipe.permute.options.model_dump()["layers"])
            if names_layers and len(self._permutables[block]) < len(inside):
                for name, reason in refusals(language_model, inside).items():
                    raise RecipeError(
                        f"recipe {self._recipe.name}: the input channels of '{name}' cannot be "
                        f"permuted: {reason}; leave it out of permute"
                    )
        if not any(self._permutables.values()):
            raise RecipeError(
                f"recipe {self._recipe.name}: no layer's input channels can be permuted in "
                f"{type(language_model.model).__name__}; use permute: none"
            )

    @property
    def moves(self) -> bool:
        """Whether channels of the model itself will change places."""
        return any(self._permutables.values())

    def move(
        self,
        block: int,
        score_of: Callable[[Linear], Tensor],
        statistics: MutableMapping[str, Statistics],
    ) -> None:
        """Permute one block into the orders that keep the most; its statistics are replaced.

        Args:
            block: its index.
            score_of: the scores `[out, in]` of a layer, on weights and statistics as they are.
            statistics: by layer name.
        """
        permutables = self._permutables.get(block)
        if not permutables or self._pattern is None:
            return
        moved = permute_block(permutables, score_of, self._pattern, self._recipe.permute)
        if self._source is not None:
            self._source.moved.update(moved)
        for name, orders in moved.items():
            if name in statistics:
                statistics[name] = statistics[name].permuted(
                    inputs=orders.inputs, outputs=orders.outputs
                )


def _wanted(recipe: Recipe, layers: Sequence[Linear]) -> set[str]:
    """Names of the pruned layers that the recipe permutes, if they can be."""
    patterns = recipe.permute.options.model_dump()["layers"]
    if not patterns:
        return {layer.name for layer in layers}
    return set().union(*(matching(pattern, layers) for pattern in patterns))
