"""wanda_sp: make the blocks of a language model narrower by the criterion `A*row_mean(abs(W))`.

Zeroes the units of the lowest score, or takes them out. Usage:

    python PAGE.py MODEL_FOLDER TEXT_FILE --sparsity 0.2 --output PRUNED_FOLDER
"""

import argparse
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.report.export.expert_parts import Expert
from prunezero.report.export.page_parts import (
    RefusalError,
    add,
    block_list,
    calls,
    check_text,
    chosen,
    count_tokens,
    counted,
    inverse_factor,
    keep_settings,
    linear_maps,
    matrix,
    windows,
)
from prunezero.report.export.unit_choice import check, choose, mend, put, shares, stay, total
from prunezero.report.export.unit_parts import (
    Group,
    Part,
    attention,
    by_child,
    diagonal_blocks,
    lacks_biases,
    mlp,
    nobody_else_sees,
    open_biases,
    refuse_unloadable,
    refuse_unsliceable,
    removed_count,
    slice_,
    zero,
)
from prunezero.report.export.unit_words import (
    CHANNELS,
    COMBINE,
    COMPARE,
    DAMPING,
    IGNORE,
    LEARNED,
    LOOKS_AT_UNITS,
    MEASURE,
    MEMBERS,
    NORMALISE,
    PROTECT_FIRST,
    PROTECT_LAST,
    SEEN,
    TARGETS,
    UNIT,
    UPDATE,
)


def score(part: Part, group: Group, stats: dict[str, Any]) -> Tensor:
    """How much units matter by their part of one matrix, float32 [units]; the lowest go first."""
    reader = group.parts[-1]
    seen, shape = stats[reader.name], (group.units, reader.width)
    W = turned(part, group.units, matrix(part.module).float())
    input_square_sum = seen["input_square_sum"].reshape(shape)
    A = (input_square_sum / seen["sequences"]).sum(1).sqrt()[:, None].float()
    score = A * torch.abs(W).mean(dim=-1, keepdim=True, dtype=torch.float64).float()
    return score.expand(group.units, 1)[:, 0]


def listen(module: Any, stats: dict[str, Any]) -> list[Any]:
    """Hooks that add up what a reader of units sees while text runs through it."""

    def add_inputs(module: Any, args: Any) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        add(stats, "inputs", "input_square_sum", x.double().square().sum(0))
        count_tokens(stats, "inputs", args[0])

    return [module.register_forward_pre_hook(add_inputs)]


def listen_to_weight(module: Any, stats: dict[str, Any]) -> list[Any]:
    """Hooks that add up how the loss changes with the weights of a matrix."""
    return []


def read(model: Any, ids: Tensor) -> None:
    """Run one sequence of token ids [1, length] through the dense model."""
    with torch.no_grad():
        model(ids, use_cache=False)


def prune_(model: Any, batches: Any, sparsity: float, slice: bool = False) -> dict[str, Any]:
    """Zero units in place, or take them out of their matrices, and tell which stay.

    `batches` are sequences of token ids, int64 [1, length] each; `sparsity` is the share of what
    all units cost that goes, rounded down. Nothing is changed where a RefusalError is raised.
    """
    if not 0 <= sparsity < 1:
        raise RefusalError(f"sparsity must be at least 0 and below 1 but got {sparsity}")
    groups = find_groups(model.eval())
    check(groups, sparsity)
    if slice:
        refuse_unsliceable(model, [group for group in groups if group.block == groups[0].block])
    if "bias" in UPDATE:
        switches = lacks_biases(model, groups)
    if SEEN or LEARNED:
        stats = measure(model, groups, list(batches))
    else:
        stats = {}
    with torch.no_grad():
        kept = choose(groups, [unit_scores(group, stats) for group in groups], sparsity)
        if UPDATE:
            mended = [mend(*one, stats) for one in zip(groups, kept, strict=True)]
        for part in {part.name: part for group in groups for part in group.parts}.values():
            if not torch.isfinite(matrix(part.module)).all():
                raise RefusalError(f"the weight of {part.name} holds NaN or infinite numbers")
        if "bias" in UPDATE:
            open_biases(model, switches)
        if UPDATE:
            for group, change in zip(groups, mended, strict=True):
                put(group.parts[-1].module, *change)
        for group, stays in zip(groups, kept, strict=True):
            zero(group, stays)
        if slice:
            slice_(model, groups, kept)
    pairs = list(zip(groups, kept, strict=True))
    gone = sum(group.cost[MEASURE] * int((~stays).sum()) for group, stays in pairs)
    return {"sparsity": gone / total(groups), "kept": {one.name: stays for one, stays in pairs}}


def find_groups(model: Any) -> list[Group]:
    """The units of each block, in the order of the model, once it is sure what goes with them."""
    # In a fused matrix all queries come before all keys, or what makes a head stands together.
    for layout in ("one after another", "head by head"):
        groups = groups_of(model, layout)
        if nobody_else_sees(model, [one for one in groups if one.block == groups[0].block]):
            return groups
    raise RefusalError(
        f"{type(model).__name__}: something beside its reader sees what would go with a unit, so "
        "this layout is not supported"
    )


def groups_of(model: Any, layout: str) -> list[Group]:
    """The groups of a model whose fused matrices are laid out like this."""
    layers, _ = linear_maps(model)
    if any(isinstance(module, Expert) for module in layers.values()):
        raise RefusalError("units beside stacks of experts are for `prunezero prune` alone")
    if TARGETS or IGNORE:
        wanted = chosen(model, layers, TARGETS, IGNORE)
    prefix, blocks = block_list(model)
    order = calls(model, layers)
    groups = []
    for index in range(len(blocks)):
        start = f"{prefix}.{index}."
        inside = by_child({name: layers[name] for name in order if name.startswith(start)}, start)
        if UNIT == "width":
            found = [attention(model, inside, index, layout, UNIT), mlp(model, inside, index)]
        elif UNIT == "neuron":
            found = [mlp(model, inside, index)]
        else:
            found = [attention(model, inside, index, layout, UNIT)]
        if TARGETS or IGNORE:
            found = [group for group in found if is_wanted(group, wanted)]
        if PROTECT_FIRST or PROTECT_LAST:
            ends = index < PROTECT_FIRST or index >= len(blocks) - PROTECT_LAST
            found = [replace(group, is_protected=ends) for group in found]
        groups += found
    if TARGETS or IGNORE:
        if UNIT == "width":
            kinds = 2
        else:
            kinds = 1
        if len({group.unit for group in groups}) < kinds:
            raise RefusalError("TARGETS and IGNORE leave no attention, or no MLP, to prune")
    return groups


def is_wanted(group: Group, wanted: dict[str, Any]) -> bool:
    """Whether all matrices of a group are to be pruned; some alone cannot be."""
    names = {part.name for part in group.parts}
    if names & wanted.keys() and not names <= wanted.keys():
        raise RefusalError(f"choose or ignore {', '.join(sorted(names))} together")
    return names <= wanted.keys()


def turned(part: Part, units: int, values: Tensor) -> Tensor:
    """Values [out, in] of a matrix as one row for each unit, [units, rest]."""
    values = values if part.axis == 0 else values.T
    return values[part.start : part.start + units * part.width].reshape(units, -1)


def unit_scores(group: Group, stats: dict[str, Any]) -> Tensor:
    """The scores [units] of a group."""
    if MEMBERS == "consumer":
        scores = part_scores(group.parts[-1], group, stats)
    else:
        if MEMBERS == "producers":
            parts = group.parts[:-1]
        else:
            parts = group.parts
        found = torch.stack([part_scores(part, group, stats) for part in parts])
        if COMBINE == "sum":
            scores = found.sum(0)
        elif COMBINE == "mean":
            scores = found.mean(0)
        elif COMBINE == "max":
            scores = found.amax(0)
        else:
            scores = found.prod(0)
    if NORMALISE == "zscore":
        scores = (scores - scores.mean()) / scores.std(correction=0)
    elif NORMALISE == "mean":
        scores = scores / scores.mean()
    elif NORMALISE == "l2":
        scores = scores / scores.square().sum().sqrt()
    elif NORMALISE == "max":
        scores = scores / scores.abs().max()
    if not torch.isfinite(scores).all():
        raise RefusalError(f"scores of {group.name} cannot be made comparable, or are not finite")
    return scores.float().cpu()


def part_scores(part: Part, group: Group, stats: dict[str, Any]) -> Tensor:
    """The scores [units] by one matrix."""
    if CHANNELS == "whole":
        return usable(score(part, group, stats), part, group)
    else:
        if part.width == 1:
            return usable(score(part, group, stats), part, group)
        *makers, reader = group.parts
        if LOOKS_AT_UNITS:
            if part.width != reader.width:
                raise RefusalError(
                    f"{part.name} makes {part.width} channels of a unit and {reader.width} are "
                    "read, so nothing that is read says anything of each"
                )
        single, channels = replace(part, width=1), group.units * part.width
        single_group = replace(group, units=channels, parts=[*makers, replace(reader, width=1)])
        scores = usable(score(single, single_group, stats), single, single_group)
        scores = scores.reshape(group.units, -1).T
        if CHANNELS == "sum":
            return scores.sum(0)
        elif CHANNELS == "mean":
            return scores.mean(0)
        elif CHANNELS == "max":
            return scores.amax(0)
        else:
            return scores.square().sum(0).sqrt()


def usable(scores: Tensor, part: Part, group: Group) -> Tensor:
    """The scores, from which a choice may be made."""
    low, high = (float(bound) for bound in torch.aminmax(scores))
    if not (low > float("-inf") and high < float("inf")):
        raise RefusalError(f"the formula gives {group.name} scores that are NaN or infinite")
    if low == high and scores.numel() > 1 and turned(part, group.units, matrix(part.module)).any():
        raise RefusalError(f"the formula gives all units of {group.name} the same score, {low:g}")
    return scores


def drawn(group: Group, seed: int) -> Tensor:
    """Numbers [units] from 0 to 1 that only the name of a group and the seed decide."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode(), seed))
    return torch.rand(group.units, generator=generator)


def inverse_blocks(
    stats: dict[str, Any], name: str, gram: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Blocks [units, width, width] of the inverse of a damped Gram matrix per sequence, float64."""
    key = f"{name} in {shape}"
    if key not in stats:
        upper = inverse_factor({**stats, "gram": gram}, DAMPING)
        stats[key] = diagonal_blocks(upper.T @ upper, shape)
    found: Tensor = stats[key]
    return found


def measure(model: Any, groups: list[Group], batches: list[Tensor]) -> dict[str, Any]:
    """Sums over the text of the dense model, by the name of a matrix."""
    names = {part.name: part.module for group in groups for part in group.parts}
    stats = {name: defaultdict[str, Any](float, layer=name) for name in names}
    check_text(model, batches)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    hooks: list[Any] = []
    if LEARNED or "mask_gradients" in SEEN:
        hooks.append(block_list(model)[1][0].register_forward_pre_hook(begin_graph))
    for group in groups:
        hooks += listen(group.parts[-1].module, stats[group.parts[-1].name])
    if LEARNED:
        for name, module in names.items():
            hooks += listen_to_weight(module, stats[name])
    try:
        for ids in batches:
            read(model, ids.to(before[0][0].device))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in before:
            parameter.requires_grad_(flag).grad = None
    counts = {"tokens": sum(ids.numel() for ids in batches), "sequences": len(batches)}
    for group in groups:
        counted(stats[group.parts[-1].name], SEEN, counts)
    if LEARNED:
        for name in names:
            counted(stats[name], LEARNED, counts)
    return stats


def begin_graph(block: Any, args: Any) -> None:
    """Let gradients reach back to the first block, though the embedding needs none."""
    if torch.is_grad_enabled() and not args[0].requires_grad:
        args[0].requires_grad_(True)


def check_loadable(model: Any, sparsity: float) -> None:
    """Refuse to take units out, before the work, where no configuration would say what is left."""
    groups = find_groups(model.eval())
    check(groups, sparsity)
    share = shares(groups, sparsity)
    gone = [removed_count(group.units, share[group.name]) for group in groups]
    left = [stay(group, count) for group, count in zip(groups, gone, strict=True)]
    refuse_unloadable(model, groups, left)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("text", help="calibration text, one UTF-8 file")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    parser.add_argument("--sparsity", type=float, required=True, help="share of units to remove")
    if COMPARE == "group":
        parser.add_argument("--slice", action="store_true", help="take units out, not zeros in")
    for flag, default in (("--sequences", 128), ("--length", 512)):
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    stored = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").dtype
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.text).read_text("utf-8-sig")
    batches = windows(tokenizer, text, options.length)[: options.sequences]
    if not batches:
        raise SystemExit(f"{options.text} has fewer than {options.length} tokens")
    # Computed in float32, saved as it was stored.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    try:
        if COMPARE == "group":
            if options.slice:
                check_loadable(model, options.sparsity)
            report = prune_(model, batches, options.sparsity, slice=options.slice)
        else:
            # Layers come out unequal, and no class of transformers has such.
            report = prune_(model, batches, options.sparsity)
    except RefusalError as error:
        raise SystemExit(f"refused: {error}") from error
    left = [f"{int(stays.sum())} in {name}" for name, stays in report["kept"].items()]
    print(f"{report['sparsity']:.4f} of the {MEASURE} went; units left: {', '.join(left)}")
    model.to(stored).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    keep_settings(Path(options.model), Path(options.output), ("config.json",))
