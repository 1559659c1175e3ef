"""A tiny model that knows a text, pruned by half, and what trainings of it need."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from tests.tiny_models import tiny_batches, tiny_network, tiny_tokenizer

# What the model was trained on.
TEXT = tiny_batches(6, 12)


@functools.cache
def _knowing_network() -> Any:
    network = tiny_network("llama")
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    with torch.enable_grad():
        network.requires_grad_(True)
        for _ in range(25):
            for ids in TEXT:
                sequence_loss(network, ids[None]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return network


def knowing_model() -> LanguageModel:
    """A fresh copy of a tiny model that predicts `TEXT` well."""
    network = tiny_network("llama")
    network.load_state_dict(_knowing_network().state_dict())
    return wrap_model(network, tiny_tokenizer(), name="llama")


def halved(model: LanguageModel) -> LanguageModel:
    """The model without the smaller half of each layer's weights, in place."""
    for layer in find_linears(model.model):
        layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0.0
    return model


def recipe(**choices: Any) -> Recipe:
    """A recipe by the size of weights, with other choices."""
    fields: dict[str, Any] = {"name": "mine", "criterion": "abs(W)"}
    return validated(Recipe, fields | choices, "mine.yaml")


def digest(model: LanguageModel) -> str:
    """Of all bits of its tensors."""
    tensors = [tensor.view(torch.uint8).numpy() for tensor in model.model.state_dict().values()]
    return hashlib.sha256(b"".join(tensor.tobytes() for tensor in tensors)).hexdigest()


def logits_of(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits [count, length, vocabulary] of windows."""
    with torch.no_grad():
        return model.model(ids, use_cache=False).logits


class StopError(Exception):
    """Ends a training from outside."""


def stop_after(steps: int) -> Any:
    """A progress that stops a training after so many of its steps."""

    def progress(what: str, done: int, total: int) -> None:
        if "tuning" in what and done == steps:
            raise StopError

    return progress
