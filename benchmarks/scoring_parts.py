"""What `scoring.py` measures of one matrix, of a plain copy, and of all layers of a model.

Every call reads another copy of its inputs, as a pruning reads another layer, so that they come
from memory and not from a cache that the call before has filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from published_selection import (
    FORMULAS,
    REQUESTS,
    SPARSITY,
    Score,
    compiled,
    removed_by_published,
    removed_by_topk,
)
from torch import Tensor
from turns import Call

from prunezero.formula.criterion import Criterion
from prunezero.scoring.fused import Selected, selected
from prunezero.scoring.request import checked_request
from prunezero.scoring.score import keep_mask, mask_from
from prunezero.scoring.statistics import Statistics

# Bytes of all copies of one input together, more than the caches nearest to a processor hold.
COLD = 1 << 29
COPIED = 1 << 30
# Bytes for every weight that the costliest contender holds at once: a score with the values on the
# way to it, and a sort with its order and its working space.
HELD = 60
# Blocks of a model, and the linear layers of each by shape.
MODELS: dict[str, tuple[int, dict[tuple[int, int], int]]] = {
    "demo": (30, {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}),
    "7b": (32, {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}),
}

Row = dict[str, Any]
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """What one contender does."""

    call: Call
    facts: Row = field(default_factory=dict)
    """what its row says besides"""
    says_kept: bool = False
    """whether its masks say True for what stays; those of the others, for what goes"""


def copy_work(head: Row, *, with_compile: bool) -> dict[str, Work]:
    """A copy within the memory of the device, into memory that is there already."""
    source = torch.ones(COPIED // 4, device=head["device"])
    target = torch.zeros_like(source)
    return {"copy": Work(lambda number: target.copy_(source), {"bytes": 2 * COPIED})}


def copy_bytes(head: Row) -> int:
    """Bytes that `copy_work` takes."""
    return 2 * COPIED


def matrix_work(head: Row, *, with_compile: bool) -> dict[str, Work]:
    """Score and mask of one matrix by every contender."""
    formula, pattern = FORMULAS[head["formula"]], REQUESTS[head["request"]][0]
    rows, columns = sizes(head["shape"])
    pool = copies(random_values(rows, columns, formula.matrices, head), formula.matrices)
    moved = sum(pool[0][name].nbytes for name in formula.matrices) + rows * columns
    criterion = Criterion.parse(formula.text)

    def plain(score: Score, removed: Any) -> Call:
        return lambda number: removed(score(pool[number % len(pool)]), pattern)

    calls = {
        "published": plain(formula.eager, removed_by_published),
        "topk": plain(formula.eager, removed_by_topk),
    }
    if with_compile:
        score = compiled(formula.eager, torch.device(head["device"]))
        calls["compiled"] = plain(score, removed_by_published)
    works = {name: Work(call, {"bytes": moved}) for name, call in calls.items()}
    works["prunezero"] = Work(
        lambda number: kept(criterion, pool[number % len(pool)], pattern),
        {"bytes": moved},
        says_kept=True,
    )
    if head["device"] == "cuda":
        request = checked_request(columns, SPARSITY, pattern=pattern)
        chosen = [partial(selected, criterion, one["W"], one, request) for one in pool]
        facts = {"bytes": moved, "rounds": len(pool)}
        works["kernels"] = Work(replayed(chosen), facts, says_kept=True)
    return works


def replayed(chosen: Sequence[Callable[[], Selected]]) -> Call:
    """All these selections as one CUDA graph: what the device does, without what asks it to."""
    for select in chosen[:2]:
        select()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = [select().kept for select in chosen]

    def replay(number: int) -> Tensor:
        graph.replay()
        return masks[0]

    return replay


def matrix_bytes(head: Row) -> int:
    """Bytes that `matrix_work` takes at most."""
    rows, columns = sizes(head["shape"])
    inputs = len(FORMULAS[head["formula"]].matrices) * rows * columns * item_bytes(head)
    # The graph of kernels keeps a mask for every copy.
    copied = max(2 * inputs, COLD + inputs)
    masks = copied // inputs * rows * columns if head["device"] == "cuda" else 0
    return copied + masks + HELD * rows * columns


def kept(criterion: Criterion, values: Values, pattern: str) -> Tensor:
    """The mask of prunezero; `keep_mask` does the same, after it has made the features."""
    # Kernels read any dtype, and torch computes in float32.
    on_cpu = values["W"].device.type == "cpu"
    features = {
        name: values[name].float() if on_cpu else values[name] for name in criterion.features
    }
    return mask_from(criterion, values["W"], features, SPARSITY, pattern=pattern)


def model_work(head: Row, *, with_compile: bool) -> dict[str, Work]:
    """Wanda at 50 % by rows on every linear layer of a model, one after the other."""
    formula, pattern = FORMULAS[head["formula"]], REQUESTS[head["request"]][0]
    criterion = Criterion.parse(formula.text)
    blocks, shapes = MODELS[head["shape"]]
    pools = {}
    for shape in shapes:
        pools[shape] = copies(random_values(*shape, ("W",), head), ("W",))
    layers = [shape for _ in range(blocks) for shape in shapes for _ in range(shapes[shape])]
    statistics = {
        shape: Statistics(1, 1, {"input_square_sum": pool[0]["X"][0].double().square()})
        for shape, pool in pools.items()
    }

    def published(number: int) -> None:
        for place, shape in enumerate(layers):
            values = pools[shape][place % len(pools[shape])]
            removed_by_published(formula.eager(values), pattern)

    def ours(number: int) -> None:
        for place, shape in enumerate(layers):
            weight = pools[shape][place % len(pools[shape])]["W"]
            keep_mask(criterion, weight, statistics[shape], SPARSITY, pattern=pattern)

    facts = {"weights": sum(math.prod(shape) for shape in layers)}
    return {"published": Work(published, facts), "prunezero": Work(ours, facts)}


def model_bytes(head: Row) -> int:
    """Bytes that `model_work` takes at most."""
    weights = [math.prod(shape) for shape in MODELS[head["shape"]][1]]
    inputs = [item_bytes(head) * one for one in weights]
    return sum(max(2 * one, COLD + one) for one in inputs) + HELD * max(weights)


def random_values(rows: int, columns: int, matrices: tuple[str, ...], head: Row) -> Values:
    """Features of a matrix: those as large as it in the dtype asked for, norms in float32."""
    generator = torch.Generator(head["device"]).manual_seed(0)
    dtype = getattr(torch, head["dtype"])
    given: Row = {"generator": generator, "device": head["device"]}
    values = {"X": torch.rand(1, columns, **given) + 0.1}
    values["W"] = torch.randn(rows, columns, **given).to(dtype)
    if "G" in matrices:
        values["G"] = torch.randn(rows, columns, **given).abs().to(dtype)
    return values


def copies(values: Values, matrices: tuple[str, ...]) -> list[Values]:
    """The same values in so many places that no cache holds all of them."""
    size = sum(values[name].nbytes for name in matrices)
    return [
        {**values, **{name: values[name].clone() for name in matrices}}
        for _ in range(max(2, math.ceil(COLD / size)))
    ]


def sizes(shape: str) -> tuple[int, int]:
    """Rows and columns in a word such as 4096x11008."""
    rows, columns = shape.split("x")
    return int(rows), int(columns)


def item_bytes(head: Row) -> int:
    """Bytes of one value."""
    return getattr(torch, head["dtype"]).itemsize
