"""Does a saved folder compute what the model did that was saved? Its files are read anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, reason
from prunezero.models.anatomy.block_probe import relative_change
from prunezero.models.editing.permuting import ROUNDING, ROUNDING_OF_LOGITS
from prunezero.models.loading.language_model import LanguageModel, quiet


def refuse_other_reading(
    folder: Path, language_model: LanguageModel, ids: Tensor, expected: Tensor
) -> float:
    """How far logits of a saved model, read anew, are from those expected: the largest difference.

    Classes of its own are those of this package; no file of the folder is run.

    Args:
        language_model: whose dtype and device are used; it was saved.
        ids: token ids [count, length].
        expected: logits [count, length, vocabulary] of the model that was saved.

    Raises:
        ModelError: the folder cannot be read, or computes something else.
    """
    try:
        with quiet():
            network = _network(folder, language_model)
        with torch.no_grad():
            found = network(ids.to(language_model.device)).logits.double()
    # Whatever a class says to files that are not its own.
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder} cannot be read again ({reason(error, folder)}); please report this"
        ) from error
    before = expected.double()
    change = relative_change(found, before)
    if not change <= ROUNDING_OF_LOGITS.get(language_model.dtype, ROUNDING):
        raise ModelError(
            f"{folder} computes something else than the model that was saved (logits differ by "
            f"{change:.2g} of their norm); please report this"
        )
    return float((found - before).abs().max())


def _network(folder: Path, language_model: LanguageModel) -> Any:
    from transformers import AutoModelForCausalLM

    settings = {"dtype": language_model.dtype, "use_safetensors": True, "trust_remote_code": False}
    network = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return network.to(language_model.device).eval()
