"""Weights that go become zeros, and the dense model comes back when the edit is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from prunezero.models.anatomy.groups import linears_of
from prunezero.models.anatomy.linears import Linear
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.scoring.masking import clear


class DenseWeights:
    """A copy of the layers' weights and biases: within it they are edited, behind it dense again.

        dense = DenseWeights(find_linears(model))
        with dense:
            ...

    It may be entered again and again; whatever ends it, the dense numbers come back.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._copies = [
            (linear, linear.weight.clone(), None if linear.bias is None else linear.bias.clone())
            for linear in linears
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *fault: object) -> None:
        """Write the copies into the model; a bias that was not there before becomes zero."""
        for linear, weight, bias in self._copies:
            linear.weight.copy_(weight)
            if linear.bias is not None:
                linear.bias.copy_(bias if bias is not None else torch.zeros_like(linear.bias))


def clear_biases(selection: Selection) -> None:
    """Set to zero, in place, the biases of the rows that made units which go.

    What reads a unit keeps its bias, which is no part of the unit.
    """
    for group, kept in selection:
        if not group.has_rows:
            continue
        for member in group.members:
            bias = member.linear.bias
            if member.role == "producer" and bias is not None:
                bias.masked_fill_(~member.kept_rows(kept).to(bias.device), 0.0)


@contextmanager
def zeroed(language_model: LanguageModel, selection: Selection) -> Iterator[None]:
    """Within it all weights and biases of the units that go are 0.0; leaving it undoes that."""
    linears, masks = linears_of(selection.groups), selection.matrix_masks()
    with DenseWeights(linears):
        for linear in linears:
            if linear.name in masks:
                clear(linear.weight, masks[linear.name])
        clear_biases(selection)
        yield


ZEROS = Edit(
    zeroed,
    "single weights cannot be taken out of a model: a zero takes as much room as any other number; "
    "save the model with its zeros, or remove whole units",
)
