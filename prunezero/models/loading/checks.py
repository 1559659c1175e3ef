"""Is a checkpoint what it says it is? One list of checks, which every way in passes.

The headers of the files are compared with the network that the configuration describes: on the meta
device transformers itself says which weights would be missing, unused or of another shape. Nothing
is allocated until all of that is well, and what is loaded then must be finite.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, PruneZeroError, PruneZeroWarning, reason
from prunezero.models.anatomy.linears import block_prefix
from prunezero.models.loading.layouts import Piece, names_in_files, pieces_in_files, targets_of
from prunezero.models.loading.shards import STORED_DTYPES, StoredTensor
from prunezero.models.loading.sizes import building_at_most

# What is computed and not stored may take this much, and twice the room of weights in float32.
_MOST_BUFFER_BYTES = 2**28
# Tables that the model computes by itself, and that older versions of it stored.
_HARMLESS = re.compile(
    r"(rotary_emb\.inv_freq|\brope_freqs\.weight|\.masked_bias|attn(ention)?\.bias|position_ids)$"
)


def check_layout(
    configuration: Any, stored: Mapping[str, StoredTensor], name: str
) -> tuple[dict[str, str], dict[str, Piece]]:
    """Names in the files by name in the model, and pieces, once headers and configuration agree.

    Nothing is read or allocated: transformers loads tensors without numbers, and reports. Tensors
    that change their layout have no such name; those that make stacks are pieces, see
    `pieces_in_files`.

    Args:
        configuration: of a causal language model.
        stored: tensors of the files by name.
        name: of the model, for messages.

    Raises:
        ModelError: weights are missing, are stored in another shape or as no floats, or blocks are
            stored that the model does not have; or no network can be built of the configuration.
    """
    model, report = _loaded_without_numbers(configuration, stored, name)
    targets = targets_of(model, stored)
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, (target, _) in sorted(targets.items()):
        if target in parameters and stored[key].dtype not in STORED_DTYPES:
            raise ModelError(
                f"model '{name}': weight '{key}' is stored as {stored[key].dtype}, which is a "
                "quantized or packed format; prune the full-precision checkpoint, then quantize"
            )
    check_report(report, model, name)
    computed = sum(buffer.nbytes for buffer in model.buffers())
    if computed > _MOST_BUFFER_BYTES + 8 * sum(prod(one.shape) for one in stored.values()):
        raise ModelError(
            f"model '{name}': config.json asks for {computed / 2**30:.0f} GiB of tables that no "
            "file holds; get the file again"
        )
    return names_in_files(model, stored), pieces_in_files(model, stored)


def _loaded_without_numbers(
    configuration: Any, stored: Mapping[str, StoredTensor], name: str
) -> tuple[Any, Mapping[str, Any]]:
    """The network on the meta device, and what transformers reports of loading it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    numbers = sum(prod(tensor.shape) for tensor in stored.values())
    empty = {key: torch.empty(one.shape, device="meta") for key, one in stored.items()}
    try:
        with building_at_most(len(stored), numbers, name):
            model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(configuration)].from_pretrained(
                None,
                config=configuration,
                state_dict=empty,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except PruneZeroError:
        raise
    # Whatever a size of zero, or one that no tensor can have, makes a network do.
    except Exception as error:
        raise ModelError(
            f"model '{name}': no network can be built as config.json says ({reason(error)})"
        ) from error
    return model, report


def check_report(report: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Refuse what transformers reports of loading a model; warn of tensors outside its blocks.

    Args:
        report: `missing_keys`, `mismatched_keys` and `unexpected_keys`.
        model: what was loaded.
        name: of it, for messages.

    Raises:
        ModelError: weights are missing or of another shape, or tensors of blocks are not used.
    """
    for key, have, want in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"model '{name}': weight '{key}' has shape {list(have)} in its file but {list(want)} "
            "by its configuration; get the files again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the files of model '{name}' lack {len(missing)} weights, '{missing[0]}' among them; "
            "they would be random numbers, so get the files again"
        )
    check_unused(report["unexpected_keys"], f"{block_prefix(model)}.", name)


def check_unused(keys: Iterable[str], prefix: str, name: str) -> None:
    """Refuse tensors of blocks that a model does not use; warn of others that it does not.

    Args:
        keys: names of all tensors that it does not use.
        prefix: how names of tensors in blocks begin.
        name: of the model, for messages.

    Raises:
        ModelError: there are such tensors of blocks.
    """
    unused = sorted(key for key in keys if not _HARMLESS.search(key))
    inside = [key for key in unused if key.startswith(prefix)]
    if inside:
        raise ModelError(
            f"the files of model '{name}' hold {len(inside)} tensors of blocks that its "
            f"configuration does not describe, '{inside[0]}' among them; get the files again"
        )
    if unused:
        warnings.warn(
            f"the files of model '{name}' hold {len(unused)} tensors that it does not use, "
            f"'{unused[0]}' among them; they are left alone",
            PruneZeroWarning,
            stacklevel=2,
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        tensors: names and numbers; those that are no floats are passed over.
        name: of the model, for messages.

    Raises:
        ModelError: some are; the message names the first.
    """
    for key, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        # The least and the greatest need no memory, and both are NaN where one number is.
        if not all(bool(torch.isfinite(one)) for one in torch.aminmax(tensor.detach())):
            raise ModelError(
                f"model '{name}': weight '{key}' holds NaN or infinite numbers; get the files again"
            )
