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

from prunezero.errors import ModelError, PruneZeroError
from prunezero.models.checkpoints import Checkpoint, checked_checkpoint
from prunezero.models.checks import check_finite, check_report
from prunezero.models.gguf import demo_file, unpacked_gguf
from prunezero.models.language_model import LanguageModel, cache_dir, quiet, wrap_model
from prunezero.models.names import is_spelled_as_path
from prunezero.models.saving import check_writable, save_model

__all__ = [
    "DTYPES",
    "Checkpoint",
    "LanguageModel",
    "cache_dir",
    "check_writable",
    "checked_checkpoint",
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
# bfloat16 has to be this much faster, so that equal processors choose equally.
CLEARLY_FASTER = 0.8
# Together, and products of each dtype at least.
TRIAL_SECONDS, TRIAL_ROUNDS = 0.1, 3


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """A causal language model in evaluation mode, without gradients, and its tokenizer.

    Args:
        name: hub id, folder, .gguf file, or "demo".
        dtype: "float32", "bfloat16", or "auto": on a CPU the faster of the two, elsewhere that of
            the checkpoint.
        device: a torch device, or "auto": the GPU where there is one.

    Raises:
        ModelError: the model cannot be found, read or pruned; nothing was loaded then.
    """
    place = device_of(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {' or '.join(DTYPES)} but is '{dtype}'")
    with quiet(), explained(name):
        source = _source(name)
        configuration = checked_checkpoint(source, name).configuration
        chosen = DTYPES[dtype] if dtype != "auto" else _best_dtype(place, configuration)
        model = _load_network(source, name, configuration, chosen)
        tokenizer = load_tokenizer(source)
    return wrap_model(model.to(place), tokenizer, name=name)


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


def _best_dtype(device: torch.device, configuration: Any) -> torch.dtype:
    if device.type == "cpu":
        seconds = trial_dtypes(device)
        faster = seconds["bfloat16"] < CLEARLY_FASTER * seconds["float32"]
        return torch.bfloat16 if faster else torch.float32
    stored = getattr(configuration, "dtype", None)
    return torch.bfloat16 if stored in (torch.float16, torch.bfloat16) else torch.float32


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
        reason = str(error).split("\n")[0]
        raise ModelError(f"device '{word}' cannot be used here ({reason})") from error
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
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise ModelError(f"model '{name}' cannot be loaded ({reason})") from error
