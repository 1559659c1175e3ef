"""Which tensors of a folder are those of single experts, and what are they called once some went?

Files hold each expert of most families by itself, with its number in the name, where the model has
all of them in one tensor. Those of experts that go are left out, the others get new numbers, and
keep all their bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prunezero.errors import ModelError
from prunezero.models.anatomy.experts import DOWN, UP
from prunezero.models.editing.widths import Cut
from prunezero.models.loading.source import Source, targets_of

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


def renamed_experts(model: Any, source: Source, cuts: Mapping[str, Cut]) -> dict[str, str | None]:
    """New names of stored tensors of single experts, by the old ones; None where one goes.

    Args:
        cuts: what stays of each parameter of the model, by name; those that the files hold in the
            same layout are cut there.

    Raises:
        ModelError: the files hold experts in another way.
    """
    stacks = {name for name in cuts if name.rpartition(".")[2] in (UP, DOWN)}
    inside = {name: cuts[name] for name in stacks - source.names.keys()}
    if not inside:
        return {}
    found: dict[str, str | None] = {}
    stored_in: dict[str, set[int]] = {name: set() for name in inside}
    for stored, (target, _) in targets_of(model, source.shards.tensors).items():
        if target not in inside:
            continue
        number = _last_number(stored)
        kept = inside[target].kept.tolist()
        if number is None:
            raise _other_layout(source, stored)
        stored_in[target].add(int(number[0]))
        begin, end = number.span()
        is_kept = int(number[0]) in kept
        now = kept.index(int(number[0])) if is_kept else 0
        found[stored] = f"{stored[:begin]}{now}{stored[end:]}" if is_kept else None
    for name, numbers in stored_in.items():
        if not numbers or numbers != set(range(len(numbers))):
            raise _other_layout(source, name)
    return found


def _last_number(name: str) -> re.Match[str] | None:
    """The last whole number between dots of a name."""
    return next(iter(reversed(list(_NUMBERS.finditer(name)))), None)


def _other_layout(source: Source, name: str) -> ModelError:
    return ModelError(
        f"the files in '{source.folder}' hold the experts of '{name}' in a way that cannot be cut "
        "there; load the model once, save it by its own save_pretrained, and prune that folder"
    )
