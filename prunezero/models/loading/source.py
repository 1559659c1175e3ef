"""Which files does a model come from, and which of their numbers does it still have?

The dtype of the computation is a choice for speed; what is saved is decided by the files. A weight
that is what its file says, as far as the dtype of the computation can tell, keeps the number of the
file, to the last bit; another one is rounded once to the dtype of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.loading.shards import STORED_DTYPES, Shards

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Source:
    """The safetensors files that a model was loaded from."""

    shards: Shards
    """their tensors"""
    names: Mapping[str, str]
    """name in the files by name in the model, of tensors that are the same in both"""
    moved: set[str] = field(default_factory=set)
    """layers whose channels have changed places in the model since"""

    @property
    def folder(self) -> Path:
        """Where the files are, with the configuration and tokenizer beside them."""
        return self.shards.folder

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype in the files of a tensor of the model; None where the files lack it."""
        stored = self.names.get(name)
        return None if stored is None else STORED_DTYPES.get(self.shards.tensors[stored].dtype)

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
        weight = weight.detach().cpu()
        if stored.shape != weight.shape:
            raise ModelError(
                f"'{name}' has shape {list(weight.shape)} but {list(stored.shape)} in the files in "
                f"'{self.folder}'; save such a model by its own save_pretrained"
            )
        is_kept = _is_kept(stored, weight)
        changed = _rounded(weight, stored.dtype)
        self._refuse_too_large(name, changed.isfinite() | is_kept)
        return torch.where(is_kept, stored, changed)

    def made_anew(self, name: str, weight: Tensor) -> Tensor:
        """The same of a tensor of any shape that has nothing to do with that of the file.

        Raises:
            ModelError: a number is too large for the stored dtype.
        """
        stored = self.dtype_of(name)
        assert stored is not None  # whoever asks has seen the name; for the type checker
        changed = _rounded(weight.detach().cpu(), stored)
        self._refuse_too_large(name, changed.isfinite())
        return changed

    def _refuse_too_large(self, name: str, fits: Tensor) -> None:
        stored = self.dtype_of(name)
        if stored is not None and not bool(fits.all()):
            raise ModelError(
                f"'{name}' holds numbers that {_word(stored)}, the dtype of its file, cannot "
                "hold; convert the source to bfloat16 or float32 first, or choose a recipe that "
                "leaves weights as they are"
            )


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the files by name in the model, by the table that transformers loads by.

    Args:
        model: a transformers model, on whatever device.
        stored: names in the files; those of tensors that change their layout are left out.

    Raises:
        ModelError: two of them are the same tensor of the model.
    """
    found: dict[str, str] = {}
    for name, (target, is_same) in targets_of(model, stored).items():
        if is_same and target in found:
            raise ModelError(
                f"the files hold '{target}' twice, as '{found[target]}' and as '{name}'; get the "
                "files again"
            )
        if is_same:
            found[target] = name
    return found


def targets_of(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """What each stored tensor becomes in the model, and whether it keeps its layout.

    Of several that become one by a change of layout each has the same. Tensors that the model does
    not use are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    known = model.state_dict()
    prefix = model.base_model_prefix
    found = {}
    for name in stored:
        target, converter = rename_source_key(name, renamings, converters, prefix, known)
        # As transformers does it: a name that is right already is left alone.
        if target not in known and name in known:
            target, converter = rename_source_key(name, [], [], prefix, known)
        if target in known:
            found[name] = target, converter is None
    return found


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
