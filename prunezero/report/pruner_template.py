"""wanda: prune a language model with the criterion `abs(W)*X`.

Zeroes the lowest scores of each group. Zeros alone make no model smaller or faster. Usage:

    python pruner.py MODEL_FOLDER TEXT_FILE --sparsity 0.5 --output PRUNED_FOLDER
"""

import argparse
import re
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMPARE = "row"  # which weights compete: "row", "layer", "model" or "N columns"
PATTERN = "free"  # "free", or "N:M" to keep N of every M consecutive weights
TARGETS = ""  # a regular expression for the names of the layers to prune
IGNORE = "^$"  # and one for those to leave alone
OWN: list[str] = []  # some for layers that `score` ranks by formulas of their own


def score(weight: Tensor, stats: dict[str, Any], layer: str = "") -> Tensor:
    """How much each weight [out, in] of a layer matters, float32; the lowest go first."""
    W = weight.float()
    X = (stats["input_square_sum"] / stats["sequences"]).sqrt().float()[None]
    score = torch.abs(W) * X
    return score


def listen(module: Any, stats: dict[str, Any]) -> list[Any]:
    """Hooks that add up what the formula needs while text runs through one layer."""

    def add_forward(module: Any, args: Any, output: Any) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        stats["input_square_sum"] += x.double().square().sum(0)

    return [module.register_forward_hook(add_forward)]


def read(model: Any, ids: Tensor) -> None:
    """Run one sequence of token ids [1, length] through the dense model."""
    with torch.no_grad():
        model(ids, use_cache=False)


def prune_(model: Any, batches: Any, sparsity: float = 0.5, pattern: str = PATTERN) -> Any:
    """Zero weights in place; `batches` are sequences of token ids, int64 [1, length] each."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1 but got {sparsity}")
    layers = find_layers(model)
    for own in OWN:
        if not any(re.search(own, name) for name in layers):
            raise ValueError(f"no layer matches {own}, which has a formula of its own")
    stats = measure(model.eval(), layers, list(batches))
    layer_sparsity, removed, total = {}, 0, 0
    with torch.no_grad():
        weights = {
            n: m.weight if isinstance(m, nn.Linear) else m.weight.T for n, m in layers.items()
        }
        scores = {n: score(weight.detach(), stats[n], n) for n, weight in weights.items()}
        for name, kept in masks(scores, sparsity, pattern).items():
            gone = ~kept
            weights[name].masked_fill_(gone, 0.0)
            layer_sparsity[name] = float(gone.double().mean())
            removed, total = removed + int(gone.sum()), total + gone.numel()
    return {"sparsity": removed / total, "removed": removed, "layers": layer_sparsity}


def masks(scores: dict[str, Tensor], sparsity: float, pattern: str) -> dict[str, Tensor]:
    """The mask of every layer."""
    return {name: mask(scores.pop(name), sparsity, pattern) for name in list(scores)}


def mask(scores: Tensor, sparsity: float, pattern: str = PATTERN) -> Tensor:
    """Which weights [out, in] stay (True); counts round down, ties lose the lower index first."""
    if not torch.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite; the criterion does not suit this model")
    fraction, columns = Fraction(str(sparsity)), scores.shape[1]
    if pattern != "free":
        keep, of = (int(number) for number in pattern.split(":"))
        if columns % of or abs(fraction - 1 + Fraction(keep, of)) > 1e-6:
            raise ValueError(f"{pattern} needs columns in {of}s and sparsity {1 - keep / of:g}")
        return ~lowest(scores.reshape(-1, of), of - keep).view(scores.shape)
    if COMPARE == "row":
        return ~lowest(scores, int(columns * fraction))
    blocks = torch.split(scores, columns if COMPARE == "layer" else int(COMPARE.split()[0]), 1)
    flat = [lowest(b.reshape(1, -1), int(b.numel() * fraction)) for b in blocks]
    return ~torch.cat([low.view(len(scores), -1) for low in flat], dim=1)


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for the first `count` of a stable sort of each row; -0.0 equals 0.0."""
    order = torch.sort(scores + 0.0, dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def measure(model: Any, layers: dict[str, Any], batches: list[Any]) -> dict[str, Any]:
    """The sums of every layer of the dense model over the text."""
    counts = {"sequences": len(batches), "tokens": sum(ids.numel() for ids in batches)}
    stats = {name: defaultdict[str, Any](float, counts) for name in layers}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    hooks = [hook for name, module in layers.items() for hook in listen(module, stats[name])]
    for ids in batches:
        read(model, ids.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    for parameter, flag in required.items():
        parameter.requires_grad_(flag)
    return stats


def find_layers(model: Any) -> dict[str, Any]:
    """Linear maps of the decoder blocks by name: no embedding, norm, router or output head."""
    lists = {name: m for name, m in model.named_modules() if is_block_list(name, m)}
    outer = [name for name in lists if not any(name.startswith(f"{o}.") for o in lists)]
    prefix = max(outer, key=lambda name: len(lists[name])) + "."
    inside = {name: m for name, m in model.named_modules() if name.startswith(prefix)}
    linear = {name: m for name, m in inside.items() if is_linear(m)}
    if any("expert" in name for name in inside):
        linear = {n: m for n, m in linear.items() if n.split(".")[-1] not in ("gate", "router")}
    first = {m.weight.data_ptr(): name for name, m in reversed(linear.items())}
    names = [name for name, m in linear.items() if first[m.weight.data_ptr()] == name]
    return {n: linear[n] for n in names if re.search(TARGETS, n) and not re.search(IGNORE, n)}


def is_linear(module: Any) -> bool:
    """Whether a module is a linear map; GPT-2's Conv1D keeps its weight as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_block_list(name: str, module: Any) -> bool:
    """Whether a module is a list of equal blocks with linear maps in them."""
    equal = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    return equal and "expert" not in name and any(is_linear(m) for m in module.modules())


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("text", help="calibration text, one UTF-8 file")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    parser.add_argument("--pattern", default=PATTERN)
    for flag, default in (("--sparsity", 0.5), ("--sequences", 128), ("--length", 512)):
        parser.add_argument(flag, type=type(default), default=default)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.tensor([tokenizer(Path(options.text).read_text("utf-8"), verbose=False).input_ids])
    count = min(options.sequences, ids.shape[1] // options.length)
    if count < 1:
        raise SystemExit(f"{options.text} has fewer than {options.length} tokens")
    batches = torch.split(ids[:, : count * options.length], options.length, dim=1)
    report = prune_(model, batches, options.sparsity, options.pattern)
    print(f"{report['removed']} weights removed, sparsity {report['sparsity']:.4f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
