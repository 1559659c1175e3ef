"""How is a model built whose mixtures have different numbers of experts?

Each is built by its layer's own settings, so what is left to say is how experts are run.
"""

from __future__ import annotations

from typing import Any


class UnequalMixtures:
    """A model of such mixtures, put before its other classes."""

    @classmethod
    def _can_set_experts_implementation(cls: Any) -> bool:
        """As of the usual class: transformers reads it off the module that has the experts."""
        own = (one for one in cls.__mro__ if one.__module__.startswith("transformers.models."))
        usual: Any = next(own)
        return bool(usual._can_set_experts_implementation())

    def set_experts_implementation(self: Any, *words: Any, **named: Any) -> None:
        """As usual; the settings of single layers follow."""
        super().set_experts_implementation(*words, **named)  # type: ignore[misc]
        self.follow()
