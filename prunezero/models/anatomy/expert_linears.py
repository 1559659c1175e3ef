"""ExpertLinear: one matrix of a stack of experts, as the linear map that it is.

transformers keeps the experts of a layer as tensors of three axes, one matrix for each expert. An
`ExpertLinear` is one of these matrices with all that a linear map has: a name, a weight that shares
storage with the stack, and calls that hooks see. No model computes with it by itself;
`prunezero/models/observing/expert_calls.py` has experts call them while somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

# The two stacks of matrices that a layer of experts holds, and nothing else.
UP, DOWN = "gate_up_proj", "down_proj"
STACKS = (UP, DOWN)
# Under this name a module of experts keeps its linear maps, so that hooks find the same objects.
_LINEARS = "_prunezero_linears"


class ExpertLinear(nn.Linear):
    """The linear map of one expert; its weight is a part of the stack, whatever that is by then."""

    def __init__(self, experts: nn.Module, stack: str, index: int) -> None:
        """Nothing is allocated.

        Args:
            experts: the module with the stacks.
            stack: one of `STACKS`.
            index: of the expert.
        """
        nn.Module.__init__(self)
        # In a tuple, so that the stacks are no parameters of this module.
        self.place = (experts, stack, index)
        self._leaf: Tensor | None = None
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a part of a parameter is none itself
        """[out, in], sharing storage with the stack."""
        return self.stack[self.place[2]] if self._leaf is None else self._leaf

    @property
    def stack(self) -> Tensor:
        """The matrices of all experts [experts, out, in]."""
        experts, stack, _ = self.place
        value = getattr(experts, stack)
        assert isinstance(value, Tensor)  # for the type checker
        return value

    @property
    def in_features(self) -> int:  # type: ignore[override]  # the stack may be cut
        """How many channels it reads."""
        return self.stack.shape[2]

    @property
    def out_features(self) -> int:  # type: ignore[override]  # the stack may be cut
        """How many channels it makes."""
        return self.stack.shape[1]

    @contextmanager
    def apart(self) -> Iterator[Tensor]:
        """Within it, the weight is a leaf on the same storage, with a gradient of its own."""
        self._leaf = self.stack.detach()[self.place[2]].requires_grad_()
        try:
            yield self._leaf
        finally:
            self._leaf = None


def expert_linears(experts: nn.Module) -> dict[str, ExpertLinear]:
    """The linear maps of a module of experts, by names such as "3.gate_up_proj", in their order.

    Every call returns the same objects.
    """
    known: dict[str, ExpertLinear] = vars(experts).setdefault(_LINEARS, {})
    count = len(getattr(experts, DOWN))
    places = [(f"{index}.{stack}", stack, index) for index in range(count) for stack in STACKS]
    for name, stack, index in places:
        if name not in known:
            known[name] = ExpertLinear(experts, stack, index)
    return {name: known[name] for name, _, _ in places}


def experts_inside(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that hold stacks of experts."""
    return [
        module
        for module in model.modules()
        if set(STACKS) == {name for name, _ in module.named_parameters(recurse=False)}
        and hasattr(module, "_apply_gate")
    ]


def linear_at(block: nn.Module, path: str) -> nn.Module:
    """The linear map at a path in a block, that of an expert among them.

    Raises:
        AttributeError: there is none.
    """
    for stack in STACKS:
        outer, dot, own = path.removesuffix(f".{stack}").rpartition(".")
        if path.endswith(f".{stack}") and own.isdecimal() and dot:
            experts = block.get_submodule(outer)
            if hasattr(experts, stack):
                return expert_linears(experts)[f"{own}.{stack}"]
    return block.get_submodule(path)
