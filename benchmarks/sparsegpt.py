"""How much quicker is our sweep than the published loop, over every layer of a model?

    python benchmarks/sparsegpt.py --pattern free
    python benchmarks/sparsegpt.py --pattern 2:4

Both start from the same weights and Gram matrices and include damping and factorization. The loop
follows algorithm 1 of SparseGPT (arXiv:2301.00774) as it is usually written in torch: blocks of 128
columns, in them one column after the other in float32, and a factor for every matrix. Each layer is
timed in both orders and its shortest time counts; the weights must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.editing.zeroing import DenseWeights
from prunezero.pruning.prune import prune_layers
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings, set_up, with_choices
from prunezero.scoring.request import parse_pattern
from prunezero.scoring.statistics import Statistics

BLOCK = 128
DAMPING = 0.01


def main() -> None:
    """Time both over all layers, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pattern", default="free")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--blocks", type=int, help="only the first so many blocks")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = Settings(calibration_tokens=arguments.calibration_tokens)
    testbed = set_up(arguments.model, "demo", settings, device=arguments.device)
    layers = find_linears(testbed.language_model.model)
    layers = [layer for layer in layers if layer.block < (arguments.blocks or len(layers))]
    statistics = testbed.statistics(layers, {"gram"})
    recipe = with_choices(Recipe.load("sparsegpt"), pattern=arguments.pattern)
    totals = {"ours": 0.0, "published": 0.0}
    largest, different, count = 0.0, 0, 0
    for block in range(1 + max(layer.block for layer in layers)):
        inside = [layer for layer in layers if layer.block == block]
        seconds, found = _timed(recipe, inside, statistics)
        for name in totals:
            totals[name] += seconds[name]
        for ours, published in zip(found["ours"], found["published"], strict=True):
            differs = (ours == 0) != (published == 0)
            different += int(differs.sum())
            count += differs.numel()
            # One weight chosen otherwise, by a rounding at a tie, changes the rest of its row.
            alike = ~differs.any(dim=1)
            largest = max(largest, float((ours - published)[alike].abs().max()))
        print(f"block {block}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
    result = {
        "model": arguments.model,
        "pattern": arguments.pattern,
        "layers": len(layers),
        "threads": torch.get_num_threads(),
        "device": str(testbed.language_model.device),
        "seconds": totals,
        "ratio": totals["published"] / totals["ours"],
        "masks_differ": different / count,
        "largest_weight_difference_in_rows_with_equal_masks": largest,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _timed(
    recipe: Recipe, layers: list[Linear], statistics: Mapping[str, Statistics]
) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Shortest seconds of each way over the layers of one block, and the weights that it leaves."""
    dense = DenseWeights(layers)
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: _ours(recipe, layers, statistics),
        "published": lambda: _published(recipe, layers, statistics),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    found = {}
    for name in ("ours", "published", "published", "ours"):
        with dense:
            _wait(layers)
            begin = time.perf_counter()
            ways[name]()
            _wait(layers)
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
            found[name] = [layer.weight.float().clone() for layer in layers]
    return seconds, found


def _wait(layers: list[Linear]) -> None:
    if layers[0].weight.is_cuda:
        torch.cuda.synchronize()


def _ours(recipe: Recipe, layers: list[Linear], statistics: Mapping[str, Statistics]) -> None:
    for layer in layers:
        statistics[layer.name].memo.clear()
    prune_layers(recipe, layers, statistics, {layer.name: 0.5 for layer in layers})


def _published(recipe: Recipe, layers: list[Linear], statistics: Mapping[str, Statistics]) -> None:
    pattern = parse_pattern(recipe.pattern)
    for layer in layers:
        known = statistics[layer.name]
        gram = known.sums["gram"] * (2.0 / known.sequences)
        keep_of = None if pattern is None else (pattern.keep, pattern.of)
        layer.weight.copy_(one_column_at_a_time(layer.weight.float(), gram, keep_of))


def one_column_at_a_time(
    weight: Tensor, hessian: Tensor, pattern: tuple[int, int] | None, sparsity: float = 0.5
) -> Tensor:
    """The weight `[out, in]` as the published loop mends it; `hessian` is changed."""
    weight = weight.clone()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        now = weight[:, first:last].clone()
        final = torch.zeros_like(now)
        errors = torch.zeros_like(now)
        inner = factor[first:last, first:last]
        removed = torch.zeros_like(now, dtype=torch.bool)
        if pattern is None:
            scores = (now**2 / inner.diagonal() ** 2).flatten()
            # The published code cuts at a threshold, which takes one weight more.
            lowest = torch.sort(scores, stable=True).indices[: int(scores.numel() * sparsity)]
            removed.view(-1)[lowest] = True
        for place in range(last - first):
            if pattern is not None and place % pattern[1] == 0:
                group = slice(place, place + pattern[1])
                scores = now[:, group] ** 2 / inner.diagonal()[group] ** 2
                lowest = torch.topk(scores, pattern[1] - pattern[0], dim=1, largest=False).indices
                removed.scatter_(1, place + lowest, True)
            column = now[:, place]
            kept = column.clone()
            kept[removed[:, place]] = 0.0
            final[:, place] = kept
            error = (column - kept) / inner[place, place]
            now[:, place:] -= error.unsqueeze(1).matmul(inner[place, place:].unsqueeze(0))
            errors[:, place] = error
        weight[:, first:last] = final
        weight[:, last:] -= errors.matmul(factor[first:last, last:])
    return weight


if __name__ == "__main__":
    main()
