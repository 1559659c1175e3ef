"""Edit: how a selection is taken out of a model, for a while or for good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from prunezero.errors import ModelError
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel


@dataclass(frozen=True)
class Edit:
    """The two ways in which units of one kind leave a model."""

    simulated: Callable[[LanguageModel, Selection], AbstractContextManager[None]]
    """within it the model computes as if they were gone, on tensors of full size; leaving it, the
    model is bit for bit what it was, also after an error"""
    removal: Callable[[LanguageModel, Selection], None] | str
    """makes the tensors smaller; or, in one sentence, why that cannot be"""
    zeros_suffice: bool = True
    """whether zeros in linear maps alone make the model compute as if units were gone"""

    @property
    def makes_smaller(self) -> bool:
        """Whether units can be taken out for good."""
        return not isinstance(self.removal, str)

    def remove(self, language_model: LanguageModel, selection: Selection) -> None:
        """Make the model really smaller.

        Raises:
            ModelError: units of this kind do not make one smaller.
        """
        if isinstance(self.removal, str):
            raise ModelError(self.removal)
        self.removal(language_model, selection)
