"""What `scoring.py` measures of many formulas on the sampled rows of a model's layers.

That is what a search asks on its cheap rung: the masks of a formula on 4 % of the rows of every
layer, and how much of the layers' outputs they lose, by the Gram matrices of the inputs. Layers of
one shape lie in a stack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from published_selection import REQUESTS, SPARSITY
from scoring_parts import MODELS, Row, Work, item_bytes
from torch import Tensor

from prunezero.errors import CriterionError, ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.scoring.score import evaluate, refuse_unusable
from prunezero.searching.proxies.layer_error import layer_error, masks_on, scores_on
from prunezero.searching.proxies.samples import Stack, grams_of

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


def population_work(head: Row, *, with_compile: bool) -> dict[str, Work]:
    """Masks, and masks with their errors, of 1, 8 and 64 formulas."""
    found = list(stacks(head))
    pattern = REQUESTS[head["request"]][0]
    every = formulas()
    works = {}
    for count in TOGETHER:
        groups = [every[:count]] if count > 1 else [[one] for one in every[:SINGLE]]
        facts = {"formulas": count, "rounds": len(groups)}
        masks_alone = partial(_masks_alone, found, groups, pattern)
        with_errors = partial(_errors, found, groups, pattern)
        works[f"{count} to masks"] = Work(masks_alone, facts)
        works[f"{count} to errors"] = Work(with_errors, facts)
    return works


def _masks_alone(
    found: list[Stack], groups: list[list[Criterion]], pattern: str, number: int
) -> None:
    for group in groups:
        for _ in _masks(found, group, pattern):
            pass


def _errors(
    found: list[Stack], groups: list[list[Criterion]], pattern: str, number: int
) -> list[float]:
    """The layer error of each formula."""
    return [
        layer_error(found, masks) for group in groups for masks in _masks(found, group, pattern)
    ]


def _masks(found: list[Stack], group: Sequence[Criterion], pattern: str) -> Iterator[list[Tensor]]:
    for criterion, scores in zip(group, scores_on(found, group), strict=True):
        recipe = Recipe(name="one", criterion=criterion)
        yield masks_on(found, recipe, SPARSITY, pattern, scores=scores)


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
        grams = grams_of([one.T @ one for one in inputs])
        names = tuple(f"layer {place}" for place in range(layers))
        yield Stack(names, features, grams, draw(layers, rows).square())


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
    squares = [layers * columns**2 for layers, _, columns in found]
    # Each stack's are put side by side once.
    grams = (sum(squares) + max(squares)) * item_bytes(head)
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
