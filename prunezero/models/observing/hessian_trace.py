"""How strongly does the loss curve along the weights of each layer: the trace of its Hessian?

Hutchinson's estimator: for random signs z, the mean of z . Hz is the trace of H. Hz is the gradient
of (gradient . z), so one backward pass through a backward pass serves all layers at once. Their
signs are drawn independently: the terms that couple two layers have mean zero. They add noise, and
a layer whose trace is small beside its coupling to the others takes many draws to be known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunezero.errors import StatisticsError, TextError
from prunezero.models.anatomy.linears import Linear
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.gradients import sequence_loss
from prunezero.models.text.windows import check_windows


def hessian_traces(
    language_model: LanguageModel,
    windows: Tensor,
    layers: Sequence[Linear],
    *,
    sequences: int,
    samples: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Estimated trace of the loss's Hessian with respect to every layer's weight, by layer name.

    The loss of a sequence is the mean cross-entropy, in nats, of its tokens after the first; a
    trace is the mean over sequences, and may be negative. All is computed in float32, on a copy of
    the weights unless they are float32 already. A seed gives the same signs on every device.

    Args:
        language_model: left as it is, `requires_grad` included.
        windows: token ids [count, length], of which the first `sequences` are read.
        layers: whose traces to estimate.
        sequences: sequences to read.
        samples: draws of signs for each sequence.
        seed: of the signs.
        progress: told the draws done and their total.

    Raises:
        TextError: the model cannot be run on these ids, or there are fewer than `sequences`.
        StatisticsError: the loss or a trace is not finite.

    Source: Hutchinson 1989, doi:10.1080/03610918908812806.
    """
    check_windows(windows, language_model)
    if len(windows) < sequences:
        raise TextError(
            f"traces of the Hessian are asked for over {sequences} sequences but there are only "
            f"{len(windows)}; give more calibration text, or ask for fewer sequences"
        )
    totals = dict.fromkeys((layer.name for layer in layers), 0.0)
    draws = sequences * samples
    found = _draws(language_model, windows[:sequences], layers, samples, seed)
    for done, values in enumerate(found, start=1):
        for layer, value in zip(layers, values, strict=True):
            totals[layer.name] += value / draws
        if progress is not None:
            progress(done, draws)
    for name, total in totals.items():
        _refuse_non_finite(total, f"the trace of the Hessian for layer '{name}'")
    return totals


def curvatures(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[float]:
    """For every weight, direction . (Hessian times all directions together).

    Args:
        gradients: of one loss with respect to each weight, made with `create_graph`.
        weights: those weights.
        directions: one for each weight, of its shape.
    """
    pairs = zip(gradients, directions, strict=True)
    slope = torch.stack([(gradient * direction).sum() for gradient, direction in pairs]).sum()
    products = torch.autograd.grad(slope, weights, retain_graph=True)
    return [
        float((product * direction).sum(dtype=torch.float64))
        for product, direction in zip(products, directions, strict=True)
    ]


def _draws(
    language_model: LanguageModel,
    windows: Tensor,
    layers: Sequence[Linear],
    samples: int,
    seed: int,
) -> Iterator[list[float]]:
    """Curvatures of all layers along random signs, for every sequence and sample."""
    # Detached: the model's own parameters are neither written nor asked for gradients.
    named = language_model.model.named_parameters()
    parameters = {name: parameter.detach().float() for name, parameter in named}
    weights = [parameters[f"{layer.name}.weight"].requires_grad_() for layer in layers]

    def model(ids: Tensor, **choices: Any) -> Any:
        return functional_call(language_model.model, parameters, (ids,), choices)

    for place, ids in enumerate(windows):
        # Fused attention cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = sequence_loss(model, ids[None].to(language_model.device))
            _refuse_non_finite(float(loss.detach()), f"the loss on calibration sequence {place}")
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
        for sample in range(samples):
            signs = [
                _signs(weight, f"{seed}/{layer.name}/{place}/{sample}")
                for layer, weight in zip(layers, weights, strict=True)
            ]
            with torch.enable_grad():
                values = curvatures(gradients, weights, signs)
            yield values


def _signs(like: Tensor, key: str) -> Tensor:
    """Numbers -1 and 1 of a tensor's shape, dtype and device; the same key gives the same."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return bits.to(like.device, like.dtype) * 2 - 1


def _refuse_non_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise StatisticsError(f"{what} is {value}; check that the model itself is sound")
