"""Linears, the weight matrices of a model that may be pruned, and the blocks that hold them.

Structure decides, never class names: blocks are the longest list of equal modules, layers are the
linear maps inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunezero.errors import ModelError, did_you_mean
from prunezero.models.anatomy.patterns import fits

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
    """nn.Linear, or transformers' Conv1D"""
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


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map: nn.Linear or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in order.

    Raises:
        ModelError: the model is an encoder-decoder, or has no list of equal blocks.
    """
    return list(_block_list(model)[1])


def block_prefix(model: nn.Module) -> str:
    """The name of the list of decoder blocks, such as "model.layers".

    Raises:
        ModelError: as `find_blocks`.
    """
    return _block_list(model)[0]


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


def refuse_fused_experts(model: nn.Module, who: str) -> None:
    """Refuse a model whose experts are stacks of matrices, of which `find_linears` lists none.

    Args:
        who: what does not speak of them yet, and its verb, such as "unit neuron does".

    Raises:
        ModelError: names a stack.
    """
    prefix, blocks = _block_list(model)
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters():
            if parameter.dim() == 3 and "expert" in path:
                raise ModelError(
                    f"'{prefix}.{index}.{path}' holds the fused weights {list(parameter.shape)} of "
                    f"several experts; {who} not speak of them yet, unit: expert removes whole ones"
                )


def find_linears(
    model: nn.Module, *, targets: Sequence[str] = (), ignore: Sequence[str] = ()
) -> list[Linear]:
    """The prunable layers inside the decoder blocks, in the order of the model.

    Never embeddings, norms, routers, stacks of experts, the output head, or what `uncalled_linears`
    names; a shared weight appears once.

    Args:
        model: a decoder-only model.
        targets: patterns to keep, all layers when empty. A pattern is a full name, the end of a
            name ("q_proj", "mlp.down_proj"), or "re:" and a regular expression searched in it.
        ignore: patterns to leave out; they may also match modules that are never pruned.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left.
    """
    layers = _all_linears(model)
    names = [layer.name for layer in layers]
    _refuse_uncalled(targets, names, uncalled_linears(model))
    wanted = [_matcher(pattern, names, names) for pattern in targets]
    modules = [name for name, _ in model.named_modules()]
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
    prefix, blocks = _block_list(model)
    left = {
        f"{prefix}.{index}.{path}": module
        for index, block in enumerate(blocks)
        for path, module in _linear_modules(block)
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


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks."""
    configuration = getattr(model, "config", None)
    if getattr(configuration, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be pruned"
        )
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            equal = len({type(block) for block in module}) == 1
            if equal and "expert" not in name and any(map(is_linear, module.modules())):
                found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of equal decoder blocks with linear layers in it; "
            "this layout is not supported"
        )
    return max(found, key=lambda entry: len(entry[1]))


def _all_linears(model: nn.Module) -> list[Linear]:
    prefix, blocks = _block_list(model)
    layers: list[Linear] = []
    uncalled = set(uncalled_linears(model))
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for index, block in enumerate(blocks):
        inner = dict(_linear_modules(block))
        for path, module in inner.items():
            weight = module.weight
            assert isinstance(weight, Tensor)  # for the type checker
            name = f"{prefix}.{index}.{path}"
            _check_weight(weight, name)
            if name in uncalled:
                continue
            key = (weight.data_ptr(), tuple(weight.shape))
            if key not in seen:
                seen.add(key)
                layers.append(Linear(name, module, index, _kind(path, list(inner))))
    return layers


def _linear_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    routed = any("expert" in name for name, _ in block.named_modules())
    for path, module in block.named_modules():
        is_router = routed and path.rsplit(".", 1)[-1] in ROUTERS
        if is_linear(module) and not is_router:
            yield path, module


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


def _kind(path: str, paths: list[str]) -> str:
    words = path.split(".")
    for start in range(len(words) - 1, 0, -1):
        ending = ".".join(words[start:])
        if sum(fits(ending, other) for other in paths) == 1:
            return ending
    return path


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
