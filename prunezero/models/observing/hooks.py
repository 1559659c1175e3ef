"""How do the inputs and outputs of layers reach their statistics during a forward pass?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunezero.models.anatomy.linears import Linear
from prunezero.models.observing.expert_calls import calling_experts
from prunezero.scoring.statistics import SUMS, Contribution, Statistics, contribution


def empty_statistics(layer: Linear, sums: Iterable[str]) -> Statistics:
    """Statistics of nothing yet, of the layer's shape and on its device."""
    rows, columns = layer.weight.shape
    return Statistics.empty(sums, rows, columns, layer.weight.device)


class StopForwardError(Exception):
    """Raised on purpose where a forward pass has shown all that was asked of it."""


class Visits:
    """Which layers the current sequence has reached.

    A sequence may stop early only when the one before it reached every layer exactly once: where
    text decides which layers run, and how often, all of it has to run.
    """

    def __init__(self, layers: Sequence[Linear], *, stop_early: bool) -> None:
        self._wanted = sorted(layer.name for layer in layers)
        self._reached: list[str] = []
        self._stop_early = stop_early
        self._each_once = False

    def add(self, name: str) -> None:
        """Note a layer whose inputs were added.

        Raises:
            StopForwardError: it was the last; nothing of this sequence is left to be seen.
        """
        self._reached.append(name)
        if self._stop_early and self._each_once and len(self._reached) == len(self._wanted):
            raise StopForwardError

    def end_sequence(self) -> None:
        """The sequence went through, or was stopped; the next one begins."""
        self._each_once = sorted(self._reached) == self._wanted
        self._reached.clear()


@contextmanager
def observing(
    layers: list[Linear], collected: dict[str, Statistics], *, stop_early: bool = False
) -> Iterator[Visits]:
    """Within it, every forward of the layers adds to their statistics, found by layer name.

    Args:
        stop_early: nobody needs what comes behind the layers, so a forward may end by a
            `StopForwardError`; never where sums of outputs are collected.

    Raises:
        StatisticsError: an input or output is not finite.
    """
    reuse = _LastContribution()
    sources = {SUMS[name].source for layer in layers for name in collected[layer.name].sums}
    visits = Visits(layers, stop_early=stop_early and sources == {"inputs"})
    handles: list[Any] = []
    for layer in layers:
        statistics = collected[layer.name]
        if "inputs" in sources:
            hook = _adding_inputs(layer, statistics, reuse, visits)
            handles.append(layer.module.register_forward_pre_hook(hook))
        if "outputs" in sources:
            handles.append(layer.module.register_forward_hook(_adding_outputs(layer, statistics)))
    with removing(handles), calling_experts(layers):
        yield visits


def _adding_inputs(
    layer: Linear, statistics: Statistics, reuse: _LastContribution, visits: Visits
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        statistics.add(reuse.of(args[0], statistics.sums, layer.name))
        visits.add(layer.name)

    return hook


def _adding_outputs(
    layer: Linear, statistics: Statistics
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
