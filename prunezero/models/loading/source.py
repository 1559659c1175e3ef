"""Which files does a model come from, and which of their numbers does it still have?

The dtype of the computation is a choice for speed; what is saved is decided by the files. A weight
that is what its file says, as far as the dtype of the computation can tell, keeps the number of the
file, to the last bit; another one is rounded once to the dtype of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.loading.layouts import Piece
from prunezero.models.loading.shards import STORED_DTYPES, Shards

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Source:
    """The safetensors files that a model was loaded from."""

    shards: Shards
    """their tensors"""
    names: Mapping[str, str]
    """name in the files by name in the model, of tensors that are the same in both"""
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    """what tensors of the files are of stacks in the model, by their names in the files"""
    moved: set[str] = field(default_factory=set)
    """layers whose channels have changed places in the model since"""

    @property
    def folder(self) -> Path:
        """Where the files are, with the configuration and tokenizer beside them."""
        return self.shards.folder

    @cached_property
    def parts(self) -> Mapping[str, list[str]]:
        """Names in the files by name in the model, of all that is there in whatever layout.

        Names in the model are those of stacks, and of the weight of each linear map in them.
        """
        found = {name: [stored] for name, stored in self.names.items()}
        for stored, piece in self.pieces.items():
            for name in (piece.name, piece.matrix):
                found.setdefault(name, []).append(stored)
        return found

    def stored_as(self, name: str) -> list[str]:
        """The tensors in the files that hold a tensor of the model, or one matrix of a stack.

        None where the files lack it, or have it in another layout; a stack that is stored as it is
        holds all of its matrices.
        """
        return self.parts.get(name) or self.parts.get(stack_of(name)[0], [])

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype in the files of a tensor of the model; None where the files lack it.

        Of the matrices of a stack it is that of the first part.
        """
        stored = self.stored_as(name)
        return STORED_DTYPES.get(self.shards.tensors[stored[0]].dtype) if stored else None

    def read(self, name: str) -> Tensor:
        """The tensor of the model as the files hold it, on the CPU, by its name in the model.

        Raises:
            ModelError: the file is damaged.
        """
        return self.shards.read(self.names[name])

    def saved(
        self, name: str, weight: Tensor, part: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """What a file will hold of a tensor of the model: in the stored dtype, on the CPU.

        Args:
            part: of the stored tensor, what the model still has; None where it has all of it.

        Raises:
            ModelError: a file is damaged, the shape is another one, or a number that was changed
                is too large for the stored dtype.
        """
        stored = self.read(name) if part is None else part(self.read(name))
        return self._joined(name, stored, weight)

    def saved_piece(self, stored: str, matrix: Tensor) -> Tensor:
        """The same of a tensor in the files that is a part of a stack.

        Args:
            stored: its name in the files.
            matrix: of the stack, as the model has it now.

        Raises:
            ModelError: as `saved`.
        """
        return self._joined(stored, self.shards.read(stored), self.pieces[stored].rows_of(matrix))

    def _joined(self, name: str, stored: Tensor, weight: Tensor) -> Tensor:
        """The numbers of a stored tensor where the weight still has them, and its own elsewhere."""
        weight = weight.detach().cpu()
        if stored.shape != weight.shape:
            raise ModelError(
                f"'{name}' has shape {list(weight.shape)} but {list(stored.shape)} in the files in "
                f"'{self.folder}'; save such a model by its own save_pretrained"
            )
        is_kept = _is_kept(stored, weight)
        changed = _rounded(weight, stored.dtype)
        _refuse_too_large(name, stored.dtype, changed.isfinite() | is_kept)
        return torch.where(is_kept, stored, changed)

    def made_anew(self, name: str, weight: Tensor) -> Tensor:
        """The same of a tensor of any shape that has nothing to do with that of the file.

        Raises:
            ModelError: a number is too large for the stored dtype.
        """
        stored = self.dtype_of(name)
        assert stored is not None  # whoever asks has seen the name; for the type checker
        changed = _rounded(weight.detach().cpu(), stored)
        _refuse_too_large(name, stored, changed.isfinite())
        return changed


def stack_of(name: str) -> tuple[str, int]:
    """The name of the stack in which a linear map's weight is one matrix, and its index there.

    Nothing, and 0, for a name of another kind.
    """
    found = re.fullmatch(r"(.*)\.(\d+)\.(\w+)\.weight", name)
    return ("", 0) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))


def _refuse_too_large(name: str, stored: torch.dtype, fits: Tensor) -> None:
    if not bool(fits.all()):
        raise ModelError(
            f"'{name}' holds numbers that {_word(stored)}, the dtype of its file, cannot "
            "hold; convert the source to bfloat16 or float32 first, or choose a recipe that "
            "leaves weights as they are"
        )


def round_as_stored(source: Source, name: str, weight: Tensor, *, like: str = "") -> None:
    """Round a tensor of the model in place as its file will hold it, so that both compute the same.

    Args:
        name: of the tensor in the model.
        like: another name, whose dtype counts where the files lack the first.
    """
    stored = source.dtype_of(name) or source.dtype_of(like)
    if stored is None or holds(stored, weight.dtype):
        return
    rounded = _rounded(weight, stored).to(weight.dtype)
    # What is beyond the stored dtype is told when it is saved.
    weight.copy_(torch.where(rounded.isfinite(), rounded, weight))


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other."""
    return torch.promote_types(wide, narrow) == wide


def _is_kept(stored: Tensor, weight: Tensor) -> Tensor:
    """Which numbers are those of the file, as far as the dtype of the computation tells."""
    asked = stored.to(weight.dtype)
    same = asked.view(_BITS[weight.dtype.itemsize]) == weight.view(_BITS[weight.dtype.itemsize])
    if bool(same.all()):
        # Nothing was removed here.
        return same
    # A number too small for the computation cannot be told from one that was removed.
    return same & ~((weight == 0) & (stored != 0))


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # Adding +0.0 turns -0.0, which some kernels take for a value, into +0.0.
    return weight.to(dtype) + 0.0


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
