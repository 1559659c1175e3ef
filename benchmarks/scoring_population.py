"""What `scoring.py` measures of many formulas on the sampled rows of a model's layers.

That is what a search asks on its cheap rung: the masks of a formula on 4 % of the rows of every
layer, and how much of the layers' outputs they lose, by the Gram matrices of the inputs. Layers of
one shape lie in a stack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from published_selection import REQUESTS, SPARSITY
from scoring_parts import MODELS, Row, Work, item_bytes
from torch import Tensor

from prunezero.errors import CriterionError, ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.scoring.masking import cleared
from prunezero.scoring.population import select_stacked, stacked_scores
from prunezero.scoring.score import evaluate, refuse_unusable

# How many formulas go at once; one after the other, so many as to even out what they cost.
TOGETHER = (1, 8, 64)
SINGLE = 8
SHARE = 0.04
FEWEST_ROWS = 8
# Tokens from which a Gram matrix is made.
TOKENS = 64
# Scores that kernels write at once, as in `scoring/population.py`, with their masks.
WRITTEN = 5 << 27
# Values that occur among hundreds of millions, and a score that stays finite beside worse ones.
NEAREST_ZERO, FARTHEST = 1e-9, 1e25

_FEATURES = ("W", "X", "G")
_UNARY = ("abs({})", "sqr({})", "sqrt({})", "log({} + 1)", "exp(-abs({}))", "tanh({})")
_BINARY = ("({} + {})", "({} - {})", "({} * {})", "({} / {})")


@dataclass(frozen=True)
class Stack:
    """Sampled rows of layers of one shape."""

    features: dict[str, Tensor]
    """float32, [layers, rows or 1, in]"""
    gram: Tensor
    """[layers, in, in]"""
    row_weights: Tensor
    """[layers, rows]"""

    @property
    def weight(self) -> Tensor:
        """The sampled rows, [layers, rows, in]."""
        return self.features["W"]

    def energy(self, rows: Tensor) -> Tensor:
        """What rows [layers, rows, in] make of the outputs, weighted; [layers]."""
        through = rows.to(self.gram.dtype) @ self.gram
        return ((through * rows).sum(2, dtype=torch.float32) * self.row_weights).sum(1)


def population_work(head: Row, *, with_compile: bool) -> dict[str, Work]:
    """Masks, and masks with their errors, of 1, 8 and 64 formulas."""
    found = list(stacks(head))
    whole = [stack.energy(stack.weight) for stack in found]
    pattern = REQUESTS[head["request"]][0]
    every = formulas()
    works = {}
    for count in TOGETHER:
        groups = [every[:count]] if count > 1 else [[one] for one in every[:SINGLE]]
        facts = {"formulas": count, "rounds": len(groups)}
        masks_alone = partial(_masks_alone, found, groups, pattern)
        with_errors = partial(_errors, found, whole, groups, pattern)
        works[f"{count} to masks"] = Work(masks_alone, facts)
        works[f"{count} to errors"] = Work(with_errors, facts)
    return works


def _masks_alone(
    found: list[Stack], groups: list[list[Criterion]], pattern: str, number: int
) -> None:
    for group in groups:
        for stack in found:
            for _ in _masks(stack, group, pattern):
                pass


def _errors(
    found: list[Stack],
    whole: list[Tensor],
    groups: list[list[Criterion]],
    pattern: str,
    number: int,
) -> list[float]:
    """The mean share of a layer's outputs that is lost, by formula."""
    lost = []
    for group in groups:
        by_stack = [
            torch.stack([_lost(stack, mask) / energy for mask in _masks(stack, group, pattern)])
            for stack, energy in zip(found, whole, strict=True)
        ]
        lost += torch.cat(by_stack, dim=1).mean(1).tolist()
    return lost


def _masks(stack: Stack, group: Sequence[Criterion], pattern: str) -> Iterator[Tensor]:
    for scores in stacked_scores(group, stack.features, stack.weight.shape):
        yield select_stacked(scores, SPARSITY, compare="row", pattern=pattern)


def _lost(stack: Stack, mask: Tensor) -> Tensor:
    return stack.energy(cleared(stack.weight, ~mask))


def stacks(head: Row) -> Iterator[Stack]:
    """Random rows, features and Gram matrices, in the shapes of a model."""
    device, dtype = head["device"], getattr(torch, head["dtype"])
    generator = torch.Generator(device).manual_seed(0)
    draw: Callable[..., Tensor] = partial(torch.randn, generator=generator, device=device)
    for layers, rows, columns in sampled(head["shape"]):
        inputs = draw(layers, TOKENS, columns)
        features = {
            "W": draw(layers, rows, columns),
            "G": draw(layers, rows, columns).abs(),
            "X": torch.linalg.vector_norm(inputs, dim=1, keepdim=True),
        }
        inputs = inputs.to(dtype)
        yield Stack(features, inputs.transpose(1, 2) @ inputs, draw(layers, rows).square())


def sampled(model: str) -> list[tuple[int, int, int]]:
    """Layers, sampled rows and columns of every stack."""
    blocks, shapes = MODELS[model]
    return [
        (blocks * count, min(rows, max(FEWEST_ROWS, round(SHARE * rows))), columns)
        for (rows, columns), count in shapes.items()
    ]


def population_bytes(head: Row) -> int:
    """Bytes that `population_work` takes at most."""
    found = sampled(head["shape"])
    grams = sum(layers * columns**2 for layers, _, columns in found) * item_bytes(head)
    rows = [layers * count * columns for layers, count, columns in found]
    on_the_way = WRITTEN if head["device"] == "cuda" else 0
    return grams + 8 * sum(rows) + 32 * max(rows) + on_the_way


@lru_cache(maxsize=1)
def formulas() -> list[Criterion]:
    """Sixty-four different formulas of W, X and G, always the same."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([NEAREST_ZERO, 1.0, 10.0])

    def draw(rows: int) -> Tensor:
        which = torch.randint(3, (rows, 256), generator=generator)
        return torch.randn(rows, 256, generator=generator) * scales[which]

    features = {"W": draw(64), "G": draw(64).abs(), "X": draw(1).abs()}
    found: dict[Criterion, Any] = {}
    while len(found) < max(TOGETHER):
        criterion = _usable(_grown(rng, 4), features)
        if criterion is not None:
            found[criterion] = None
    return list(found)


def _grown(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(_FEATURES)
    if rng.random() < 0.4:
        return rng.choice(_UNARY).format(_grown(rng, depth - 1))
    return rng.choice(_BINARY).format(_grown(rng, depth - 1), _grown(rng, depth - 1))


def _usable(text: str, features: dict[str, Tensor]) -> Criterion | None:
    """The criterion, if it tells weights apart and stays far from infinity at extreme values."""
    try:
        criterion = Criterion.parse(text)
        if criterion.shape != "element":
            return None
        read = {name: features[name] for name in criterion.features}
        scores = evaluate(criterion, read, features["W"].shape)
        refuse_unusable(scores, criterion, features["W"], "")
    except (CriterionError, ScoreError):
        return None
    return criterion if float(scores.abs().max()) < FARTHEST else None
