"""How does a layer without a bias get one that a saved model keeps?

Its configuration must know of it, or plain transformers drops the bias when it loads the model. So
switches of the configuration (attention_bias, mlp_bias, ...) are tried on an empty copy of the
model, and those that add biases to linear maps, and nothing else, may be turned on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, StatisticsError
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel, quiet
from prunezero.models.saving.companions import edit_configuration


def open_biases(language_model: LanguageModel, layers: Sequence[Linear]) -> list[str]:
    """The names of the biases that were added, all zero, so that every given layer has one.

    A switch of the configuration may be for more layers than were given; they all get a bias. The
    model computes what it did, but its configuration changes, and with it the fingerprint that a
    model wrapped anew would get.

    Raises:
        ModelError: the configuration has no switch for a layer; the model is left as it was.
    """
    model = language_model.model
    switches, added = refuse_without_bias(language_model, layers)
    for switch in switches:
        setattr(model.config.get_text_config(), switch, True)
    for name in sorted(added):
        module = model.get_submodule(name.removesuffix(".bias"))
        zeros = module.weight.new_zeros(module.weight.shape[0])
        module.bias = nn.Parameter(zeros, requires_grad=False)
    return sorted(added)


class ClosedBiases:
    """Within it biases may be opened; behind it those that were not there before are gone.

    Zeros would change nothing of what the model computes, but they would be counted and saved.
    Whoever enters it and never leaves keeps them.
    """

    def __init__(self, model: Any) -> None:
        self._settings = model.config.get_text_config()
        self._closed = _closed_switches(model.config)
        self._bare = [
            one for one in model.modules() if isinstance(one, nn.Linear) and one.bias is None
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *fault: object) -> None:
        for module in self._bare:
            module.register_parameter("bias", None)
        for switch in self._closed:
            setattr(self._settings, switch, False)


def refuse_without_bias(
    language_model: LanguageModel, layers: Sequence[Linear]
) -> tuple[list[str], frozenset[str]]:
    """Switches of the configuration that give all layers a bias, and the biases that they add.

    Raises:
        ModelError: the configuration has no switch for a layer.
    """
    model = language_model.model
    wanted = {f"{layer.name}.bias": layer for layer in layers if layer.bias is None}
    if not wanted:
        return [], frozenset()
    switches = [
        name for name in _closed_switches(model.config) if wanted.keys() & _adds(model, [name])
    ]
    added = _adds(model, switches)
    for name, layer in wanted.items():
        if name not in added:
            raise ModelError(
                f"layer '{layer.name}' has no bias, and the configuration of this model "
                f"({model.config.model_type}) has no switch that gives it one, so a saved bias "
                "would be lost; choose another update than bias, or other targets"
            )
    return switches, added


def note_opened_biases(configuration: Any, folder: Path) -> None:
    """Turn on in a folder's config.json what `open_biases` turned on, and change nothing else.

    Args:
        configuration: of the model that was loaded with that config.json.

    Raises:
        OSError: it cannot be read or written.
    """
    from transformers import AutoConfig

    with quiet():
        before = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    now = configuration.get_text_config().to_dict()
    opened = [name for name in _closed_switches(before) if now.get(name) is True]
    if opened:
        is_part = before.get_text_config() is not before
        changes = dict.fromkeys(opened, True)
        edit_configuration(folder, changes, part="text_config" if is_part else "")


def compensate(layer: Linear, removed_output: Tensor) -> None:
    """Add to the layer's bias, in place, what its removed weights gave on average.

    Args:
        layer: its module must have a bias, see `open_biases`.
        removed_output: `[out]`, the removed weights times the mean input per token.

    Raises:
        ModelError: the layer has no bias.
        StatisticsError: a number is NaN or infinite.
    """
    bias = layer.bias
    if bias is None:
        raise ModelError(f"layer '{layer.name}' has no bias to add to; open its bias first")
    if not bool(torch.isfinite(removed_output).all()):
        raise StatisticsError(
            f"the mean output of the removed weights of '{layer.name}' holds NaN or infinite "
            "numbers; collect the statistics again, with --dtype float32"
        )
    # Added in the wider dtype, rounded once.
    bias.copy_(bias + removed_output.to(bias.device))


def _closed_switches(configuration: Any) -> list[str]:
    settings = configuration.get_text_config().to_dict()
    return [name for name, value in settings.items() if "bias" in name and value is False]


# By model what its switches add, by their names and those of the parameters it has: an empty copy
# takes a fifth of a second, and biases are opened for every recipe that needs them.
_Names = frozenset[str]
_ADDED: WeakKeyDictionary[Any, dict[tuple[_Names, _Names], _Names]] = WeakKeyDictionary()


def _adds(model: Any, switches: Sequence[str]) -> _Names:
    """Biases of linear maps that the switches add; none when they change anything else."""
    have = frozenset(name for name, _ in model.named_parameters())
    known = _ADDED.setdefault(model, {})
    place = frozenset(switches), have
    if place not in known:
        known[place] = _added(model, switches, have)
    return known[place]


def _added(model: Any, switches: Sequence[str], have: _Names) -> _Names:
    configuration = copy.deepcopy(model.config)
    for switch in switches:
        setattr(configuration.get_text_config(), switch, True)
    with torch.device("meta"):
        empty = type(model)(configuration)
    there = frozenset(name for name, _ in empty.named_parameters())
    added = there - have
    linear = {
        f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return added if have <= there and added <= linear else frozenset()
