"""Samples that masks are looked at on: some rows of every layer, drawn once.

Layers of one shape are kept as a stack, so that a formula is computed on all of them at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from prunezero.formula.features import FEATURES
from prunezero.models.anatomy.linears import Linear
from prunezero.models.anatomy.patterns import fits
from prunezero.pruning.kinds import UNITS
from prunezero.scoring.feature_values import feature, needed_sums
from prunezero.scoring.second_order import DAMPING, OF_FACTOR
from prunezero.scoring.statistics import BLOCK_SUMS, Statistics

# Its share of the Fisher information weighs the error of an output.
ROW_WEIGHTS = "output_gradient_square_sum"
# Of the rows of a layer.
SHARE = 0.04


@dataclass(frozen=True)
class Sample:
    """Some rows of one layer, with everything that any formula of the space may look at."""

    name: str
    """of the layer"""
    features: Mapping[str, Tensor]
    """by name; a feature that varies by row holds the sampled rows only"""
    gram: Tensor | None
    """`[in, in]`; None where only masks are asked for"""
    row_weights: Tensor
    """mean square of the loss gradient at each sampled output, `[rows]`; ones without gradients"""
    damped: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    """by damping, the features that depend on it; `features` has them as of the usual one"""


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of some layers, of which those that read the same inputs share one."""

    batches: tuple[tuple[Tensor, Tensor], ...]
    """matrices `[matrices, in, in]`, and places of their layers `[matrices, layers that share]`"""

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        return self.batches[0][0].dtype

    def times(self, inputs: Tensor) -> Tensor:
        """What every layer's rows `[layers, rows, in]` make with its matrix, of the same shape."""
        products = torch.empty_like(inputs)
        for matrices, places in self.batches:
            rows = inputs[places].flatten(1, 2)
            # A product by itself is quicker than a batch of one.
            one = rows[0] @ matrices[0] if len(matrices) == 1 else torch.bmm(rows, matrices)
            products[places] = one.view(*places.shape, *inputs.shape[1:])
        return products


def grams_of(layers: Sequence[Tensor], *, side_by_side: bool | None = None) -> Grams:
    """Matrices of layers, one each, so that few products serve all of them.

    Args:
        side_by_side: copy matrices that as many layers share into one tensor. By default not on a
            CPU; elsewhere a product for each would take longer to ask for than to compute.
    """
    places: dict[int, list[int]] = {}
    for place, gram in enumerate(layers):
        places.setdefault(id(gram), []).append(place)
    if side_by_side is None:
        side_by_side = any(gram.device.type != "cpu" for gram in layers)
    batches: dict[int, list[list[int]]] = {}
    for sharing in places.values():
        batches.setdefault(len(sharing) if side_by_side else sharing[0], []).append(sharing)
    return Grams(tuple(_batch(layers, alike) for alike in batches.values()))


def _batch(layers: Sequence[Tensor], alike: list[list[int]]) -> tuple[Tensor, Tensor]:
    matrices = [layers[sharing[0]] for sharing in alike]
    together = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
    return together, torch.tensor(alike, device=together.device)


@dataclass(frozen=True)
class Stack:
    """Samples of one shape."""

    names: tuple[str, ...]
    """of the layers"""
    features: Mapping[str, Tensor]
    """by name, `[layers, 1 or rows, 1 or in]`"""
    grams: Grams
    """of all layers, by `grams_of`; empty where only masks are asked for"""
    row_weights: Tensor
    """`[layers, rows]`"""
    damped: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    """by damping, the features that depend on it; `features` has them as of the usual one"""

    def at_damping(self, damping: float) -> Stack:
        """The same, with the features that depend on it as of a recipe's damping.

        Raises:
            KeyError: it is none of those that were sampled.
        """
        if damping == DAMPING or self.features.keys().isdisjoint(OF_FACTOR):
            return self
        return replace(self, features={**self.features, **self.damped[damping]})

    @property
    def weight(self) -> Tensor:
        """The sampled rows, `[layers, rows, in]`."""
        return self.features["W"]

    def energy(self, rows: Tensor) -> Tensor:
        """What outputs these rows `[layers, rows, in]` make, squared and weighted, `[layers]`."""
        inputs = rows.to(self.grams.dtype)
        products = self.grams.times(inputs)
        energy = (products.float() * rows).sum(dim=2) * self.row_weights
        # A layer whose outputs never matter must not divide by zero.
        return energy.sum(dim=1, dtype=torch.float64).clamp_min(1e-30)

    @cached_property
    def whole_energy(self) -> Tensor:
        """The energy of all sampled rows, of which `layer_error` takes a share."""
        return self.energy(self.weight)


def stacked(samples: Sequence[Sample]) -> list[Stack]:
    """The samples in stacks, by shape, each in the order in which they come."""
    by_shape: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_shape.setdefault(tuple(sample.features["W"].shape), []).append(sample)
    return [_stack(alike) for alike in by_shape.values()]


def _stack(samples: Sequence[Sample]) -> Stack:
    return Stack(
        tuple(sample.name for sample in samples),
        _stacked_features([sample.features for sample in samples]),
        grams_of([sample.gram for sample in samples if sample.gram is not None]),
        torch.stack([sample.row_weights for sample in samples]),
        {
            damping: _stacked_features([sample.damped[damping] for sample in samples])
            for damping in samples[0].damped
        },
    )


def _stacked_features(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def rung_sums(
    features: Iterable[str], *, with_gradients: bool, unit: str = "weight"
) -> frozenset[str]:
    """Names of the sums of linear maps that the rungs need for formulas of these features."""
    # What whole experts do is observed by mixture, see `requirements.observed_sums`.
    if UNITS[unit].domain.name == "expert":
        return frozenset()
    needed = needed_sums(features) - BLOCK_SUMS.keys()
    if UNITS[unit].is_of_depth:
        return needed
    also = {"gram"} if unit == "weight" else {"gram", "input_sum"}
    return needed | also | ({ROW_WEIGHTS} if with_gradients else set())


def sample_rows(
    layers: Sequence[Linear],
    statistics: Mapping[str, Statistics],
    features: Sequence[str],
    *,
    dampings: Iterable[float] = (),
    share: float = SHARE,
    seed: int = 0,
) -> list[Sample]:
    """Rows of every layer, drawn once and then the same for every formula.

    Column and layer features are those of the whole layer; a reduction that a formula spells out
    itself, such as `col_sum(abs(W))`, sees the sampled rows. Gram matrices are in bfloat16 where
    the weights are: quicker where the processor has units for it, and on the demo model the mean
    over layers changes by less than one part in ten thousand (one layer's by up to 0.3 %).

    Args:
        dampings: of recipes, where others than the usual one are asked for.
        share: fraction of the rows of a layer; at least 8 rows are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    read: Tensor | None = None
    for layer in layers:
        known = statistics[layer.name]
        weight = layer.weight
        count = _row_count(weight.shape[0], share)
        rows = torch.randperm(weight.shape[0], generator=generator)[:count].sort().values
        rows = rows.to(weight.device)
        values = {name: feature(name, weight, known) for name in {*features, "W"}}
        sampled = {
            name: value[rows].contiguous() if value.shape[0] > 1 else value
            for name, value in values.items()
        }
        damped = {
            damping: {
                name: feature(name, weight, known, damping=damping)
                for name in OF_FACTOR
                if name in features
            }
            for damping in {*dampings} - {DAMPING}
        }
        alike = torch.ones(weight.shape[0], device=weight.device)
        squares = known.sums.get(ROW_WEIGHTS, alike)[rows].float() / known.tokens
        # Layers that read the same inputs, as q, k and v do, hold one matrix.
        gram = known.sums["gram"]
        if read is None or read.shape != gram.shape or not torch.equal(read, gram):
            read = gram
            kept = gram.bfloat16() if weight.dtype == torch.bfloat16 else gram
        samples.append(Sample(layer.name, sampled, kept, squares, damped))
    return samples


def sample_bytes(
    layers: Sequence[Linear],
    features: Iterable[str],
    *,
    readers: Sequence[Sequence[str]],
    dampings: Iterable[float] = (),
    holds_grams: bool = True,
    is_cpu: bool = True,
) -> tuple[int, int]:
    """Bytes of what `sample_rows` and `stacked` keep of some layers, and take while they work.

    Args:
        features: that a formula may look at.
        readers: names of layers of the first block, those that read the same inputs together.
        dampings: of recipes, where others than the usual one are asked for.
        holds_grams: whether Gram matrices are not in memory anyway.
        is_cpu: elsewhere Gram matrices are copied side by side.
    """
    names = {*features, "W"}
    damped = [name for name in OF_FACTOR if name in names] * len({*dampings} - {DAMPING})
    shapes = Counter(FEATURES[name].shape for name in [*names, *damped])
    rows = kept = 0
    for layer in layers:
        height, width = layer.weight.shape
        count = _row_count(height, SHARE)
        kept += 4 * (shapes["element"] * count * width + shapes["column"] * width + count)
        kept += 4 * shapes["row"] * count
        rows = max(rows, 4 * height * width * shapes["element"])
    grams = sum(layer.weight.shape[1] ** 2 for layer in _one_of_each(layers, readers))
    size = 2 if layers[0].weight.dtype == torch.bfloat16 else 4
    own = size * grams if holds_grams or size == 2 else 0
    # Layers that are tuned on stand in a stack of their own, and so does the probe.
    again = round(kept * (1 + 1 / 3 + 0.1))
    if is_cpu:
        return again + own, kept + rows
    return again + round(size * grams * (1 + 1 / 3)), kept + rows + own


def _one_of_each(layers: Sequence[Linear], readers: Sequence[Sequence[str]]) -> list[Linear]:
    """Layers without those that read what another one of the same block does."""
    first = {layer.name: layer.kind for layer in layers if layer.block == layers[0].block}
    known = [[first[name] for name in names if name in first] for names in readers]
    others = {kind for kinds in known for kind in kinds[1:]}
    return [layer for layer in layers if layer.kind not in others]


def _row_count(rows: int, share: float) -> int:
    return min(rows, max(8, round(share * rows)))


def probe_of(
    samples: Sequence[Sample], *, layers: int = 14, rows: int = 8, kinds: Sequence[str] = ()
) -> list[Sample]:
    """The few rows of a few layers on which masks are told apart.

    Args:
        kinds: patterns, of each of which the first layer is among them.
    """
    step = max(1, len(samples) // layers)
    # An odd step walks through the kinds of projection, of which a Llama block has seven.
    step += step % 2 == 0
    chosen = {sample.name for sample in samples[::step]}
    for kind in kinds:
        alike = [sample.name for sample in samples if fits(kind, sample.name)]
        if chosen.isdisjoint(alike):
            chosen.update(alike[:1])
    return [
        Sample(
            sample.name,
            {
                name: value[:rows] if value.shape[0] > 1 else value
                for name, value in sample.features.items()
            },
            None,
            sample.row_weights[:rows],
            sample.damped,
        )
        for sample in samples
        if sample.name in chosen
    ]
