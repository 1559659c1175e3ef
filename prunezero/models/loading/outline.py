"""What is a model without its weights: all of its shapes, and nothing of its size in memory?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prunezero.models.loading.checkpoints import checked_configuration
from prunezero.models.loading.language_model import LanguageModel, quiet
from prunezero.models.loading.load import DTYPES, check_dtype, explained, local_folder


def outlined_model(source: str, *, dtype: str = "auto", device: str = "cpu") -> LanguageModel:
    """A model of which only the configuration is read: for what looks at shapes alone.

    It has no tokenizer and no fingerprint, and its weights, all on the CPU, are one number each.

    Args:
        source: as the name of `load_model`, or the path of a config.json.
        dtype: that it would compute in; "auto" is what `load_model` would choose, as far as the
            configuration says in which dtype its files are.
        device: that it would be on, by type.

    Raises:
        ModelError: the configuration cannot be read, asks for foreign code, or is no causal
            language model's.
    """
    check_dtype(dtype)
    # What a file of another format holds is unpacked as for any other command.
    is_packed = source == "demo" or Path(source).suffix == ".gguf"
    folder = str(local_folder(source)) if is_packed else source
    with quiet(), explained(source):
        configuration = checked_configuration(folder, source)
        chosen = DTYPES.get(dtype) or _usual_dtype(configuration, device)
        model = without_weights(configuration, chosen)
        weights = list(model.parameters())
        for weight, outline in zip(weights, outlines(weights, torch.device("cpu")), strict=True):
            exchange(weight, outline)
    return LanguageModel(model, None, source, "", chosen, torch.device(device))


def _usual_dtype(configuration: Any, device: str) -> torch.dtype:
    stored = getattr(configuration, "dtype", None)
    is_half = torch.device(device).type != "cpu" and stored == torch.bfloat16
    return torch.bfloat16 if is_half else torch.float32


def without_weights(configuration: Any, dtype: torch.dtype) -> Any:
    """The network with every parameter on the meta device and every buffer real."""
    from transformers import AutoModelForCausalLM

    handle = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]
    try:
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    finally:
        handle.remove()
    return model.eval().requires_grad_(False)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def outlines(weights: Sequence[nn.Parameter], device: torch.device) -> list[nn.Parameter]:
    """Of each weight one with its shape and a place of its own, all of whose numbers are one."""
    found = []
    for weight in weights:
        number = torch.zeros((1,) * weight.dim(), dtype=weight.dtype, device=device)
        found.append(nn.Parameter(number.expand(weight.shape), requires_grad=False))
    return found


def exchange(left: nn.Parameter, right: nn.Parameter) -> None:
    """Let two parameters swap numbers, device and shape; who refers to one finds the other's."""
    torch.utils.swap_tensors(left, right)  # type: ignore[no-untyped-call]
