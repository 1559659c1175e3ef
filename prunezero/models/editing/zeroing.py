"""How does the dense model come back after a measurement?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunezero.models.anatomy.linears import Linear


class DenseWeights:
    """A copy of the layers' weights and biases, to bring the dense model back afterwards."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._copies = [
            (layer, layer.weight.clone(), None if layer.bias is None else layer.bias.clone())
            for layer in layers
        ]

    def restore(self) -> None:
        """Write the copies back into the model; a bias that was not there before becomes zero."""
        for layer, weight, bias in self._copies:
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias if bias is not None else torch.zeros_like(layer.bias))
