"""On what are masks looked at before they are measured? On some rows of every layer, drawn once.

Layers of one shape are kept as a stack, so that a formula is computed on all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prunezero.models.units import Layer
from prunezero.scoring.feature_values import feature, needed_sums
from prunezero.scoring.statistics import Statistics

# Its share of the Fisher information weighs the error of an output.
ROW_WEIGHTS = "output_gradient_square_sum"


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


@dataclass(frozen=True)
class Stack:
    """Samples of one shape."""

    names: tuple[str, ...]
    """of the layers"""
    features: Mapping[str, Tensor]
    """by name, `[layers, 1 or rows, 1 or in]`"""
    grams: Sequence[Tensor] | Tensor
    """one for each layer, by `side_by_side`; none where only masks are asked for"""
    row_weights: Tensor
    """`[layers, rows]`"""

    @property
    def weight(self) -> Tensor:
        """The sampled rows, `[layers, rows, in]`."""
        return self.features["W"]

    def energy(self, rows: Tensor) -> Tensor:
        """What outputs these rows `[layers, rows, in]` make, squared and weighted, `[layers]`."""
        inputs = rows.to(self.grams[0].dtype)
        if isinstance(self.grams, Tensor):
            products = torch.bmm(inputs, self.grams)
        else:
            pairs = zip(inputs, self.grams, strict=True)
            products = torch.stack([one @ gram for one, gram in pairs])
        energy = (products.float() * rows).sum(dim=2) * self.row_weights
        # A layer whose outputs never matter must not divide by zero.
        return energy.sum(dim=1, dtype=torch.float64).clamp_min(1e-30)

    @cached_property
    def whole_energy(self) -> Tensor:
        """The energy of all sampled rows, of which `layer_error` takes a share."""
        return self.energy(self.weight)


def side_by_side(grams: Sequence[Tensor]) -> Sequence[Tensor] | Tensor:
    """Gram matrices as a stack has them: on a CPU as they are, for layers to share them.

    Elsewhere as one `[layers, in, in]`, because a call for each layer takes longer than its work.
    """
    is_elsewhere = bool(grams) and grams[0].device.type != "cpu"
    return torch.stack(tuple(grams)) if is_elsewhere else tuple(grams)


def stacked(samples: Sequence[Sample]) -> list[Stack]:
    """The samples in stacks, by shape, each in the order in which they come."""
    by_shape: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_shape.setdefault(tuple(sample.features["W"].shape), []).append(sample)
    return [_stack(alike) for alike in by_shape.values()]


def _stack(samples: Sequence[Sample]) -> Stack:
    return Stack(
        tuple(sample.name for sample in samples),
        {
            name: torch.stack([sample.features[name] for sample in samples])
            for name in samples[0].features
        },
        side_by_side([sample.gram for sample in samples if sample.gram is not None]),
        torch.stack([sample.row_weights for sample in samples]),
    )


def ladder_sums(features: Iterable[str], *, with_gradients: bool) -> frozenset[str]:
    """Names of the sums over calibration text that the ladder needs for these features."""
    return needed_sums(features) | {"gram"} | ({ROW_WEIGHTS} if with_gradients else set())


def sample_rows(
    layers: Sequence[Layer],
    statistics: Mapping[str, Statistics],
    features: Sequence[str],
    *,
    share: float = 0.04,
    seed: int = 0,
) -> list[Sample]:
    """Rows of every layer, drawn once and then the same for every formula.

    Column and layer features are those of the whole layer; a reduction that a formula spells out
    itself, such as `col_sum(abs(W))`, sees the sampled rows. Gram matrices are in bfloat16 where
    the weights are: quicker where the processor has units for it, and on the demo model the mean
    over layers changes by less than one part in ten thousand (one layer's by up to 0.3 %).

    Args:
        share: fraction of the rows of a layer; at least 8 rows are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    read: Tensor | None = None
    for layer in layers:
        known = statistics[layer.name]
        weight = layer.weight
        count = min(weight.shape[0], max(8, round(share * weight.shape[0])))
        rows = torch.randperm(weight.shape[0], generator=generator)[:count].sort().values
        rows = rows.to(weight.device)
        values = {name: feature(name, weight, known) for name in {*features, "W"}}
        sampled = {
            name: value[rows].contiguous() if value.shape[0] > 1 else value
            for name, value in values.items()
        }
        alike = torch.ones(weight.shape[0], device=weight.device)
        squares = known.sums.get(ROW_WEIGHTS, alike)[rows].float() / known.tokens
        # Layers that read the same inputs, as q, k and v do, hold one matrix.
        gram = known.sums["gram"]
        if read is None or read.shape != gram.shape or not torch.equal(read, gram):
            read = gram
            kept = gram.bfloat16() if weight.dtype == torch.bfloat16 else gram
        samples.append(Sample(layer.name, sampled, kept, squares))
    return samples


def probe_of(samples: Sequence[Sample], *, layers: int = 14, rows: int = 8) -> list[Sample]:
    """The few rows of a few layers on which masks are told apart."""
    step = max(1, len(samples) // layers)
    # An odd step walks through the kinds of projection, of which a Llama block has seven.
    step += step % 2 == 0
    return [
        Sample(
            sample.name,
            {
                name: value[:rows] if value.shape[0] > 1 else value
                for name, value in sample.features.items()
            },
            None,
            sample.row_weights[:rows],
        )
        for sample in samples[::step]
    ]
