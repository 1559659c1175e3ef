"""Does a model change its own weights when it is run? Then what is saved is not what was loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from prunezero.errors import ModelError


def refuse_own_changes(model: nn.Module, name: str, run: Callable[[], object]) -> None:
    """Run a model, and refuse it if that wrote to its weights.

    A pruned weight could not be told from a rewritten one, and the files would hold both.

    Args:
        model: in evaluation mode.
        name: of it, for the message.
        run: a forward pass; its own errors are left to those who need its result.

    Raises:
        ModelError: a weight was written to, whatever the numbers; the model is spoilt then.
    """
    before = _states(model)
    with torch.no_grad(), suppress(Exception):
        run()
    after = _states(model)
    changed = [key for key, state in after.items() if state != before.get(key)]
    if changed:
        raise ModelError(
            f"model '{name}' ({type(model).__name__}) changes its own weights in a forward pass, "
            f"'{changed[0]}' among {len(changed)}, so its files could not be kept; switch that off "
            "in its config.json (rescale_every: 0 for RWKV), or choose another model"
        )


def _states(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each weight is, and how often it was written to since it was made."""
    return {
        key: (parameter.data_ptr(), parameter._version)
        for key, parameter in model.named_parameters()
        if not parameter.is_inference()
    }
