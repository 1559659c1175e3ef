"""Blocks, the layers of a decoder: the longest list of equal modules with linear maps inside."""

from __future__ import annotations

from torch import nn

from prunezero.errors import ModelError


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map: nn.Linear or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in order.

    Raises:
        ModelError: the model is an encoder-decoder, or has no list of equal blocks.
    """
    return list(block_list(model)[1])


def block_prefix(model: nn.Module) -> str:
    """The name of the list of decoder blocks, such as "model.layers".

    Raises:
        ModelError: as `find_blocks`.
    """
    return block_list(model)[0]


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks.

    Raises:
        ModelError: as `find_blocks`.
    """
    configuration = getattr(model, "config", None)
    if getattr(configuration, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be pruned"
        )
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            equal = len({type(block) for block in module}) == 1
            if equal and "expert" not in name and any(map(is_linear, module.modules())):
                found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of equal decoder blocks with linear layers in it; "
            "this layout is not supported"
        )
    return max(found, key=lambda entry: len(entry[1]))
