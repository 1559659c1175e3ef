"""How much does each layer lose, so that the model as a whole loses the sparsity asked for?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunezero.models.units import Layer


def uniform(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Every layer loses the same fraction: the choice of magnitude, Wanda, RIA and others."""
    return {layer.name: sparsity for layer in layers}


# By the recipe's word: layers and the sparsity of the whole in, sparsity by layer name out.
ALLOCATIONS: dict[str, Callable[[Sequence[Layer], float], dict[str, float]]] = {"uniform": uniform}
