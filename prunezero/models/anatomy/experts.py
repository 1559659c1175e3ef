"""MoeLayer: a router and the experts that it chooses from, found by structure in a block.

transformers keeps the experts of a layer as two tensors of three axes, one matrix for each expert:
`gate_up_proj` [experts, 2 * intermediate, hidden], gate rows first, and `down_proj` [experts,
hidden, intermediate]. Beside them stands a router, whose `weight` [experts, hidden] has one row for
each; called with hidden states [tokens, hidden] it returns (logits, weights, indices). The experts
are called with (hidden states, indices [tokens, k], weights [tokens, k]).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.blocks import block_prefix, find_blocks
from prunezero.models.anatomy.expert_linears import DOWN, UP


@dataclass(frozen=True)
class MoeLayer:
    """The mixture of experts of one block."""

    name: str
    """dotted name of the module that holds router and experts, such as model.layers.3.mlp"""
    block: int
    """index of the decoder block it is in"""
    module: nn.Module
    """that module; it may hold shared experts as well, which every token passes"""
    router: nn.Module
    router_name: str
    """dotted name of the router"""
    experts: nn.Module
    experts_name: str
    """dotted name of the module with the two stacks"""

    @property
    def count(self) -> int:
        """How many experts the router chooses from."""
        return len(self.router_weight)

    @property
    def top_k(self) -> int:
        """How many experts a token goes to."""
        return int(self.router.top_k)  # type: ignore[arg-type]  # a plain number of the module

    @property
    def router_weight(self) -> Tensor:
        """One row for each expert [experts, hidden], without gradient, sharing storage."""
        return _parameter(self.router, "weight")

    @property
    def up(self) -> Tensor:
        """[experts, 2 * intermediate, hidden], gate rows first; shares storage."""
        return _parameter(self.experts, UP)

    @property
    def down(self) -> Tensor:
        """[experts, hidden, intermediate]; shares storage."""
        return _parameter(self.experts, DOWN)


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The mixtures of experts of a model, in the order of its blocks; none in a dense model.

    Raises:
        ModelError: a block has experts of another layout.
    """
    prefix = f"{block_prefix(model)}."
    blocks = enumerate(find_blocks(model))
    return [layer for index, block in blocks for layer in moe_layers_of(block, index, prefix)]


def moe_layers_of(block: nn.Module, index: int, prefix: str) -> list[MoeLayer]:
    """The mixtures of experts of one block.

    Args:
        index: of the block.
        prefix: what stands before its index in names, such as "model.layers.".

    Raises:
        ModelError: the block has experts of another layout.
    """
    return [
        _layer(block, index, f"{prefix}{index}.", path)
        for path, module in block.named_modules()
        if _holds_stacks(path, module)
    ]


def _holds_stacks(path: str, module: nn.Module) -> bool:
    """Whether a module holds matrices of several experts, in whatever layout."""
    stacks = {name for name, one in module.named_parameters(recurse=False) if one.dim() == 3}
    # Convolutions and recurrences have three axes as well.
    return bool(stacks) and ("expert" in path or stacks <= {UP, DOWN})


def _layer(block: nn.Module, index: int, prefix: str, path: str) -> MoeLayer:
    experts = block.get_submodule(path)
    names = {name for name, _ in experts.named_parameters()}
    where = f"'{prefix}{path}'"
    if names != {UP, DOWN} or not _is_gated(experts):
        shapes = (f"{name} {list(value.shape)}" for name, value in experts.named_parameters())
        raise ModelError(
            f"{where} holds experts as {', '.join(shapes)}; this layout is not supported, only "
            f"{UP} [experts, 2 * intermediate, hidden] and {DOWN} [experts, hidden, intermediate] "
            "without biases are"
        )
    outer, _, own = path.rpartition(".")
    parent = block.get_submodule(outer)
    count = len(_parameter(experts, DOWN))
    routers = [
        name
        for name, module in parent.named_children()
        if name != own and _is_router(module, count)
    ]
    if len(routers) != 1:
        raise ModelError(
            f"beside {where} stand {len(routers)} routers with one row for each of {count} experts "
            "instead of one; this layout is not supported"
        )
    holder = f"{prefix}{outer}"
    (router,) = routers
    return MoeLayer(
        name=holder,
        block=index,
        module=parent,
        router=getattr(parent, router),
        router_name=f"{holder}.{router}",
        experts=experts,
        experts_name=f"{prefix}{path}",
    )


def _is_gated(experts: nn.Module) -> bool:
    """Whether the two stacks have the shapes of gated experts, and are not transposed ones.

    How gate and up become one is a method of the module, and nothing comes behind the second stack.
    """
    if not hasattr(experts, "_apply_gate") or getattr(experts, "has_post_expert_norm", False):
        return False
    up, down = _parameter(experts, UP), _parameter(experts, DOWN)
    (count, rows, hidden), (many, out, inner) = up.shape, down.shape
    return (many, out, 2 * inner) == (count, hidden, rows)


def _is_router(module: nn.Module, count: int) -> bool:
    weight = getattr(module, "weight", None)
    rows = isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == count
    return rows and isinstance(getattr(module, "top_k", None), int)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)  # for the type checker: found by its shape
    return value.detach()
