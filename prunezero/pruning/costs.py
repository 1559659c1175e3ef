"""Costs: what a model takes in parameters, FLOPs and bytes of keys and values, counted on itself.

Zeros change none of it, smaller tensors all of it. Nothing is computed from a configuration: its
tensors are counted, and one window goes through it while torch counts the matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunezero.models.anatomy.expert_linears import experts_inside
from prunezero.models.anatomy.groups import Group
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import calling_each

# Tokens of the window; what attention costs grows with their number.
CONTEXT = 128


@dataclass(frozen=True)
class Costs:
    """What one model takes."""

    parameters: int
    """numbers that it has learned; a shared tensor counts once"""
    parameters_without_embeddings: int
    """those outside of embeddings and output head"""
    flops: float
    """multiplications and additions of its matrix products for each token, output head included,
    where every token attends to all of the context, as is usual to count"""
    kv_bytes: float
    """bytes of keys and values that it holds for each token of the context"""
    context: int
    """tokens of the window that FLOPs and bytes are means over"""


def model_costs(language_model: LanguageModel, ids: Tensor) -> Costs:
    """What the model takes as it is.

    Args:
        ids: token ids [1, length], of which the first CONTEXT are used: text decides what a mixture
            of experts computes.
    """
    model = language_model.model
    ids = ids[:, :CONTEXT].to(language_model.device)
    context = ids.shape[1]
    try:
        flops, answer = _counted(model, ids, use_cache=True)
    # Whatever a model says that keeps no keys and values, or keeps them in its own way.
    except Exception:
        flops, answer = _counted(model, ids, use_cache=False)
    return Costs(
        parameters=_count(model.parameters()),
        parameters_without_embeddings=_count(_without_embeddings(model)),
        flops=flops / context,
        kv_bytes=_bytes_held(cache_of(answer)) / context,
        context=context,
    )


def costs_without(language_model: LanguageModel, selection: Selection, ids: Tensor) -> Costs:
    """What the model takes once the units that go are out of it; it keeps its size.

    Args:
        selection: one of no groups takes nothing out.
        ids: as for `model_costs`.

    Raises:
        ModelError: units of this kind do not make the model smaller, or not this model.
    """
    if not selection.groups:
        return model_costs(language_model, ids)
    with sliced(language_model, selection) as slices:
        try:
            return model_costs(language_model, ids)
        # What no configuration says may run all the same, or fail in any way.
        except Exception:
            slices.refuse_faults()
            raise


def group_cost(group: Group, measure: str) -> float:
    """What all units of a group take together.

    Raises:
        SelectionError: removing such units saves nothing of that kind.
    """
    return group.cost_of(measure) * group.units


def _counted(model: Any, ids: Tensor, *, use_cache: bool) -> tuple[int, Any]:
    """FLOPs of a forward pass, and what it returns."""
    # It imports Triton, whose mode is settled by whoever imports it first.
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention, and experts together, are calls whose products the counter does not know.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        calling_each(experts_inside(model)),
        FlopCounterMode(display=False) as counter,
    ):
        answer = model(ids, use_cache=use_cache)
    return counter.get_total_flops(), answer


def cache_of(answer: Any) -> Any:
    """Keys and values of a forward pass; None where a model has no such cache."""
    # Newer versions of transformers call it cache, and warn of the older word.
    return answer["cache"] if "cache" in answer else answer.get("past_key_values")


def _without_embeddings(model: Any) -> list[Tensor]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(one) for table in tables for one in table.parameters()}
    outside |= {id(one) for one in model.get_output_embeddings().parameters()}
    return [one for one in model.parameters() if id(one) not in outside]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes_held(cache: Any) -> int:
    """Bytes of the keys and values of all layers; none where a model has no such cache."""
    layers = getattr(cache, "layers", ())
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, Tensor))
