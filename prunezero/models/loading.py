"""How does a model come in: as a hub id, a folder, a .gguf file or the word "demo"?

The configuration is read first, and whatever could run foreign code or cannot be pruned is refused
before the weights are touched. Only safetensors are read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import ModelError, PruneZeroError, reason
from prunezero.models.cache_folder import cache_dir
from prunezero.models.gguf import demo_file, unpacked_gguf
from prunezero.models.language_model import LanguageModel, quiet, wrap_model
from prunezero.models.names import is_spelled_as_path
from prunezero.models.saving import check_writable, save_model
from prunezero.models.shards import Shards
from prunezero.models.source import Source, names_in_files

__all__ = [
    "DTYPES",
    "LanguageModel",
    "cache_dir",
    "check_dtype",
    "check_writable",
    "checked_configuration",
    "computing_dtype",
    "device_of",
    "explained",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "save_model",
    "trial_dtypes",
    "wrap_model",
]

# float16 is left out: squares of its gradients are zero, its Gram matrices infinite.
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Together, and products of each dtype at least.
TRIAL_SECONDS, TRIAL_ROUNDS = 0.1, 3
# A configuration may name any other by a repository, and transformers would fetch its code.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """A causal language model in evaluation mode, without gradients, and its tokenizer.

    Args:
        name: hub id, folder, .gguf file, or "demo".
        dtype: of every forward pass: "float32", "bfloat16", or "auto", see `computing_dtype`.
        device: a torch device, or "auto": the GPU where there is one.

    Raises:
        ModelError: the model cannot be found, read or pruned; nothing was loaded then.
    """
    place = device_of(device)
    check_dtype(dtype)
    with quiet(), explained(name):
        source = _source(name)
        configuration = checked_configuration(source, name)
        chosen = computing_dtype(dtype, place, source, configuration)
        model = _load_network(source, name, configuration, chosen)
        tokenizer = load_tokenizer(source)
        shards = Shards(_folder_of(source))
    files = Source(shards, names_in_files(model, shards.tensors))
    return wrap_model(model.to(place), tokenizer, name=name, source=files)


def _folder_of(source: str) -> Path:
    from transformers.utils import cached_file

    folder = Path(source)
    return folder if folder.is_dir() else Path(cached_file(source, "config.json") or "").parent


def trial_dtypes(device: torch.device) -> dict[str, float]:
    """Seconds that one small matrix product takes in each of `DTYPES`: the least of many in turns.

    In turns, since a machine that is busy for a while would decide for the other dtype.
    """
    matrices = {
        name: [torch.ones(size, 1024, dtype=dtype, device=device) for size in (64, 1024)]
        for name, dtype in DTYPES.items()
    }
    found = dict.fromkeys(DTYPES, math.inf)
    # The first product also chooses and warms up the code for it.
    stop = time.perf_counter() + TRIAL_SECONDS
    rounds = 0
    while rounds < TRIAL_ROUNDS or time.perf_counter() < stop:
        for name, (left, right) in matrices.items():
            found[name] = min(found[name], _seconds_of_product(left, right))
        rounds += 1
    return found


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    # Reading a number waits for the device.
    float((left @ right)[0, 0])
    return time.perf_counter() - started


def check_dtype(word: str) -> None:
    """Refuse a word that names no dtype to compute in.

    Raises:
        ModelError: it is neither "auto" nor one of `DTYPES`.
    """
    if word != "auto" and word not in DTYPES:
        raise ModelError(f"dtype must be auto, {' or '.join(DTYPES)} but is '{word}'")


def computing_dtype(
    word: str, device: torch.device, source: str, configuration: Any
) -> torch.dtype:
    """The dtype of every forward pass; "auto" depends on the kind of device, never on its speed.

    On a CPU that is float32, elsewhere bfloat16 where the checkpoint stores most numbers in it,
    and float32 where it does not.

    Args:
        source: folder or hub id.
        configuration: of the model, whose word is taken where no files are at hand.
    """
    if word != "auto":
        return DTYPES[word]
    if device.type == "cpu":
        return torch.float32
    folder = Path(source)
    has_files = folder.is_dir() and any(folder.glob("*.safetensors"))
    stored = Shards(folder).dtype if has_files else getattr(configuration, "dtype", None)
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


def device_of(word: str) -> torch.device:
    """The device that a word names; "auto" is the GPU where there is one.

    Raises:
        ModelError: it cannot be used here.
    """
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{word}' cannot be used here ({reason(error)})") from error
    return device


def _source(name: str) -> str:
    """A folder or hub id that transformers can load from."""
    path = Path(name).expanduser()
    if name == "demo":
        return str(unpacked_gguf(demo_file()))
    if path.suffix == ".gguf":
        return str(unpacked_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder '{name}' holds no model: config.json is missing")
        return str(path)
    looks_like_path = is_spelled_as_path(name) or path.exists()
    if looks_like_path or not name:
        raise ModelError(
            f"there is no model folder '{name}'; give a hub id, a folder, a .gguf file or 'demo'"
        )
    return name


def local_folder(name: str) -> Path:
    """The folder with a model's files: the named one, or what a .gguf file or "demo" unpacks to.

    Raises:
        ModelError: there is none; the files of a hub id have to be downloaded first.
    """
    with quiet(), explained(name):
        folder = Path(_source(name))
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder '{name}'; if it is a hub id, download it first, by "
            f"`hf download {name} --local-dir FOLDER`, and give that folder"
        )
    return folder


def checked_configuration(source: str, name: str) -> Any:
    """The configuration, once it is sure that the model can be loaded safely and pruned.

    Args:
        source: folder or hub id.
        name: of the model, as the user wrote it.

    Raises:
        ModelError: it asks for foreign code, is quantized, or is no causal language model.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(source)
    if not isinstance(raw, dict):
        raise ModelError(f"config.json of model '{name}' holds no settings; get the file again")
    _refuse_foreign_code(raw, name)
    if any(raw.get(key) for key in _QUANTIZATION_KEYS):
        raise ModelError(
            f"model '{name}' is quantized; prune the full-precision checkpoint, then quantize"
        )
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"model '{name}' has the type '{kind}', which transformers does not know")
    configuration = CONFIG_MAPPING[kind].from_dict(raw)
    written = raw.get("architectures") or []
    written = [written] if isinstance(written, str) else [str(word) for word in written]
    causal = not written or any(word.endswith(("ForCausalLM", "LMHeadModel")) for word in written)
    known = type(configuration) in MODEL_FOR_CAUSAL_LM_MAPPING
    if raw.get("is_encoder_decoder") or not causal or not known:
        raise ModelError(
            f"model '{name}' is a {', '.join(written) or kind}; only decoder-only language models "
            "(...ForCausalLM) can be pruned"
        )
    return configuration


def _refuse_foreign_code(raw: dict[str, Any], name: str) -> None:
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


def _load_network(source: str, name: str, configuration: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        config=configuration,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the files of model '{name}' lack {len(missing)} weights, '{missing[0]}' among them; "
            "they would be random numbers, so get the files again"
        )
    return model


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id; no code of the repository is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Within it, whatever the hub, the files or transformers raise becomes one sentence.

    Raises:
        ModelError: instead of every error that is not ours.
    """
    try:
        yield
    except PruneZeroError:
        raise
    except Exception as error:
        raise ModelError(f"model '{name}' cannot be loaded ({reason(error)})") from error
