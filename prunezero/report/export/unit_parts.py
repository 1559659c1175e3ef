"""Which rows and columns go with a unit, and how do they go? Parts of exported pages for units.

The functions stand here as they stand in a page, behind those of `unit_template.py`; a page holds
those alone that it needs.
"""

import copy
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.report.export.page_parts import RefusalError, matrix
from prunezero.report.export.unit_words import PROTECT_FIRST, PROTECT_LAST


@dataclass(frozen=True)
class Part:
    """What units have in one matrix: neighbouring rows that make, or columns that read them."""

    name: str
    module: Any
    # 0 where rows make units, 1 where columns read them
    axis: int
    # the first row or column of the first unit
    start: int
    # rows or columns of one unit
    width: int


@dataclass(frozen=True)
class Group:
    """Units of one place, such as the neurons of one MLP."""

    name: str
    block: int
    units: int
    # matrices that make the units, and the one that reads them last
    parts: list[Part]
    # what one unit costs, by measure
    cost: dict[str, float]
    # "neuron", "kv_group" or "head"
    unit: str
    # query heads of one unit; none of a neuron
    heads: int = 0
    # key-value heads, each of which loses as many units; 1 where units are no query heads
    runs: int = 1
    if PROTECT_FIRST or PROTECT_LAST:
        # whether nothing may go
        is_protected: bool = False


def by_child(layers: dict[str, Any], start: str) -> dict[str, dict[str, Any]]:
    """Matrices of a block by the child of the block that they stand in; "" for those in none."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in layers.items():
        child, _, deeper = name.removeprefix(start).partition(".")
        found.setdefault(child if deeper else "", {})[name] = module
    return found


def attention(
    model: Any, children: dict[str, dict[str, Any]], block: int, layout: str, unit: str
) -> Group:
    """The heads of a block's attention, each with the rows that make it; its reader runs last."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)
    inside = next((found for child, found in children.items() if "att" in child), {})
    *makers, (name, reader) = inside.items() or [("", None)]
    rows = [len(matrix(module)) for _, module in makers]
    columns = matrix(reader).shape[1] if makers else 0
    size = columns // heads if heads else 0
    # What is not queries is keys and values.
    groups = (sum(rows) - columns) // (2 * size) if size else 0
    is_whole = size * heads == columns and sum(rows) == columns + 2 * groups * size
    if not groups or not is_whole or heads % groups:
        raise RefusalError(
            f"block {block} of {type(model).__name__} has no attention of {heads} heads that one "
            "matrix reads, the last to run; this layout is not supported"
        )
    if len(makers) > 1:
        places = [(*maker, 0, count // groups) for maker, count in zip(makers, rows, strict=True)]
    elif layout == "head by head":
        places = [(*makers[0], 0, sum(rows) // groups)]
    else:
        widths = [columns // groups, size, size]
        starts = [0, columns, columns + groups * size]
        places = [(*makers[0], *place) for place in zip(starts, widths, strict=True)]
    parts = [Part(maker, module, 0, start, width) for maker, module, start, width in places]
    parts.append(Part(name, reader, 1, 0, columns // groups))
    cached = sum(part.width for part in parts[:-1]) - parts[-1].width
    if unit != "head":
        cost = cost_of(parts, cached)
        return Group(shared_name(parts), block, groups, parts, cost, "kv_group", heads // groups)
    if heads == groups or parts[0].width != columns // groups:
        raise RefusalError(
            f"in {type(model).__name__} no query head can go by itself, since its keys and values "
            "are its own or stand together with it"
        )
    parts = [replace(part, width=size) for part in (parts[0], parts[-1])]
    return Group(shared_name(parts), block, heads, parts, cost_of(parts), "head", 1, groups)


def mlp(model: Any, children: dict[str, dict[str, Any]], block: int) -> Group:
    """The neurons of a block's MLP: rows of one, two or a fused matrix, and columns of its last."""
    others = [found for child, found in children.items() if "att" not in child]
    *makers, (name, reader) = others[0].items() if len(others) == 1 else [("", None)]
    units = matrix(reader).shape[1] if makers else 0
    rows = [len(matrix(module)) for _, module in makers]
    if not makers or any(count % units for count in rows) or "expert" in name:
        raise RefusalError(
            f"block {block} of {type(model).__name__} has no one MLP whose channels some rows make "
            "and one column reads; this layout is not supported"
        )
    parts = [
        Part(maker, module, 0, start, 1)
        for (maker, module), count in zip(makers, rows, strict=True)
        for start in range(0, count, units)
    ]
    parts.append(Part(name, reader, 1, 0, 1))
    return Group(shared_name(parts), block, units, parts, cost_of(parts), "neuron")


def shared_name(parts: list[Part]) -> str:
    """The path that all matrices share; the reader's, where they share no more than the block."""
    words = zip(*(part.name.split(".") for part in parts), strict=False)
    same = [first for first, *others in words if {first} == {first, *others}]
    return parts[-1].name if same[-1].isdigit() else ".".join(same)


def cost_of(parts: list[Part], cached: int = 0) -> dict[str, float]:
    """What one unit costs, by measure: weights, biases of its rows, and what follows, per token."""
    weights = sum(part.width * matrix(part.module).shape[1 - part.axis] for part in parts)
    makers = [part for part in parts[:-1] if part.module.bias is not None]
    biases = sum(part.width for part in makers)
    cost = {"units": 1, "weights": weights, "parameters": weights + biases, "flops": 2 * weights}
    if cached:
        cost["kv bytes"] = cached * parts[-1].module.weight.element_size()
    return {measure: float(amount) for measure, amount in cost.items()}


def nobody_else_sees(model: Any, groups: list[Group]) -> bool:
    """Whether a model answers the same whatever makes some units, once their reader ignores them.

    Every second unit is tried at once, on random weights of their block, which are then put back.
    """
    ids = torch.arange(min(12, len(model.get_input_embeddings().weight)))[None]
    ids = ids.to(next(model.parameters()).device)
    modules = {part.name: part.module for group in groups for part in group.parts}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    tried = {group.name: torch.arange(group.units) % 2 == 1 for group in groups}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        try:
            for module in modules.values():
                matrix(module).copy_(random_like(matrix(module), generator))
            for group in groups:
                columns = places(group.parts[-1], tried[group.name])
                matrix(group.parts[-1].module)[:, columns] = 0.0
            ignored = model(ids, use_cache=False).logits.nan_to_num()
            for group in groups:
                for part in group.parts[:-1]:
                    rows, weight = places(part, tried[group.name]), matrix(part.module)
                    weight[rows] = random_like(weight[rows], generator)
            return torch.equal(model(ids, use_cache=False).logits.nan_to_num(), ignored)
        finally:
            for name, module in modules.items():
                module.weight.copy_(before[name])


def random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows [out, in] that keep the size of what they read."""
    values = torch.randn(weight.shape, generator=generator)
    return (values * weight.shape[1] ** -0.5).to(weight)


def places(part: Part, units: Tensor) -> Tensor:
    """The rows or columns of the units that are True, int64."""
    return part.start + units.cpu().repeat_interleave(part.width).nonzero().flatten()


def removed_count(size: float, share: float) -> int:
    """How much of a size a share is, rounded down: 29 of 100 at 0.29, as the decimal says."""
    return math.floor(size * Fraction(str(share)))


def diagonal_blocks(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The parts [units, width, width] of a matrix [in, in] along its diagonal."""
    return values.reshape(*shape, *shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def centred(stats: dict[str, Any]) -> Tensor:
    """The Gram matrix [in, in] of inputs without their mean, float64."""
    mean = stats["input_sum"]
    return stats["gram"].double() - torch.outer(mean, mean) / stats["tokens"]


def zero(group: Group, stays: Tensor) -> None:
    """Set weights and biases of the units that go to zero, in place; the reader keeps its bias."""
    for part in group.parts:
        gone, weight = places(part, ~stays), matrix(part.module)
        if part.axis == 1:
            weight[:, gone] = 0.0
        else:
            weight[gone] = 0.0
            if part.module.bias is not None:
                part.module.bias[gone] = 0.0
        # Every zero is +0.0 in the end.
        weight.add_(0.0)


def lacks_biases(model: Any, groups: list[Group]) -> list[str]:
    """Settings that give matrices of units the biases they lack, so that a saved model has them."""
    names = [part.name for group in groups for part in group.parts if part.module.bias is None]
    wanted = {f"{name}.bias" for name in names}
    settings = model.config.get_text_config().to_dict()
    closed = [key for key, value in settings.items() if "bias" in key and value is False]
    switches = [key for key in closed if wanted & added_by(model, [key])]
    left = sorted(wanted - added_by(model, switches))
    if left:
        raise RefusalError(f"no setting of {type(model).__name__} gives it {left[0]}")
    return switches


def added_by(model: Any, switches: list[str]) -> set[str]:
    """Biases of linear maps that a model has under such settings; none if anything else changes."""
    there = set(shapes_under(model, dict.fromkeys(switches, True)))
    have = {name for name, _ in model.named_parameters()}
    linear = {f"{name}.bias" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return there - have if have <= there and there - have <= linear else set()


def shapes_under(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Shapes of the parameters of an empty model under other settings; none if that is none."""
    configuration = copy.deepcopy(model.config)
    try:
        for key, value in settings.items():
            setattr(configuration.get_text_config(), key, value)
        with torch.device("meta"):
            empty = type(model)(type(configuration).from_dict(configuration.to_dict()))
    # Whatever a model says to settings that exclude each other.
    except Exception:
        return {}
    return {name: one.shape for name, one in empty.named_parameters()}


def open_biases(model: Any, switches: list[str]) -> None:
    """Give a model the biases of some settings, all zero, and let its configuration say so."""
    added = added_by(model, switches) if switches else set()
    for name in sorted(added):
        module = model.get_submodule(name.removesuffix(".bias"))
        module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)
    for key in switches:
        setattr(model.config.get_text_config(), key, True)


def slice_(model: Any, groups: list[Group], kept: list[Tensor]) -> None:
    """Take the rows and columns of units that go out of their matrices, in place.

    The configuration says how large layers are, where all are alike and it has words for that.
    """
    settings = cut(model, groups, kept)
    shapes = {name: one.shape for name, one in model.named_parameters()}
    if shapes_under(model, settings) == shapes:
        for key, value in settings.items():
            setattr(model.config.get_text_config(), key, value)


def cut(model: Any, groups: list[Group], kept: list[Tensor]) -> dict[str, int]:
    """Make matrices smaller, in place; what a configuration says of it where layers are alike."""
    stays: dict[tuple[str, int], Tensor] = {}
    modules = {part.name: part.module for group in groups for part in group.parts}
    for group, units in zip(groups, kept, strict=True):
        for part in group.parts:
            size = matrix(part.module).shape[part.axis]
            left = stays.setdefault((part.name, part.axis), torch.ones(size, dtype=torch.bool))
            left[places(part, ~units)] = False
    for (name, axis), left in stays.items():
        shrink(modules[name], axis, left.nonzero().flatten())
    told: dict[str, int] = {}
    for group, units in zip(groups, kept, strict=True):
        told |= resized(model, group, int(units.sum()))
    text = model.config.get_text_config()
    return {key: told[key] for key in told if key == "head_dim" or hasattr(text, key)}


def shrink(module: Any, axis: int, left: Tensor) -> None:
    """Keep some rows (axis 0) or columns of a matrix, and the biases of those rows."""
    is_linear = isinstance(module, nn.Linear)
    own = axis if is_linear else 1 - axis
    weight = module.weight.detach().index_select(own, left.to(module.weight.device))
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if axis == 0 and module.bias is not None:
        bias = module.bias.detach().index_select(0, left.to(module.bias.device))
        module.bias = nn.Parameter(bias, requires_grad=False)
    names = ("out_features", "in_features") if is_linear else ("nx", "nf")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(module, name, size)


def resized(model: Any, group: Group, units: int) -> dict[str, int]:
    """What a configuration says of a group of so many units; an attention is told its heads."""
    if not group.heads:
        return dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), units)
    module = model.get_submodule(group.parts[-1].name.rpartition(".")[0])
    queries, size = units * group.heads, group.parts[-1].width // group.heads
    keys = group.runs if group.unit == "head" else units
    told = {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": size}
    own = copy.deepcopy(getattr(module, "config", model.config))
    for key in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(own, key):
            setattr(own, key, told[key])
    # GPT-2 calls the width of its queries split_size.
    counts = {**told, "num_heads": queries, "num_key_value_groups": queries // keys, "config": own}
    for key, value in {**counts, "split_size": queries * size}.items():
        if key in vars(module):
            setattr(module, key, value)
    return told


def first_units(group: Group, count: int) -> Tensor:
    """Which units stay, bool [units]: the first so many, as many of each run."""
    return torch.arange(group.units) % (group.units // group.runs) < count // group.runs


def refuse_unsliceable(model: Any, groups: list[Group]) -> None:
    """Refuse a model that computes something else, or nothing, once matrices are smaller.

    It is tried on one block, whose numbers are then put back.
    """
    ids = torch.arange(min(12, len(model.get_input_embeddings().weight)))[None]
    ids = ids.to(next(model.parameters()).device)
    kept = [first_units(group, max(group.runs, group.units // 2)) for group in groups]
    parts = [part for group in groups for part in group.parts]
    modules = [part.module for part in parts]
    modules += [model.get_submodule(part.name.rpartition(".")[0]) for part in parts]
    before = [{**vars(one), "_parameters": dict(one._parameters)} for one in modules]
    numbers = [[one.detach().clone() for one in part.module.parameters()] for part in parts]
    with torch.no_grad():
        for group, stays in zip(groups, kept, strict=True):
            zero(group, stays)
        wanted = model(ids, use_cache=False).logits.float()
        try:
            cut(model, groups, kept)
            found = model(ids, use_cache=False).logits.float()
        # Whatever a model says whose heads are counted elsewhere.
        except Exception:
            found = torch.full_like(wanted, float("inf"))
        for module, own in zip(modules, before, strict=True):
            vars(module).update(own)
        for part, values in zip(parts, numbers, strict=True):
            for parameter, value in zip(part.module.parameters(), values, strict=True):
                parameter.copy_(value)
    most = 1e-3 if found.dtype == model.dtype else 0.05
    if not (found - wanted).norm() <= most * wanted.norm():
        raise RefusalError(f"{type(model).__name__} cannot be run on smaller matrices; keep zeros")


def refuse_unloadable(model: Any, groups: list[Group], left: list[int]) -> None:
    """Refuse sizes that no configuration of the model tells, so that nobody could load it."""
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    own = []
    for group in groups:
        parts = [replace(one, module=empty.get_submodule(one.name)) for one in group.parts]
        own.append(replace(group, parts=parts))
    kept = [first_units(group, count) for group, count in zip(groups, left, strict=True)]
    slice_(empty, own, kept)
    if shapes_under(empty, {}) != {name: one.shape for name, one in empty.named_parameters()}:
        raise RefusalError(
            f"no configuration of {type(model).__name__} has layers of such sizes, so nobody could "
            "load them; leave --slice out"
        )
