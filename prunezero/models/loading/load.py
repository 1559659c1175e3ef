"""How does a model come in: as a hub id, a folder, a .gguf file or the word "demo"?

Whatever could run foreign code or cannot be pruned is refused before the weights are touched
(`checkpoints.py`). Only safetensors are read.
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
from prunezero.files.cache import cache_dir
from prunezero.models.loading.checkpoints import Checkpoint, checked_checkpoint
from prunezero.models.loading.checks import check_finite, check_report
from prunezero.models.loading.gguf import demo_file, unpacked_gguf
from prunezero.models.loading.language_model import LanguageModel, quiet, wrap_model
from prunezero.models.loading.names import is_spelled_as_path
from prunezero.models.loading.shards import Shards
from prunezero.models.saving.save import check_writable, save_model

__all__ = [
    "DTYPES",
    "Checkpoint",
    "LanguageModel",
    "cache_dir",
    "check_dtype",
    "check_writable",
    "checked_checkpoint",
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
        checkpoint = checked_checkpoint(source, name)
        chosen = computing_dtype(dtype, place, checkpoint.source.shards)
        model = _load_network(source, name, checkpoint.configuration, chosen)
        tokenizer = load_tokenizer(source)
    return wrap_model(model.to(place), tokenizer, name=name, source=checkpoint.source)


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


def computing_dtype(word: str, device: torch.device, shards: Shards) -> torch.dtype:
    """The dtype of every forward pass; "auto" depends on the kind of device, never on its speed.

    On a CPU that is float32, elsewhere bfloat16 where the checkpoint stores most numbers in it,
    and float32 where it does not.

    Args:
        word: "auto", or one of `DTYPES`.
        device: where forward passes run.
        shards: the files of the model.
    """
    if word != "auto":
        return DTYPES[word]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if shards.dtype == torch.bfloat16 else torch.float32


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
    check_report(report, model, name)
    check_finite(model.state_dict().items(), name)
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
