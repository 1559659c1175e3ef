"""Weights that go become zeros, and the dense model comes back when the edit is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError
from prunezero.files.digests import tensor_digest
from prunezero.models.anatomy.groups import linears_of
from prunezero.models.anatomy.linears import Linear
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.source import Source
from prunezero.scoring.masking import clear


class DenseWeights:
    """The layers' weights and biases: within it they are edited, behind it dense again.

        dense = DenseWeights(find_linears(model))
        with dense:
            ...

    It may be entered again and again; whatever ends it, the dense numbers come back.
    """

    def __init__(self, linears: Sequence[Linear], source: Source | None = None) -> None:
        """Copy the numbers, or note where they can be read again.

        Args:
            source: the files of the model, to take the place of copies: what a file does not hold
                to the last bit, as far as the dtype of the model tells, is copied all the same.

        Raises:
            ModelError: a file is damaged.
        """
        self._source = source
        self._state = _state(source)
        self._copies = [
            (linear, key, self._kept(linear, key))
            for linear in linears
            for key in ("weight", "bias")
        ]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        kept = (value for _, _, value in self._copies)
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *fault: object) -> None:
        """Write the dense numbers into the model; a bias that was not there before becomes zero.

        Raises:
            ModelError: a file that stands for a copy was changed or is damaged.
        """
        if _state(self._source) != self._state:
            assert self._source is not None  # for the type checker: another state of nothing
            raise ModelError(
                f"files in '{self._source.folder}' were changed while the model was in use, so its "
                "dense weights cannot be read again; put them back, or leave the memory limit out"
            )
        for linear, key, kept in self._copies:
            numbers = getattr(linear, key)
            if numbers is None:
                continue
            if isinstance(kept, str):
                numbers.copy_(self._read(linear, kept))
            else:
                numbers.copy_(torch.zeros_like(numbers) if kept is None else kept)

    def _kept(self, linear: Linear, key: str) -> Tensor | str | None:
        """A copy of the numbers, or the name under which the files hold them; None for no bias."""
        numbers: Tensor | None = getattr(linear, key)
        if numbers is None or self._source is None:
            return None if numbers is None else numbers.clone()
        stored = self._source.names.get(f"{linear.name}.{key}")
        if stored is not None:
            read = self._read(linear, stored).to(numbers.device, numbers.dtype)
            # Also tells -0.0 from 0.0.
            if read.shape == numbers.shape and tensor_digest(read) == tensor_digest(numbers):
                return stored
        return numbers.clone()

    def _read(self, linear: Linear, stored: str) -> Tensor:
        assert self._source is not None  # for the type checker: names are those of a source
        read = self._source.shards.read(stored)
        is_transposed = read.dim() == 2 and not isinstance(linear.module, nn.Linear)
        return read.T if is_transposed else read


def _state(source: Source | None) -> list[tuple[int, ...]]:
    """What changes with the files of a model: their sizes, and the moments of their last change."""
    if source is None:
        return []
    names = sorted({stored.file for stored in source.shards.tensors.values()})
    found: list[tuple[int, ...]] = []
    for name in names:
        path = source.folder / name
        # A file that is gone has no state, which is another one than before.
        now = path.stat() if path.is_file() else None
        found.append(() if now is None else (now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return found


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
