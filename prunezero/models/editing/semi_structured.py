"""How does a 2:4 model run faster than a dense one?

Sparse tensor cores of NVIDIA GPUs multiply by a matrix of which 2 of every 4 weights along a row
are zero, in up to half the time; torch keeps such a matrix as its kept weights and their places
(`torch.sparse.to_sparse_semi_structured`). Files stay dense, and hold the zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunezero.errors import ModelError, reason
from prunezero.models.anatomy.linears import Linear, refuse_stacks
from prunezero.models.loading.language_model import LanguageModel

# The first GPUs with sparse tensor cores, NVIDIA's Ampere.
LOWEST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
# torch packs 16-bit matrices in tiles of so many rows and columns.
TILE = 16


def to_semi_structured(language_model: LanguageModel, layers: Sequence[Linear]) -> int:
    """Exchange the weights of 2:4 layers for torch's semi-structured tensors, in memory only.

    Everything is checked before anything is changed. The weights stay the same numbers; sums may
    be rounded differently. From then on the model can be run and measured, but neither pruned nor
    saved: save it before, files are dense.

    Args:
        language_model: pruned 2:4, in float16 or bfloat16, on a GPU of capability 8.0 or above.
        layers: to convert, all of them.

    Returns how many layers were converted.

    Raises:
        ModelError: the device, the dtype, or a layer's kind, shape or zeros do not allow it.
    """
    check_gpu(language_model.device)
    for layer in layers:
        _check_layer(layer)
    converted = [_converted(layer) for layer in layers]
    for layer, weight in zip(layers, converted, strict=True):
        layer.module.weight = nn.Parameter(weight, requires_grad=False)
    return len(converted)


def check_gpu(device: torch.device) -> None:
    """Refuse a device that cannot multiply by 2:4 matrices.

    Raises:
        ModelError: says what the device lacks.
    """
    needed = ".".join(map(str, LOWEST_CAPABILITY))
    if device.type != "cuda":
        raise ModelError(
            f"2:4 matrices run on a CUDA GPU of compute capability {needed} or above, but the "
            f"device is '{device}'; elsewhere keep the dense weights with their zeros"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        raise ModelError(
            f"2:4 matrices run on a CUDA GPU of compute capability {needed} or above, but "
            f"'{device}' has {'.'.join(map(str, capability))}; keep the dense weights with their "
            "zeros"
        )


def first_dense_group(weight: Tensor) -> tuple[int, int] | None:
    """Row and first column of the first 4 weights of which more than 2 are not zero; or None.

    Args:
        weight: [out, in], of a multiple of 4 columns.
    """
    kept = (weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1)
    rows, groups = torch.nonzero(kept > 2, as_tuple=True)
    return None if not len(rows) else (int(rows[0]), 4 * int(groups[0]))


def _check_layer(layer: Linear) -> None:
    name, weight = layer.name, layer.weight
    refuse_stacks([layer], "2:4 tensors do")
    if not isinstance(layer.module, nn.Linear):
        raise ModelError(
            f"layer '{name}' is a {type(layer.module).__name__}, whose weights lie transposed; "
            "only nn.Linear layers become 2:4 tensors, leave it out"
        )
    if weight.dtype not in DTYPES:
        raise ModelError(
            f"layer '{name}' is in {weight.dtype} but 2:4 tensors are float16 or bfloat16; load "
            "the model with --dtype bfloat16"
        )
    if any(size % TILE for size in weight.shape):
        raise ModelError(
            f"layer '{name}' has shape {list(weight.shape)} but torch packs 2:4 matrices in tiles "
            f"of {TILE} rows and columns; leave it out"
        )
    found = first_dense_group(weight)
    if found is not None:
        row, column = found
        raise ModelError(
            f"layer '{name}' is not 2:4: more than 2 weights of row {row}, columns {column} to "
            f"{column + 3}, are not zero; prune it with pattern 2:4, or leave it out"
        )


def _converted(layer: Linear) -> Tensor:
    with warnings.catch_warnings():
        # Once per process torch calls these tensors a prototype.
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        try:
            return torch.sparse.to_sparse_semi_structured(layer.weight.contiguous())
        except RuntimeError as error:
            # A build of torch without the library, or a GPU that the library leaves out.
            raise ModelError(
                f"layer '{layer.name}': torch {torch.__version__} cannot make a 2:4 tensor of it "
                f"({reason(error)}); keep the dense weights with their zeros"
            ) from error
