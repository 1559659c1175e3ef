"""Mixtures of experts are found by structure, and refused by name where they are laid out else."""

from __future__ import annotations

import pytest

from prunezero.errors import ModelError
from prunezero.models.anatomy.experts import find_moe_layers
from tests.tiny_models import tiny_network
from tests.tiny_moe import MOE_FAMILIES, OTHER_LAYOUTS, stacked_network


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_are_found_with_their_router(family: str) -> None:
    layers = find_moe_layers(stacked_network(family))
    assert len(layers) == MOE_FAMILIES[family]
    for layer in layers:
        assert (layer.count, layer.top_k) == (4, 2)
        assert layer.up.shape == (4, 96, 32)
        assert layer.down.shape == (4, 32, 48)
        assert layer.router_weight.shape == (4, 32)


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_other_layouts_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match="model.layers.0.* this layout is not supported"):
        find_moe_layers(stacked_network(family))


def test_a_dense_model_has_none() -> None:
    assert find_moe_layers(tiny_network("llama")) == []
