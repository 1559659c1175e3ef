"""Sub-blocks that go: modules that compute nothing and hold no parameters stand in their place.

They add nothing to the residual stream, so zeros in their weights, stand-ins in their places and a
model without the block give the same logits. A cache of keys and values is still told how many
tokens there were, because models count them by its first layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunezero.models.anatomy.sub_blocks import SubBlock, sub_blocks_of
from prunezero.models.editing.edit import Edit
from prunezero.models.editing.selection import Selection
from prunezero.models.editing.zeroing import zeroed
from prunezero.models.loading.language_model import LanguageModel


class AddsNothing(nn.Module):
    """Stands for the module of a sub-block, and adds nothing to the stream."""

    def __init__(self, original: nn.Module, sub_block: SubBlock) -> None:
        """Stand for a module, which may have the number of its layer in a cache."""
        super().__init__()
        self.width = sub_block.writer.weight.shape[0]
        self.hands_on, self.is_tuple = sub_block.hands_on, sub_block.is_tuple
        self.layer_idx: int | None = getattr(original, "layer_idx", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module would return, were its weights zeros."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        state = next(one for one in given.values() if isinstance(one, Tensor))
        for cache in given.values():
            if hasattr(cache, "get_seq_length") and self.layer_idx is not None:
                # One number for each token: none would be no token.
                count = state.new_zeros(state.shape[0], 1, state.shape[1], 1)
                cache.update(count, count, self.layer_idx)
        if self.hands_on is None:
            returned = state.new_zeros(*state.shape[:-1], self.width)
        else:
            returned = given[self.hands_on]
        return (returned, None) if self.is_tuple else returned


@contextmanager
def skipped(language_model: LanguageModel, sub_blocks: Sequence[SubBlock]) -> Iterator[None]:
    """Within it the model computes without these sub-blocks; their modules come back afterwards."""
    model = language_model.model
    stand_ins = _stand_ins(model, sub_blocks)
    before = {path: model.get_submodule(path) for path in stand_ins}
    try:
        _put(model, stand_ins)
        yield
    finally:
        _put(model, before)


def remove(language_model: LanguageModel, selection: Selection) -> None:
    """Take sub-blocks out of a model for good: their parameters leave memory.

    Raises:
        ModelError: as `find_sub_blocks`.
    """
    _put(language_model.model, _stand_ins(language_model.model, gone_of(language_model, selection)))


def gone_of(language_model: LanguageModel, selection: Selection) -> list[SubBlock]:
    """The sub-blocks that a selection takes away."""
    return sub_blocks_of(language_model, [group for group, kept in selection if not kept.all()])


WITHOUT = Edit(zeroed, remove)


def _stand_ins(model: nn.Module, sub_blocks: Sequence[SubBlock]) -> dict[str, nn.Module]:
    """What takes the place of each module that holds nothing but parameters of the sub-blocks."""
    stand_ins: dict[str, nn.Module] = {}
    for one in sub_blocks:
        # Norms before it, whose output nobody needs, and behind it, which would see zeros.
        stand_ins |= {path: nn.Identity() for path in one.modules}
        stand_ins[one.module] = AddsNothing(model.get_submodule(one.module), one)
    return stand_ins


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module
