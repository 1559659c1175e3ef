"""Which tensor of the model is each stored tensor, or which part of one?

Most are the same in both. Experts are stored one by one, and in memory they stand in stacks: there
a stored tensor is a part of one matrix of a stack. Whatever else transformers makes of stored
tensors has no place here, and whoever needs one refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunezero.errors import ModelError
from prunezero.models.loading.shards import StoredTensor


@dataclass(frozen=True)
class Piece:
    """What a stored tensor is of a tensor of the model: rows of one matrix of a stack."""

    name: str
    """of the stack [experts, out, in] in the model"""
    index: int
    """of the matrix"""
    part: int
    """of its equal parts along the rows, which one"""
    parts: int
    """how many there are"""

    @property
    def matrix(self) -> str:
        """The name of the weight of its linear map, such as mlp.experts.3.down_proj.weight."""
        experts, _, stack = self.name.rpartition(".")
        return f"{experts}.{self.index}.{stack}.weight"

    def of(self, stack: Tensor) -> Tensor:
        """These rows of a stack; they share storage with it."""
        return self.rows_of(stack[self.index])

    def rows_of(self, matrix: Tensor) -> Tensor:
        """These rows of its matrix, wherever in a stack that stands by now."""
        return matrix.chunk(self.parts)[self.part]


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the files by name in the model, by the table that transformers loads by.

    Args:
        model: a transformers model, on whatever device.
        stored: names in the files; those of tensors that change their layout are left out.

    Raises:
        ModelError: two of them are the same tensor of the model.
    """
    found: dict[str, str] = {}
    for name, (target, pattern) in targets_of(model, stored).items():
        if pattern is None and target in found:
            raise ModelError(
                f"the files hold '{target}' twice, as '{found[target]}' and as '{name}'; get the "
                "files again"
            )
        if pattern is None:
            found[target] = name
    return found


def pieces_in_files(model: Any, stored: Iterable[str]) -> dict[str, Piece]:
    """What stored tensors are of stacks in the model, by their names in the files.

    Those are left out that are the same in both, and those of any other change of layout.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    table = {}
    for converter in get_model_conversion_mapping(model):
        if _makes_a_stack(converter):
            for part, pattern in enumerate(converter.source_patterns):
                table[pattern] = part, len(converter.source_patterns)
    found = {}
    for name, (target, pattern) in targets_of(model, stored).items():
        # The last star of a pattern counts the experts.
        ending = None if pattern is None else pattern.rpartition("*")[2]
        number = re.search(rf"\.(\d+){re.escape(ending)}$", name) if ending else None
        if pattern in table and number is not None:
            found[name] = Piece(target, int(number[1]), *table[pattern])
    return found


def shapes_in_files(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """Sizes of the model's tensors as files hold them, by their names in the model.

    Left out are those that transformers makes in other ways than `pieces_in_files` knows.
    """
    names = names_in_files(model, stored)
    shapes = {name: list(stored[file].shape) for name, file in names.items()}
    for file, piece in pieces_in_files(model, stored).items():
        rows, columns = stored[file].shape
        before = shapes.get(piece.name, [0])[0]
        shapes[piece.name] = [max(before, piece.index + 1), rows * piece.parts, columns]
    return shapes


def _makes_a_stack(converter: Any) -> bool:
    """Whether matrices are put upon each other, after those of one expert were joined by rows."""
    steps = [
        (type(one).__name__, getattr(one, "dim", None))
        for one in getattr(converter, "operations", ())
    ]
    stacked, joined = ("MergeModulelist", 0), ("Concatenate", 1)
    return steps == [stacked] or steps == [stacked, joined]


def targets_of(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """What each stored tensor becomes in the model, and which pattern changes its layout.

    The pattern is None where the layout stays. Of several that become one by a change of layout
    each has the same target. Tensors that the model does not use are left out.
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
            found[name] = target, converter
    return found
