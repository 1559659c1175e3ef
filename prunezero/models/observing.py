"""How do the inputs and outputs of layers reach their statistics during a forward pass?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunezero.models.units import Layer
from prunezero.scoring.statistics import SUMS, Contribution, Statistics, contribution


def empty_statistics(layer: Layer, sums: Iterable[str]) -> Statistics:
    """Statistics of nothing yet, of the layer's shape and on its device."""
    rows, columns = layer.weight.shape
    return Statistics.empty(sums, rows, columns, layer.weight.device)


@contextmanager
def observing(layers: list[Layer], collected: dict[str, Statistics]) -> Iterator[None]:
    """Within it, every forward of the layers adds to their statistics, found by layer name.

    Raises:
        StatisticsError: an input or output is not finite.
    """
    reuse = _LastContribution()
    handles = []
    for layer in layers:
        statistics = collected[layer.name]
        handles.append(layer.module.register_forward_hook(_adding(layer, statistics, reuse)))
    with removing(handles):
        yield


def _adding(
    layer: Layer, statistics: Statistics, reuse: _LastContribution
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    sources = {SUMS[name].source for name in statistics.sums}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if "inputs" in sources:
            statistics.add(reuse.of(args[0], statistics.sums, layer.name))
        if "outputs" in sources:
            statistics.add_outputs(output, layer=layer.name)

    return hook


class _LastContribution:
    """Remembers the last input, because query, key and value layers all read the same tensor."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = -1
        self._added: Contribution | None = None

    def of(self, tensor: Tensor, sums: Iterable[str], layer: str) -> Contribution:
        """The contribution of the inputs, computed once for layers that share them."""
        # The tensor is kept, so that its address cannot be given to another one meanwhile.
        known = self._tensor is not None and _is_view_of_same(tensor, self._tensor)
        if not known or self._version != tensor._version or self._added is None:
            self._added = contribution("inputs", tensor, sums, layer=layer)
            self._tensor, self._version = tensor, tensor._version
        return self._added


def _is_view_of_same(left: Tensor, right: Tensor) -> bool:
    same_place = left.data_ptr() == right.data_ptr() and left.stride() == right.stride()
    return same_place and left.shape == right.shape and left.dtype == right.dtype


@contextmanager
def removing(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end, after an error too."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
