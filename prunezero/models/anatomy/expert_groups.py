"""Which experts may go: the units of each mixture, the tensors that hold them, and how many stay.

An expert is a slice of its two stacks of matrices, and a row of the router with whatever else the
router keeps of it, such as a bias of its choice. Routers that choose among groups of experts want
as many of each group. What a router answers is tried, and never read from its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.models.anatomy.expert_linears import DOWN, UP
from prunezero.models.anatomy.experts import MoeLayer, find_moe_layers
from prunezero.models.anatomy.groups import Group, Part
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.unequal.mixtures import Skipping

# Tokens on which a router is tried.
_TRIED = 3


def expert_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The experts of each mixture as a group; linear maps have no part in them.

    Raises:
        ModelError: the model has no mixture, one of another layout, or a router that answers
            something else than logits, weights and indices of the experts chosen.
    """
    model = language_model.model
    layers = find_moe_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no mixture of experts, so no expert can go (unit: "
            "expert); choose another unit, such as neuron"
        )
    return [_group(layer) for layer in layers]


def strata_of(router: nn.Module) -> int:
    """In how many groups a router's experts stand, of which it chooses some first; 1 for most."""
    if getattr(router, "topk_method", "") == "greedy":
        return 1
    counts = [getattr(router, name, None) for name in ("num_group", "n_group")]
    return max([1, *(count for count in counts if isinstance(count, int))])


def fewest_of(layer: MoeLayer) -> int:
    """How many experts have to stay, so that each token finds as many as it goes to."""
    strata = strata_of(layer.router)
    if strata == 1:
        return layer.top_k
    open_groups = int(getattr(layer.router, "topk_group", strata))
    # A group is judged by its best two.
    return strata * max(2, -(-layer.top_k // open_groups))


def _group(layer: MoeLayer) -> Group:
    _refuse_other_router(layer)
    parts = tuple(_parts(layer))
    learned = dict(layer.module.named_parameters(prefix=layer.name))
    held = [learned[part.name].numel() // layer.count for part in parts if part.name in learned]
    weights = sum(one[0].numel() for one in (layer.up, layer.down))
    return Group(
        name=layer.name,
        block=layer.block,
        kind="expert",
        shape=(layer.count,),
        members=(),
        cost={"weights": float(weights), "parameters": float(sum(held))},
        least=fewest_of(layer),
        strata=strata_of(layer.router),
        parts=parts,
        mixture=layer,
    )


def _parts(layer: MoeLayer) -> Iterator[Part]:
    """All tensors that have one slice for each expert, and the axis along which it lies.

    Raises:
        ModelError: the router holds a tensor of which nobody can say that.
    """
    for name in (UP, DOWN):
        yield Part(f"{layer.experts_name}.{name}", 0)
    for name, value in _tensors(layer.router):
        axes = [axis for axis, size in enumerate(value.shape) if size == layer.count]
        if name == "weight":
            axes = [0]
        if len(axes) != 1:
            raise ModelError(
                f"the router '{layer.router_name}' holds '{name}' {list(value.shape)}, in which "
                f"one slice for each of {layer.count} experts is not told apart; this layout is "
                "not supported"
            )
        yield Part(f"{layer.router_name}.{name}", axes[0])


def _tensors(router: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a router holds of its experts, learned or not."""
    for name, value in [*router.named_parameters(), *router.named_buffers()]:
        if value.dim():
            yield name, value


def _refuse_other_router(layer: MoeLayer) -> None:
    """Refuse a router that does not answer as those of transformers do.

    Raises:
        ModelError: names it.
    """
    if any(isinstance(hook, Skipping) for hook in layer.router._forward_hooks.values()):
        raise ModelError(
            f"tokens skip experts of '{layer.name}' already, so what its router does with each is "
            "not seen; take experts out of the model as it was before, by one recipe that does both"
        )
    weight = layer.router_weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TRIED, weight.shape[1], generator=generator).to(weight)
    try:
        with torch.no_grad():
            answer = layer.router(tokens)
    # Whatever a module says that is called in another way.
    except Exception:
        answer = None
    if not _is_a_choice(answer, layer):
        raise ModelError(
            f"the router '{layer.router_name}' ({type(layer.router).__name__}) does not answer a "
            "token with logits, weights and indices of the experts that it chooses; this layout is "
            "not supported"
        )


def _is_a_choice(answer: object, layer: MoeLayer) -> bool:
    if not isinstance(answer, tuple) or len(answer) != 3:
        return False
    logits, weights, indices = answer
    chosen = (_TRIED, layer.top_k)
    return (
        all(isinstance(one, Tensor) for one in answer)
        and tuple(logits.shape) == (_TRIED, layer.count)
        and tuple(weights.shape) == tuple(indices.shape) == chosen
        and not indices.is_floating_point()
        and bool(((indices >= 0) & (indices < layer.count)).all())
    )
