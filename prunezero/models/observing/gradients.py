"""How does the loss of a sample sequence change with every weight and every layer's output?

One backward pass per sequence through the whole dense model. A weight's gradient is added to the
sums the moment it is complete and freed at once, so at most a few of them exist together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunezero.errors import PruneZeroWarning, StatisticsError
from prunezero.models.anatomy.linears import Linear, find_blocks
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.expert_calls import counting_tokens, fill_up, own_weights
from prunezero.models.observing.hooks import empty_statistics, removing
from prunezero.scoring.statistics import SUMS, Statistics

# Above it the sums say little about the weights that got zero.
HIGHEST_ZERO_SHARE = 0.5


# Given layers and their sums by name, as soon as they are collected.
Keep = Callable[[Sequence[Linear], dict[str, Statistics]], None]


def gradient_statistics(
    language_model: LanguageModel,
    batches: Tensor,
    groups: Sequence[Sequence[Linear]],
    sums: frozenset[str],
    keep: Keep,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Collect gradient sums, and give the names of layers that `fill_up` filled.

    The loss of a sequence is the mean cross-entropy, in nats, of its tokens after the first. Each
    group of layers has a pass over the text of its own; all sums are those of one pass over all
    layers, to the last bit.

    Args:
        language_model: dense; its weights and their `requires_grad` are the same afterwards.
        batches: token ids [count, length], already checked.
        groups: of layers, gradients are taken for these alone; experts of a block in one group.
        sums: names of gradient sums, see `SUMS`.
        keep: given each group with its sums by layer name.
        progress: told the sequences done, and their total over all passes.

    Raises:
        StatisticsError: the loss or a gradient is not finite, or all gradients of a layer are zero.
    """
    zeros = numbers = 0
    scarce: list[str] = []
    total = len(groups) * len(batches)
    for place, layers in enumerate(groups):
        told = partial(_told, progress, place * len(batches), total)
        collected = _one_pass(language_model, batches, layers, sums, told)
        scarce += fill_up(collected, layers)
        found_zeros, found_numbers = _counted_zeros(collected)
        zeros, numbers = zeros + found_zeros, numbers + found_numbers
        keep(layers, collected)
        # Let go before the next sums are made.
        del collected
    _warn_of_zeros(zeros, numbers)
    return scarce


def _told(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _one_pass(
    language_model: LanguageModel,
    batches: Tensor,
    layers: Sequence[Linear],
    sums: frozenset[str],
    told: Callable[[int], None],
) -> dict[str, Statistics]:
    """Sums of the layers by name, from one pass over the text."""
    collected = {layer.name: empty_statistics(layer, sums) for layer in layers}
    tokens = dict.fromkeys(collected, 0)
    counting = removing(counting_tokens(layers, tokens))
    with torch.enable_grad(), _collecting(language_model, layers, collected), counting:
        for done, ids in enumerate(batches, start=1):
            loss = sequence_loss(language_model.model, ids[None].to(language_model.device))
            if not bool(torch.isfinite(loss)):
                raise StatisticsError(
                    f"the loss of '{language_model.name}' on calibration sequence {done - 1} is "
                    f"{float(loss.detach())}; try --dtype float32, or check that the model is sound"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            told(done)
    for name, statistics in collected.items():
        # Gradients arrive without a token count, outputs' gradients with one.
        statistics.tokens, statistics.sequences = tokens[name], len(batches)
    return collected


def sequence_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the tokens after the first; ids [1, length]."""
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return cross_entropy(logits, ids[0, 1:])


@contextmanager
def _collecting(
    language_model: LanguageModel, layers: Sequence[Linear], collected: dict[str, Statistics]
) -> Iterator[None]:
    """Within it, a backward pass fills the statistics and leaves no gradient behind."""
    model = language_model.model
    handles: list[Any] = []
    with asking_anew(model), removing(handles), own_weights(layers) as weights:
        # What is before the layers needs no gradient, yet the graph has to start in front of them.
        first = min(layer.block for layer in layers)
        handles.append(find_blocks(model)[first].register_forward_pre_hook(_require_gradient))
        for layer in layers:
            handles += _layer_hooks(layer, weights[layer.name], collected[layer.name])
        yield


@contextmanager
def asking_anew(model: nn.Module) -> Iterator[None]:
    """Within it, no parameter asks for a gradient until told to; afterwards those ask that did.

    No gradient is left behind.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def _require_gradient(block: nn.Module, args: tuple[Any, ...]) -> None:
    if not args[0].requires_grad:
        args[0].requires_grad_(True)


def _layer_hooks(layer: Linear, weight: Tensor, statistics: Statistics) -> list[Any]:
    sources = {SUMS[name].source for name in statistics.sums}
    handles: list[Any] = []
    if "gradient" in sources:
        weight.requires_grad_(True)
        is_transposed = not isinstance(layer.module, nn.Linear)

        def add_and_free(parameter: Tensor) -> None:
            assert parameter.grad is not None  # the hook runs after it was set
            gradient = parameter.grad.T if is_transposed else parameter.grad
            statistics.add_gradient(gradient, layer=layer.name)
            parameter.grad = None

        handles.append(
            weight.register_post_accumulate_grad_hook(add_and_free)  # type: ignore[no-untyped-call]
        )
    if "output gradients" in sources:
        handles.append(layer.module.register_forward_hook(_output_hook(layer, statistics)))
    if "input gradients" in sources:
        handles.append(layer.module.register_forward_pre_hook(_input_hook(layer, statistics)))
    return handles


def _input_hook(layer: Linear, statistics: Statistics) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # A view of its own: others may read the same tensor, and their gradients are not meant.
        read = args[0].view_as(args[0])

        def add(gradient: Tensor) -> None:
            statistics.add_input_gradients(gradient, inputs=args[0].detach(), layer=layer.name)

        read.register_hook(add)
        return (read, *args[1:])

    return hook


def _output_hook(
    layer: Linear, statistics: Statistics
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    needs_inputs = any(SUMS[name].with_inputs for name in statistics.sums)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = args[0].detach() if needs_inputs else None

        def add(gradient: Tensor) -> None:
            statistics.add_output_gradients(gradient, inputs=inputs, layer=layer.name)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook


def _counted_zeros(collected: dict[str, Statistics]) -> tuple[int, int]:
    """How many gradient sums are zero, and how many there are.

    Raises:
        StatisticsError: all of a layer are.
    """
    zeros, numbers = 0, 0
    for name, statistics in collected.items():
        for total in statistics.sums.values():
            layer_zeros = int((total == 0).sum())
            if layer_zeros == total.numel():
                raise StatisticsError(
                    f"all gradients of layer '{name}' are zero, so they rank nothing; "
                    "try --dtype float32, or leave the layer out with ignore"
                )
            zeros, numbers = zeros + layer_zeros, numbers + total.numel()
    return zeros, numbers


def _warn_of_zeros(zeros: int, numbers: int) -> None:
    """Warn when most of all gradients are zero."""
    if numbers and zeros / numbers > HIGHEST_ZERO_SHARE:
        warnings.warn(
            f"{zeros / numbers:.0%} of the gradient sums are exactly zero; "
            "try --dtype float32, or more calibration sequences",
            PruneZeroWarning,
            stacklevel=4,
        )
