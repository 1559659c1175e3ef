"""Which settings does each layer have, where layers differ in size?

`per_layer_config` of config.json says it: {"3": {"intermediate_size": 512, "skip": ["attention"]}},
with the settings that differ from those of all layers.
"""

from __future__ import annotations

import copy
from typing import Any


class LayerSettings:
    """Settings of a model whose layers differ, to be put before its usual configuration class."""

    # Whoever asks for one number gets that of the layers that have none of their own.
    allow_global_per_layer_attribute_access = True

    def changes_of(self: Any, index: int) -> dict[str, Any]:
        """The settings of a layer that differ from those of all."""
        told = self.to_dict().get("per_layer_config") or {}
        return next((dict(one) for key, one in told.items() if int(key) == index), {})

    def of_layer(self: Any, index: int = -1) -> Any:
        """All settings of a layer; without an index, those of layers that do not differ."""
        settings = copy.deepcopy(self)
        settings.per_layer_config = None
        for key, value in self.changes_of(index).items():
            setattr(settings, key, value)
        return settings

    def validate_architecture(self) -> None:
        """Any number of heads will do, since `head_dim` says how large one is."""
