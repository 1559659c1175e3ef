"""Which tensors of a folder are those of single experts, and what are they called once some went?

Files hold each expert of most families by itself, with its number in the name, where the model has
all of them in one tensor. Those of experts that go are left out, the others get new numbers, and
keep all their bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from prunezero.errors import ModelError
from prunezero.models.anatomy.expert_linears import DOWN, UP
from prunezero.models.editing.widths import Cut
from prunezero.models.loading.source import Source


def renamed_experts(source: Source, cuts: Mapping[str, Cut]) -> dict[str, str | None]:
    """New names of stored tensors of single experts, by the old ones; None where one goes.

    Args:
        cuts: what stays of each parameter of the model, by name; those that the files hold in the
            same layout are cut there.

    Raises:
        ModelError: the files hold experts in another way.
    """
    stacks = {name for name in cuts if name.rpartition(".")[2] in (UP, DOWN)}
    apart = stacks - source.names.keys()
    found: dict[str, str | None] = {}
    for stored, piece in source.pieces.items():
        if piece.name in apart:
            place = place_now(cuts[piece.name], piece.index)
            found[stored] = None if place is None else _numbered(stored, piece.index, place)
    for name in apart - {piece.name for piece in source.pieces.values()}:
        raise ModelError(
            f"the files in '{source.folder}' hold the experts of '{name}' in a way that cannot be "
            "cut there; load the model once, save it by its own save_pretrained, and prune that "
            "folder"
        )
    return found


def place_now(cut: Cut | None, index: int) -> int | None:
    """The place of a matrix in what is left of its stack; None where it goes."""
    if cut is None:
        return index
    kept = cut.kept.tolist()
    return kept.index(index) if index in kept else None


def _numbered(name: str, before: int, now: int) -> str:
    """A name with another number of its expert, which is the last one between dots."""
    begin, number, end = re.fullmatch(r"(.*\.)(\d+)(\.[^.\d].*)", name).groups()  # type: ignore[union-attr]
    assert int(number) == before  # pieces were found by it; for the reader
    return f"{begin}{now}{end}"
