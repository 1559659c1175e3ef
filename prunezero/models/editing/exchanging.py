"""How do parameters and plain numbers of a model change for a while, so that they come back?"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def held(model: nn.Module, name: str) -> Tensor:
    """A parameter of a model, or a buffer, by its name."""
    path, _, kind = name.rpartition(".")
    found = getattr(model.get_submodule(path), kind)
    assert isinstance(found, Tensor)  # for the type checker
    return found


def put(model: nn.Module, name: str, values: Tensor) -> None:
    """Exchange a parameter or buffer of a module, and let it know its own size."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if kind in module._buffers:
        setattr(module, kind, values)
        return
    is_parameter = isinstance(values, nn.Parameter)
    setattr(module, kind, values if is_parameter else nn.Parameter(values, requires_grad=False))
    if kind != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = values.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(values.shape)
    elif hasattr(module, "nf"):
        # transformers' Conv1D, whose weight is [in, out].
        for size, value in zip(("nx", "nf"), values.shape, strict=True):
            setattr(module, size, value)


def exchange(model: nn.Module, name: str, values: Tensor, undo: ExitStack) -> None:
    """Put a parameter or buffer in the place of another, which comes back when `undo` is left."""
    undo.callback(put, model, name, held(model, name))
    put(model, name, values)


def set_value(owner: Any, key: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute, which is what it was when `undo` is left."""
    if hasattr(owner, key):
        undo.callback(setattr, owner, key, getattr(owner, key))
    else:
        # None in the place of nothing would be another setting.
        undo.callback(delattr, owner, key)
    setattr(owner, key, value)


def set_number(module: nn.Module, key: str, value: Any, undo: ExitStack) -> None:
    """Let a module keep another number, and the buffers that hold it too."""
    before = getattr(module, key)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() == 0 and torch.equal(buffer, torch.tensor(before).to(buffer)):
            set_value(module, name, torch.tensor(value).to(buffer), undo)
    set_value(module, key, value, undo)
