"""How does each expert of a stack see its own tokens, and what of one that saw too few of them?

Within `calling_experts` experts compute by their `ExpertLinear`s, so the hooks of every linear map
serve them as well. It stands for the module's `forward` alone: the implementation that the model
chose, a word of its configuration, is never touched.

Text decides who sees how much. An expert that saw about as many tokens as its matrix has columns,
or fewer, knows its inputs badly: their Gram matrix is singular or nearly so, and an update by it
fits noise. So what is missing up to `TOKENS_PER_COLUMN` is filled up with average tokens of all
experts of its layer: sums are added up in proportion. Nothing jumps where an expert has just
enough, an expert without tokens has the average alone, and sums of all kinds remain those of one
text. (Weights alone would need another formula than the recipe's; the average alone would forget
what is known.)
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.errors import PruneZeroWarning
from prunezero.models.anatomy.expert_linears import DOWN, UP, ExpertLinear, expert_linears
from prunezero.models.anatomy.linears import Linear
from prunezero.scoring.statistics import SUMS, Statistics

# With one, errors on other text are as large as ever; from two on they fall slowly.
TOKENS_PER_COLUMN = 2


@contextmanager
def calling_experts(layers: Iterable[Linear]) -> Iterator[None]:
    """Within it, the experts of the layers call their linear maps, as `nn.Linear`s are called."""
    inside = [layer.module for layer in layers if isinstance(layer.module, ExpertLinear)]
    with calling_each(module.place[0] for module in inside):
        yield


@contextmanager
def calling_each(experts: Iterable[nn.Module]) -> Iterator[None]:
    """The same for modules with the stacks of experts, each of them once."""
    modules = list(dict.fromkeys(experts))
    own = {module: vars(module).get("forward") for module in modules}
    for module in modules:
        module.forward = partial(_by_each, module)
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _by_each(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What experts give to tokens [tokens, hidden] together, one expert after another.

    Args:
        indices: int64 [tokens, k], the experts of each token.
        weights: [tokens, k], how much each of them counts.
    """
    linears = expert_linears(experts)
    result = torch.zeros_like(hidden)
    for index in range(len(linears) // 2):
        # In the order of the text, however tokens are grouped.
        tokens, places = torch.where(indices == index)
        if len(tokens):
            inner = experts._apply_gate(linears[f"{index}.{UP}"](hidden[tokens]))
            given = linears[f"{index}.{DOWN}"](inner) * weights[tokens, places, None]
            result.index_add_(0, tokens, given.to(result.dtype))
    return result


@contextmanager
def own_weights(layers: Sequence[Linear]) -> Iterator[dict[str, Any]]:
    """Within it, the weight of every layer is a leaf, which backward passes give its gradient.

    Yields:
        The leaves [out, in] by layer name; those of transformers' Conv1D are [in, out].
    """
    with ExitStack() as leaving, calling_experts(layers):
        yield {
            layer.name: leaving.enter_context(layer.module.apart())
            if isinstance(layer.module, ExpertLinear)
            else layer.module.weight
            for layer in layers
        }


def counting_tokens(layers: Iterable[Linear], counts: dict[str, int]) -> list[Any]:
    """Handles of hooks that add to `counts`, by the name of a layer, the tokens that come to it."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts[name] += args[0].shape[:-1].numel()

    return [layer.module.register_forward_pre_hook(partial(hook, layer.name)) for layer in layers]


def fill_up(collected: dict[str, Statistics], layers: Sequence[Linear]) -> list[str]:
    """Fill up, in place, the statistics of experts with fewer than 2 tokens for each column.

    Args:
        collected: by layer name; all experts of a layer that are to lend tokens are among them.
        layers: whose statistics they are.

    Returns:
        The names of what was filled up. Where no expert of a layer saw a token, nothing is.
    """
    peers: dict[tuple[nn.Module, str], list[Linear]] = defaultdict(list)
    for layer in layers:
        if isinstance(layer.module, ExpertLinear):
            experts, stack, _ = layer.module.place
            peers[experts, stack].append(layer)
    return [name for together in peers.values() for name in _fill_up(collected, together)]


def _fill_up(collected: dict[str, Statistics], together: list[Linear]) -> list[str]:
    """The same for linear maps of one stack."""
    seen = [collected[layer.name] for layer in together]
    total = sum(one.tokens for one in seen)
    enough = TOKENS_PER_COLUMN * together[0].weight.shape[1]
    scarce = [layer.name for layer in together if collected[layer.name].tokens < enough]
    if not scarce or not total:
        return []
    sums = [name for name in seen[0].sums if not SUMS[name].by_sequence]
    pooled = {name: sum((one.sums[name] for one in seen[1:]), seen[0].sums[name]) for name in sums}
    for name in scarce:
        known = collected[name]
        share = (enough - known.tokens) / total
        filled = {key: known.sums[key] + value * share for key, value in pooled.items()}
        sums_now = {**known.sums, **filled}
        collected[name] = Statistics(enough, known.sequences, sums_now, is_filled=True)
    return scarce


def warn_of_scarce(names: Sequence[str]) -> None:
    """Say, in one warning, which experts' sums were filled up; nothing where none were."""
    if names:
        kind = "matrix" if len(names) == 1 else "matrices"
        shown = ", ".join(f"'{name}'" for name in names[:3])
        warnings.warn(
            f"{len(names)} {kind} of experts saw fewer than {TOKENS_PER_COLUMN} calibration tokens "
            f"for each column ({shown}{', ...' if len(names) > 3 else ''}); what is missing was "
            "filled up with average tokens of their layer's experts, so use more text to prune "
            "them by their own",
            PruneZeroWarning,
            stacklevel=3,
        )
