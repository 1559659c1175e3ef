"""Which classes are models whose layers differ: in this process, and as files of a saved folder?

A class of transformers gets `LayerSettings`, or `UnequalLayers` and `RotatedStream`, put before it.
The files of a folder hold the text of those that it needs, and need nothing but transformers.
`load_model` reads such a folder by the classes of this package; files of a folder are never run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.models.unequal import layers, rotated, settings
from prunezero.models.unequal.layers import UnequalLayers
from prunezero.models.unequal.rotated import RotatedStream
from prunezero.models.unequal.settings import LayerSettings

# Before the usual type of a model: other software must not take it for one.
PREFIX = "pruned_"
CONFIGURATION_FILE, MODEL_FILE = "configuration_pruned", "modeling_pruned"
ROTATED_FILE = "rotated_pruned"


@dataclass(frozen=True)
class Parts:
    """What a family calls the parts of its models."""

    layer_list: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    """empty where an MLP is no module of its own"""


PARTS = {
    "gpt2": Parts("h", "attn"),
    "gpt_neox": Parts(attention="attention"),
    "opt": Parts(mlp=""),
}


def is_own_type(model_type: Any) -> bool:
    """Whether models of this type have layers of different sizes, and our classes."""
    return isinstance(model_type, str) and model_type.startswith(PREFIX)


def usual_type(model_type: str) -> str:
    """The type of the usual models of a family, such as llama."""
    return model_type.removeprefix(PREFIX)


def parts_of(model_type: str) -> Parts:
    """What the family of a model calls its parts."""
    return PARTS.get(usual_type(model_type), Parts())


def layer_settings(configuration: Any, index: int) -> Any:
    """A copy of a model's settings for one of its layers, which may be changed."""
    if isinstance(configuration, LayerSettings):
        return configuration.of_layer(index)
    return copy.deepcopy(configuration)


def register(model_type: Any) -> None:
    """Let transformers know the classes of a type that begins with `PREFIX`, once."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

    if not is_own_type(model_type):
        return
    if model_type in CONFIG_MAPPING or usual_type(model_type) not in CONFIG_MAPPING:
        return
    usual = _usual_classes(model_type)
    if usual is None:
        return
    configuration = type(_own(usual[0]), (LayerSettings, usual[0]), {"model_type": model_type})
    AutoConfig.register(model_type, configuration)
    parts = vars(parts_of(model_type)) | {"config_class": configuration}
    for auto, kind in zip((AutoModel, AutoModelForCausalLM), usual[1:], strict=True):
        classes = (RotatedStream, UnequalLayers, kind)
        auto.register(configuration, type(_own(kind), classes, dict(parts)))


def class_files(model_type: str, *, is_rotated: bool = False) -> dict[str, str]:
    """The Python files of a folder with such a model, text by file name.

    Args:
        model_type: begins with `PREFIX`.
        is_rotated: whether its stream has several bases.
    """
    configuration, *models = (kind.__name__ for kind in _usual_classes(model_type) or ())
    parts = "".join(f"    {key} = {word!r}\n" for key, word in vars(parts_of(model_type)).items())
    own = f"Pruned{configuration}"
    more = {f"{ROTATED_FILE}.py": Path(rotated.__file__).read_text("utf-8")} if is_rotated else {}
    before = "RotatedStream, UnequalLayers" if is_rotated else "UnequalLayers"
    imports = f"\nfrom .{ROTATED_FILE} import RotatedStream" if is_rotated else ""
    return more | {
        f"{CONFIGURATION_FILE}.py": (
            f"{_text(settings, f'from transformers import {configuration}')}\n\n"
            f"class {own}(LayerSettings, {configuration}):\n"
            f'    """{configuration} with settings for single layers."""\n\n'
            f'    model_type = "{model_type}"\n'
        ),
        f"{MODEL_FILE}.py": _text(
            layers,
            f"from transformers import {', '.join(sorted(models))}\n\n"
            f"from .{CONFIGURATION_FILE} import {own}{imports}",
        )
        + "".join(
            f"\n\nclass Pruned{name}({before}, {name}):\n"
            f'    """{name} with layers of different sizes."""\n\n'
            f"    config_class = {own}\n{parts}"
            for name in models
        ),
    }


def own_settings(model_type: str) -> Mapping[str, Any]:
    """What config.json says of the classes of such a folder."""
    configuration, model, causal = (kind.__name__ for kind in _usual_classes(model_type) or ())
    return {
        "architectures": [f"Pruned{causal}"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION_FILE}.Pruned{configuration}",
            "AutoModel": f"{MODEL_FILE}.Pruned{model}",
            "AutoModelForCausalLM": f"{MODEL_FILE}.Pruned{causal}",
        },
        "model_type": model_type,
    }


def _usual_classes(model_type: str) -> tuple[Any, Any, Any] | None:
    """Configuration, model without and with head, of the usual models of a family."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    kind = CONFIG_MAPPING[usual_type(model_type)]
    if kind not in MODEL_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return kind, MODEL_MAPPING[kind], MODEL_FOR_CAUSAL_LM_MAPPING[kind]


def _own(kind: Any) -> str:
    return f"Pruned{kind.__name__}"


def _text(module: Any, imports: str) -> str:
    """The text of one of our modules, with more imports after its own."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    head, mark, rest = text.partition("\n\n\nclass ")
    return f"{head}\n{imports}{mark}{rest}"
