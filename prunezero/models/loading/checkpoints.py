"""Can the model in a folder be loaded safely and pruned? Told by its configuration and headers.

The configuration is read first; what could run foreign code is refused before anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunezero.errors import ModelError
from prunezero.models.loading.checks import check_layout
from prunezero.models.loading.shards import INDEX, SINGLE, Shards, files_of_tensors
from prunezero.models.loading.sizes import check_sizes
from prunezero.models.loading.source import Source
from prunezero.models.unequal.families import is_own_type, register

# A configuration may name any other by a repository, and transformers would fetch its code.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# It would be read in place of the files that are checked.
_OTHER_FILE = "transformers_weights"
# Where peft is installed, transformers would load the model that such a file names, not this one.
_ADAPTER = "adapter_config.json"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model that can be loaded safely and pruned, as far as its headers tell."""

    configuration: Any
    """of the model, by transformers"""
    source: Source
    """its files, of which only the headers were read"""


def checked_checkpoint(source: str, name: str) -> Checkpoint:
    """What a folder or hub id holds, once it is sure that it can be loaded safely and pruned.

    Every way in passes here, before anything of the size of the model is allocated.

    Args:
        source: folder or hub id.
        name: of the model, as the user wrote it.

    Raises:
        ModelError: it asks for foreign code, is quantized, or is no causal language model; or its
            files are damaged, lack weights, or are others than its configuration says.
    """
    from transformers import CONFIG_MAPPING

    raw = _checked_settings(source, name)
    kind = CONFIG_MAPPING[raw["model_type"]]
    _refuse_other_kinds(raw, kind, name)
    shards = Shards(_folder_of(source))
    if (shards.folder / _ADAPTER).is_file():
        raise ModelError(
            f"model '{name}' comes with an adapter ({_ADAPTER}); merge it into the weights first, "
            "or take that file away to prune the model without it"
        )
    check_sizes(raw, getattr(kind, "attribute_map", {}), len(shards.tensors), name)
    configuration = kind.from_dict(raw)
    names, pieces = check_layout(configuration, shards.tensors, name)
    return Checkpoint(configuration, Source(shards, names, pieces))


def checked_configuration(source: str, name: str) -> Any:
    """The configuration alone, once it is sure that no foreign code is asked for.

    Args:
        source: folder, hub id, or the path of a config.json.
        name: of the model, as the user wrote it.

    Raises:
        ModelError: it asks for foreign code, is quantized, or is no causal language model.
    """
    from transformers import CONFIG_MAPPING

    raw = _checked_settings(source, name)
    kind = CONFIG_MAPPING[raw["model_type"]]
    _refuse_other_kinds(raw, kind, name)
    return kind.from_dict(raw)


def _folder_of(source: str) -> Path:
    """The folder itself, or that of a hub id in the cache, once its weights are there."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return Path(source)
    optional: Any = {"_raise_exceptions_for_missing_entries": False}
    found = cached_file(source, SINGLE, **optional) or cached_file(source, INDEX, **optional)
    if found is None:
        raise ModelError(f"model '{source}' has no safetensors files; choose one that has")
    folder = Path(found).parent
    if Path(found).name == INDEX:
        for file in sorted(set(files_of_tensors(folder).values())):
            cached_file(source, file)
    return folder


def _checked_settings(source: str, name: str) -> dict[str, Any]:
    """The configuration as its file holds it, of a type that transformers knows by itself."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(source)
    if not isinstance(raw, dict):
        raise ModelError(f"config.json of model '{name}' holds no settings; get the file again")
    register(raw.get("model_type"))
    _refuse_foreign_code(raw, name)
    if any(raw.get(key) for key in _QUANTIZATION_KEYS):
        raise ModelError(
            f"model '{name}' is quantized; prune the full-precision checkpoint, then quantize"
        )
    if raw.get(_OTHER_FILE):
        raise ModelError(
            f"config.json of model '{name}' names its weights by {_OTHER_FILE}; call that file "
            f"{SINGLE} (an index {INDEX}), and take the key away"
        )
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"model '{name}' has the type '{kind}', which transformers does not know")
    return raw


def _refuse_other_kinds(raw: dict[str, Any], kind: Any, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    written = raw.get("architectures") or []
    written = [written] if isinstance(written, str) else [str(word) for word in written]
    causal = not written or any(word.endswith(("ForCausalLM", "LMHeadModel")) for word in written)
    if raw.get("is_encoder_decoder") or not causal or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model '{name}' is a {', '.join(written) or raw['model_type']}; only decoder-only "
            "language models (...ForCausalLM) can be pruned"
        )


def _refuse_foreign_code(raw: dict[str, Any], name: str) -> None:
    """Refuse whatever would make transformers run code that is not its own.

    A type of ours is read by the classes of this package, whatever files lie in the folder.
    """
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if is_own_type(kind) and kind in CONFIG_MAPPING:
        raw = {key: value for key, value in raw.items() if key != "auto_map"}
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        if part.get("auto_map"):
            raise ModelError(
                f"model '{name}' comes with its own Python code (auto_map in config.json), which "
                "prunezero never runs; choose a model that transformers knows by itself"
            )
        for key in _CODE_KEYS:
            if part.get(key) not in (None, *ATTENTIONS):
                raise ModelError(
                    f"model '{name}' asks for the attention code {part[key]!r} ({key} in "
                    f"config.json), which prunezero never fetches; known: {', '.join(ATTENTIONS)}"
                )
