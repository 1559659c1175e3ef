"""All that makes a block narrower: its neurons and its key-value groups, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from prunezero.models.anatomy.attention import kv_groups
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import Linear
from prunezero.models.anatomy.mlp import neuron_groups
from prunezero.models.loading.language_model import LanguageModel


def width_groups(linears: Sequence[Linear], language_model: LanguageModel) -> list[Group]:
    """The key-value groups and the neurons of each block that some linear maps are in.

    Raises:
        ModelError: as `kv_groups` and `neuron_groups`.
    """
    found = [*kv_groups(linears, language_model), *neuron_groups(linears, language_model)]
    return sorted(found, key=lambda group: group.block)
