"""Linears, the weight matrices of a model that may be pruned, and the blocks that hold them.

Structure decides, never class names: layers are the linear maps inside blocks, and in stacks of
experts each matrix is one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunezero.errors import ModelError, did_you_mean
from prunezero.models.anatomy.blocks import block_list, block_prefix, find_blocks, is_linear
from prunezero.models.anatomy.expert_linears import ExpertLinear, expert_linears
from prunezero.models.anatomy.experts import moe_layers_of
from prunezero.models.anatomy.patterns import fits

__all__ = [
    "Linear",
    "block_prefix",
    "by_block",
    "find_blocks",
    "find_linears",
    "is_linear",
    "matching",
    "note_calls",
    "refuse_experts",
    "refuse_stacks",
    "uncalled_linears",
]

# The modules that choose experts; their few rows decide where tokens go.
ROUTERS = ("gate", "router")
# Under this name a model keeps what `note_calls` has found out about it.
_UNCALLED = "_prunezero_uncalled"


@dataclass(frozen=True)
class Linear:
    """One weight matrix that may be pruned."""

    name: str
    """dotted name of the module in the model"""
    module: nn.Module
    """nn.Linear, transformers' Conv1D, or the `ExpertLinear` of one expert"""
    block: int
    """index of the decoder block it is in"""
    kind: str
    """shortest ending of its name that is unique within the block, for example "q_proj" """

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] without gradient; it shares storage: writing changes the model."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)  # for the type checker: find_linears picks such modules
        return weight.detach() if isinstance(self.module, nn.Linear) else weight.detach().T

    @property
    def bias(self) -> Tensor | None:
        """The bias [out] without gradient, sharing storage; None where the layer has none."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


def by_block(linears: Iterable[Linear]) -> dict[int, list[Linear]]:
    """Linear maps by the index of their block, in their order."""
    blocks: dict[int, list[Linear]] = defaultdict(list)
    for linear in linears:
        blocks[linear.block].append(linear)
    return dict(blocks)


def refuse_experts(linears: Iterable[Linear], who: str) -> None:
    """Refuse linear maps of a mixture of experts.

    Args:
        who: what does not speak of them yet, and its verb, such as "unit neuron does".

    Raises:
        ModelError: one belongs to an expert.
    """
    for linear in linears:
        if "expert" in linear.name:
            raise ModelError(
                f"'{linear.name}' belongs to an expert; {who} not speak of mixtures of experts yet"
            )


def refuse_stacks(linears: Iterable[Linear], who: str) -> None:
    """Refuse linear maps that are parts of a stack of experts.

    Args:
        who: what does not reach into stacks, and its verb, such as "recover tune does".

    Raises:
        ModelError: one is.
    """
    for linear in linears:
        if isinstance(linear.module, ExpertLinear):
            raise ModelError(
                f"'{linear.name}' is one matrix of a stack of experts, into which {who} not reach; "
                "leave the experts out by targets, or leave that choice out"
            )


def find_linears(
    model: nn.Module, *, targets: Sequence[str] = (), ignore: Sequence[str] = ()
) -> list[Linear]:
    """The prunable layers inside the decoder blocks, in the order of the model.

    Never embeddings, norms, routers, the output head, or what `uncalled_linears` names; a shared
    weight appears once.

    Args:
        model: a decoder-only model.
        targets: patterns to keep, all layers when empty. A pattern is a full name, the end of a
            name ("q_proj", "mlp.down_proj"), or "re:" and a regular expression searched in it.
        ignore: patterns to leave out; they may also match modules that are never pruned.

    Raises:
        ModelError: a pattern matches nothing, nothing is left, or the model has experts of a layout
            that is not supported.
    """
    layers = _all_linears(model)
    names = [layer.name for layer in layers]
    _refuse_uncalled(targets, names, uncalled_linears(model))
    wanted = [_matcher(pattern, names, names) for pattern in targets]
    modules = [*(name for name, _ in model.named_modules()), *names]
    unwanted = [_matcher(pattern, modules, names) for pattern in ignore]
    chosen = [
        layer
        for layer in layers
        if (not wanted or any(matches(layer.name) for matches in wanted))
        and not any(matches(layer.name) for matches in unwanted)
    ]
    if not chosen:
        raise ModelError(
            f"no layer is left to prune: ignore {list(ignore)} takes away all that targets "
            f"{list(targets)} choose; layers are, for example, {_examples(names)}"
        )
    return chosen


def note_calls(model: nn.Module, run: Callable[[], object]) -> None:
    """Run a model, and remember which of its layers that did not call.

    Experts are left out, which text chooses. Of a run that failed nothing is remembered.

    Args:
        run: a forward pass; its own errors are left to those who need its result.
    """
    prefix, blocks = block_list(model)
    left = {
        f"{prefix}.{index}.{path}": module
        for index, block in enumerate(blocks)
        for path, module in _linear_modules(block, index, f"{prefix}.")
        if "expert" not in path
    }

    def forget(name: str, module: nn.Module, args: Any) -> None:
        left.pop(name, None)

    handles = [
        module.register_forward_pre_hook(partial(forget, name)) for name, module in left.items()
    ]
    try:
        with suppress(Exception):
            run()
            vars(model)[_UNCALLED] = tuple(left)
    finally:
        for handle in handles:
            handle.remove()


def uncalled_linears(model: nn.Module) -> tuple[str, ...]:
    """Names of layers that the forward pass never calls, though it may read their weights.

    No input of theirs can be seen, so they are left alone; `note_calls` has found them.
    """
    found: tuple[str, ...] = vars(model).get(_UNCALLED, ())
    return found


def _refuse_uncalled(targets: Sequence[str], names: list[str], uncalled: Sequence[str]) -> None:
    for pattern in targets:
        only = [name for name in uncalled if fits(pattern, name)]
        if only and not any(fits(pattern, name) for name in names):
            raise ModelError(
                f"layer pattern '{pattern}' matches only layers that the forward pass never calls, "
                f"'{only[0]}' among them, which are left alone; choose others, for example "
                f"{_examples(names)}"
            )


def matching(pattern: str, layers: Sequence[Linear]) -> set[str]:
    """Names of the layers that a pattern matches; patterns are written as in `find_linears`.

    Raises:
        ModelError: it matches none.
    """
    names = [layer.name for layer in layers]
    return set(filter(_matcher(pattern, names, names), names))


def _all_linears(model: nn.Module) -> list[Linear]:
    prefix, blocks = block_list(model)
    layers: list[Linear] = []
    uncalled = set(uncalled_linears(model))
    seen: set[tuple[Any, ...]] = set()
    for index, block in enumerate(blocks):
        inner = dict(_linear_modules(block, index, f"{prefix}."))
        kinds = _kinds(inner)
        for path, module in inner.items():
            weight = module.weight
            assert isinstance(weight, Tensor)  # for the type checker
            name = f"{prefix}.{index}.{path}"
            _check_weight(weight, name)
            if name in uncalled:
                continue
            key = _storage(module, weight)
            if key not in seen:
                seen.add(key)
                layers.append(Linear(name, module, index, kinds[path]))
    return layers


def _storage(module: nn.Module, weight: Tensor) -> tuple[Any, ...]:
    """What two modules have in common that hold the same weight."""
    if isinstance(module, ExpertLinear):
        # All matrices of a stack that is not loaded begin at one place.
        return module.stack.data_ptr(), module.place[1:], tuple(weight.shape)
    return weight.data_ptr(), tuple(weight.shape)


def _linear_modules(block: nn.Module, index: int, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear maps of a block that may be pruned, in its order, by their paths in it."""
    stacks = {layer.experts for layer in moe_layers_of(block, index, prefix)}
    routed = any("expert" in name for name, _ in block.named_modules())
    for path, module in block.named_modules():
        if module in stacks:
            yield from ((f"{path}.{own}", one) for own, one in expert_linears(module).items())
        elif is_linear(module) and not (routed and _is_router(path, module)):
            yield path, module


def _is_router(path: str, module: nn.Module) -> bool:
    """Whether a linear map beside experts decides how much of whom a token gets."""
    # A shared expert has a gate of one row.
    is_gate = "expert" in path and min(module.weight.shape) == 1  # type: ignore[arg-type]
    return is_gate or path.rsplit(".", 1)[-1] in ROUTERS


def _check_weight(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise ModelError(
            f"the weight of '{name}' is offloaded or not loaded (device 'meta'); "
            "load the model whole, on one device"
        )
    if weight.dim() != 2 or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ModelError(
            f"the weight of '{name}' is {weight.dtype} of shape {list(weight.shape)}, a quantized "
            "or packed format; prune the full-precision checkpoint, then quantize"
        )


def _kinds(paths: Iterable[str]) -> dict[str, str]:
    """The shortest ending of each path that no other has; a number alone begins none."""
    endings = {path: list(_endings(path)) for path in paths}
    counts = Counter(ending for found in endings.values() for ending in found)
    return {
        path: next((one for one in found if counts[one] == 1), path)
        for path, found in endings.items()
    }


def _endings(path: str) -> Iterator[str]:
    words = path.split(".")
    for start in range(len(words) - 1, 0, -1):
        if not words[start].isdecimal():
            yield ".".join(words[start:])


def _matcher(pattern: str, known: list[str], layers: list[str]) -> Callable[[str], bool]:
    """A test of names; refused when no known name passes it."""
    matches = partial(fits, pattern)
    if not any(map(matches, known)):
        last_words = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ModelError(
            f"layer pattern '{pattern}' matches no layer{did_you_mean(pattern, last_words)}; "
            f"layers are, for example, {_examples(layers)}"
        )
    return matches


def _examples(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3])
