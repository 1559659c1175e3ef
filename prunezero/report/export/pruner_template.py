"""wanda: prune a language model with the criterion `abs(W)*X`.

Zeroes the lowest scores of each group. Zeros alone make no model smaller or faster. Usage:

    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.5 --output PRUNED_FOLDER
"""

import argparse
import re
import warnings
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.report.export.expert_parts import call_experts, fill_up
from prunezero.report.export.page_parts import (
    RefusalError,
    add,
    check_text,
    chosen,
    count_tokens,
    counted,
    fits,
    keep_settings,
    linear_maps,
    matrix,
    windows,
)

COMPARE = "row"  # which weights compete: "row", "layer", "model" or "N columns"
PATTERN = "free"  # "free", or "N:M" to keep N of every M consecutive weights
TARGETS: list[str] = []  # layers to prune, all if empty: names, their last parts, or "re:REGEX"
IGNORE: list[str] = []  # and those to leave alone
OWN: list[str] = []  # some that `score` ranks by formulas of their own
SUMS: list[str] = ["input_square_sum"]  # what the formulas need to know of the text
DAMPING = 0.01  # share of the mean Gram diagonal that is added before an inversion, at least
EQUAL_IN_ROWS = False  # whether a formula gives one score to all weights of a row


def score(weight: Tensor, stats: dict[str, Any], layer: str = "") -> Tensor:
    """How much each weight matters, float32, broadcastable to [out, in]; the lowest go first."""
    W = weight.float()
    X = (stats["input_square_sum"] / stats["sequences"]).sqrt()[None].float()
    score = torch.abs(W) * X
    return score


def listen(module: Any, stats: dict[str, Any]) -> list[Any]:
    """Hooks that add up what the formula needs while text runs through one layer."""

    def add_forward(module: Any, args: Any, output: Any) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        add(stats, "inputs", "input_square_sum", x.double().square().sum(0))
        count_tokens(stats, "inputs", args[0])

    return [module.register_forward_hook(add_forward)]


def read(model: Any, ids: Tensor) -> None:
    """Run one sequence of token ids [1, length] through the dense model."""
    with torch.no_grad():
        model(ids, use_cache=False)


def prune_(
    model: Any, batches: Any, sparsity: float | None = None, pattern: str = PATTERN
) -> dict[str, Any]:
    """Zero weights in place, and count what is zero afterwards.

    `batches` are sequences of token ids, int64 [1, length] each; `sparsity` is the fraction of each
    group to remove, rounded down, which an N:M pattern says by itself. Nothing is changed where a
    RefusalError is raised.
    """
    sparsity = settled(sparsity, pattern)
    layers = find_linears(model.eval())
    weights = {name: matrix(module) for name, module in layers.items()}
    for name, weight in weights.items():
        check_columns(name, weight.shape[1], pattern)
    stats = measure(model, layers, list(batches))
    with torch.no_grad():
        kept = masks(weights, stats, sparsity, pattern)
        for name, weight in weights.items():
            if not torch.isfinite(weight[kept[name]]).all():
                raise RefusalError(f"the weight of {name} holds NaN or infinite numbers")
        for name, weight in weights.items():
            # Every zero is +0.0 in the end.
            weight.masked_fill_(~kept[name], 0.0).add_(0.0)
        zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    shares = {name: count / weights[name].numel() for name, count in zeros.items()}
    removed = sum(zeros.values())
    return {"sparsity": removed / total, "zeros": removed, "weights": total, "layers": shares}


def settled(sparsity: float | None, pattern: str) -> float:
    """The fraction to remove: as asked for, or as the pattern says."""
    keep, of = parsed(pattern)
    if EQUAL_IN_ROWS and (COMPARE == "row" or of):
        raise RefusalError("a formula gives all weights of a row one score; it ranks nothing there")
    if sparsity is None and not of:
        raise RefusalError("say how much to remove, for example sparsity 0.5")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise RefusalError(f"sparsity must be at least 0 and below 1 but got {sparsity}")
    implied = float(1 - Fraction(keep, of or 1))
    if of and sparsity is not None and abs(sparsity - implied) > 1e-6:
        raise RefusalError(f"{pattern} removes {implied:g} of the weights, not {sparsity:g}")
    return implied if sparsity is None else sparsity


def parsed(pattern: str) -> tuple[int, int]:
    """N and M of a pattern N:M; zeros where it is free."""
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", pattern)
    keep, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if pattern != "free" and not 1 <= keep < of:
        raise RefusalError(f"pattern {pattern!r} is neither free nor N:M with 1 <= N < M")
    return keep, of


def check_columns(name: str, columns: int, pattern: str) -> None:
    """Refuse a pattern that does not fit into the rows of a layer."""
    of = parsed(pattern)[1]
    if of and columns % of:
        raise RefusalError(f"{pattern} needs a multiple of {of} columns, but {name} has {columns}")


def masks(
    weights: dict[str, Tensor], stats: dict[str, Any], sparsity: float, pattern: str
) -> dict[str, Tensor]:
    """Which weights [out, in] stay (True), by layer."""
    if COMPARE != "model" or pattern != "free":
        return {
            name: mask(usable_scores(name, weight, stats[name]), sparsity, pattern)
            for name, weight in weights.items()
        }
    # Ties lose the earlier layer first, then the lower index.
    scores = {name: usable_scores(name, weight, stats[name]) for name, weight in weights.items()}
    flat = torch.cat([part.flatten().cpu() for part in scores.values()])[None]
    kept = ~lowest(flat, int(flat.numel() * Fraction(str(sparsity))))[0]
    parts = torch.split(kept, [part.numel() for part in scores.values()])
    found = zip(scores.items(), parts, strict=True)
    return {name: part.view(known.shape).to(known.device) for (name, known), part in found}


def usable_scores(name: str, weight: Tensor, stats: dict[str, Any]) -> Tensor:
    """The scores [out, in] of a layer, from which a mask may be made."""
    scores = score(weight.detach(), stats, name).expand(weight.shape)
    low, high = (float(bound) for bound in torch.aminmax(scores))
    if not (low > float("-inf") and high < float("inf")):
        raise RefusalError(f"the formula gives {name} scores that are NaN or infinite")
    if low == high and scores.numel() > 1 and bool(weight.any()):
        raise RefusalError(f"the formula gives all weights of {name} the same score, {low:g}")
    return scores


def mask(scores: Tensor, sparsity: float, pattern: str = PATTERN) -> Tensor:
    """Which weights [out, in] stay (True); counts round down, ties lose the lower index first."""
    fraction, columns = Fraction(str(sparsity)), scores.shape[1]
    keep, of = parsed(pattern)
    if of:
        return ~lowest(scores.reshape(-1, of), of - keep).view(scores.shape)
    if COMPARE == "row":
        return ~lowest(scores, int(columns * fraction))
    blocks = torch.split(scores, columns if COMPARE == "layer" else int(COMPARE.split()[0]), 1)
    flat = [lowest(b.reshape(1, -1), int(b.numel() * fraction)) for b in blocks]
    return ~torch.cat([low.view(len(scores), -1) for low in flat], dim=1)


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for the first `count` of a stable sort of each row; -0.0 equals 0.0."""
    threshold = scores.kthvalue(max(1, count), dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(1, keepdim=True)
    return below | equal & (equal.cumsum(1) <= missing)


def measure(model: Any, layers: dict[str, Any], batches: list[Tensor]) -> dict[str, Any]:
    """The sums of the layers of the dense model over the text."""
    stats = {name: defaultdict[str, Any](float, layer=name) for name in layers}
    if not SUMS:
        return stats
    check_text(model, batches)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    hooks = call_experts(layers)
    hooks += [hook for name, module in layers.items() for hook in listen(module, stats[name])]
    try:
        for ids in batches:
            read(model, ids.to(before[0][0].device))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in before:
            parameter.requires_grad_(flag).grad = None
    fill_up(stats, layers, SUMS)
    counts = {"tokens": sum(ids.numel() for ids in batches), "sequences": len(batches)}
    return {name: counted(stats[name], SUMS, counts) for name in layers}


def find_linears(model: Any) -> dict[str, Any]:
    """Linear maps of the decoder blocks by name: no embedding, norm, router or output head."""
    everything, never = linear_maps(model)
    if never:
        warnings.warn(f"left alone, for nothing calls them: {', '.join(never)}", stacklevel=3)
    found = chosen(model, everything, TARGETS, IGNORE)
    for own in OWN:
        if not any(fits(own, name) for name in found):
            raise RefusalError(f"no layer matches {own!r}, which has a formula of its own")
    for name in found:
        if sum(fits(own, name) for own in OWN) > 1:
            raise RefusalError(f"{name} has two formulas of its own, of {OWN}")
    return found


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("text", help="calibration text, one UTF-8 file")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    parser.add_argument("--pattern", default=PATTERN)
    parser.add_argument("--sparsity", type=float, help="fraction to remove, if PATTERN is free")
    for flag, default in (("--sequences", 128), ("--length", 512)):
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    try:
        settled(options.sparsity, options.pattern)
    except RefusalError as error:
        raise SystemExit(f"refused: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.text).read_text("utf-8-sig")
    batches = windows(tokenizer, text, options.length)[: options.sequences]
    if not batches:
        raise SystemExit(f"{options.text} has fewer than {options.length} tokens")
    # Computed in float32, saved as it was stored.
    exact = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    try:
        report = prune_(exact, batches, options.sparsity, options.pattern)
    except RefusalError as error:
        raise SystemExit(f"refused: {error}") from error
    computed, stored = linear_maps(exact)[0], linear_maps(model)[0]
    for name in report["layers"]:
        matrix(stored[name]).masked_fill_(matrix(computed[name]) == 0, 0.0)
    print(f"{report['zeros']} weights are zero, sparsity {report['sparsity']:.4f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    keep_settings(Path(options.model), Path(options.output))
