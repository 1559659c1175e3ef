"""Which classes are models whose layers differ: in this process, and as files of a saved folder?

A class of transformers gets `LayerSettings`, or `UnequalLayers`, `UnequalMixtures` and
`RotatedStream`, put before it. The files of a folder hold the text of those that it needs, and need
nothing but transformers. `load_model` reads such a folder by the classes of this package; files of
a folder are never run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.models.unequal import layers, mixtures, rotated, settings
from prunezero.models.unequal.layers import UnequalLayers
from prunezero.models.unequal.mixtures import UnequalMixtures
from prunezero.models.unequal.rotated import RotatedStream
from prunezero.models.unequal.settings import LayerSettings

# Before the usual type of a model: other software must not take it for one.
PREFIX = "pruned_"
CONFIGURATION_FILE, MODEL_FILE = "configuration_pruned", "modeling_pruned"
ROTATED_FILE, MIXTURES_FILE = "rotated_pruned", "mixtures_pruned"
_OF_LAYOUTS = """from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
"""


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
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

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
        classes = (RotatedStream, UnequalMixtures, UnequalLayers, kind)
        auto.register(configuration, type(_own(kind), classes, dict(parts)))
    for own, known in _layouts_of(model_type).items():
        register_checkpoint_conversion_mapping(
            own, get_checkpoint_conversion_mapping(known), overwrite=True
        )


def _layouts_of(model_type: str) -> dict[str, str]:
    """Types and classes of ours whose files hold tensors as those of the usual ones, by these.

    transformers knows that of its own classes alone, such as that experts are stored one by one.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kinds = _usual_classes(model_type) or ()
    words = {model_type: usual_type(model_type)} | {_own(kind): kind.__name__ for kind in kinds[1:]}
    return {
        own: known
        for own, known in words.items()
        if get_checkpoint_conversion_mapping(known) is not None
    }


def class_files(model_type: str, *, is_rotated: bool = False) -> dict[str, str]:
    """The Python files of a folder with such a model, text by file name.

    Args:
        model_type: begins with `PREFIX`.
        is_rotated: whether its stream has several bases.
    """
    usual: Sequence[Any] = _usual_classes(model_type) or ()
    configuration, *models = (kind.__name__ for kind in usual)
    parts = "".join(f"    {key} = {word!r}\n" for key, word in vars(parts_of(model_type)).items())
    own, others = f"Pruned{configuration}", {}
    if is_rotated:
        others["RotatedStream"] = ROTATED_FILE, rotated
    if usual and usual[1]._can_set_experts_implementation():
        others["UnequalMixtures"] = MIXTURES_FILE, mixtures
    more = {f"{name}.py": _text(module) for name, module in others.values()}
    before = ", ".join([*others, "UnequalLayers"])
    imports = "".join(f"\nfrom .{name} import {kind}" for kind, (name, _) in others.items())
    layouts = _layouts_of(model_type)
    return more | {
        f"{CONFIGURATION_FILE}.py": (
            f"{_text(settings, f'from transformers import {configuration}')}\n\n"
            f"class {own}(LayerSettings, {configuration}):\n"
            f'    """{configuration} with settings for single layers."""\n\n'
            f'    model_type = "{model_type}"\n'
        ),
        f"{MODEL_FILE}.py": _text(
            layers,
            f"from transformers import {', '.join(sorted(models))}\n"
            f"{_OF_LAYOUTS if layouts else ''}\n"
            f"from .{CONFIGURATION_FILE} import {own}{imports}",
        )
        + "".join(
            f"\n\nclass Pruned{name}({before}, {name}):\n"
            f'    """{name} with layers of different sizes."""\n\n'
            f"    config_class = {own}\n{parts}"
            for name in models
        )
        + _registering(layouts),
    }


def _registering(layouts: Mapping[str, str]) -> str:
    """The lines by which classes of a folder know how its files hold tensors; see `_layouts_of`."""
    lines = [
        f'register_checkpoint_conversion_mapping(\n    "{own}", '
        f'get_checkpoint_conversion_mapping("{known}"), overwrite=True\n)\n'
        for own, known in layouts.items()
    ]
    said = "\n\n# Files hold tensors as those of the usual classes do.\n"
    return said + "".join(lines) if lines else ""


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


def _text(module: Any, imports: str = "") -> str:
    """The text of one of our modules, with more imports after its own."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    if not imports:
        return text
    head, mark, rest = text.partition("\n\n\nclass ")
    return f"{head}\n{imports}{mark}{rest}"
