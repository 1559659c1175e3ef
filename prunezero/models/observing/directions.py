"""Which directions of the residual stream hold what it says, and which of them stay?

In front of every attention and MLP the directions are the eigenvectors of the second moment of what
the norm there makes of the stream, its factors left out: sum over tokens of x^T x, in float64. They
are found in the order of the stream, since what was taken from it before changes what follows.

Source: Ashkboos et al. 2024, SliceGPT (ICLR), arXiv:2401.15024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.norms import rms_norm
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.walk import FORWARD_SUMS, BlockWalk
from prunezero.scoring.statistics import Statistics, contribution


def chosen_directions(
    language_model: LanguageModel,
    groups: Sequence[Group],
    windows: Tensor,
    sums: Iterable[str],
    choose: Callable[[Group, Statistics], Tensor],
    *,
    damping: float,
    is_sequential: bool,
    progress: Callable[[str, int, int], None] | None = None,
) -> Selection:
    """The directions that stay, place after place along the stream.

    Args:
        language_model: dense; its weights are the same afterwards.
        groups: of directions, two for each block, in the order of the stream.
        windows: calibration token ids [count, length].
        sums: names of forward sums, of what the norm hands on along each direction.
        choose: which directions of a group stay, bool [units], by these sums; the first direction
            is that of the largest eigenvalue.
        damping: share of the mean diagonal of the second moment that is added to it.
        is_sequential: whether later places see the stream without what went before them.
        progress: told (what, done, total) as the work goes on.

    Raises:
        TextError: the model cannot be run on these ids.
        StatisticsError: a number is not finite.
    """
    walk = BlockWalk(language_model, windows)
    names, found = frozenset(sums) & FORWARD_SUMS, []
    for place, group in enumerate(groups):
        layer: Any = walk.blocks[group.block]
        norm = rms_norm(language_model.model.get_submodule(group.name))
        assert norm is not None  # the group was found by it; for the type checker
        basis = principal_directions(second_moment(walk.states, norm.eps), damping)
        statistics = _along(basis, walk.states, norm.eps, names, group)
        group = replace(group, basis=basis.cpu())
        kept = choose(group, statistics)
        found.append((group, kept))
        span = basis[:, kept.to(basis.device)] if is_sequential else None
        half = _behind_attention if place % 2 == 0 else _behind_mlp
        walk.carry(group.block, _step(half, layer, span), moves=place % 2 == 1)
        if progress is not None:
            progress("places along the stream seen", place + 1, len(groups))
    return Selection(*map(tuple, zip(*found, strict=True)))


def second_moment(states: Sequence[Tensor], eps: float) -> Tensor:
    """The sum over tokens of x^T x [width, width], float64, x a row behind a norm without factors.

    Args:
        states: of the stream, one [1, length, width] for each sequence.
        eps: of the norm.
    """
    width = states[0].shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64, device=states[0].device)
    for state in states:
        x = _normed(state, eps)
        total += x.T @ x
    return total


def principal_directions(moment: Tensor, damping: float) -> Tensor:
    """The eigenvectors of a second moment as columns, float64, the largest eigenvalue first.

    Args:
        damping: share of the mean diagonal that is added: it changes no direction, but lets those
            along which nothing was seen be told apart from rounding.
    """
    share = damping * moment.diagonal().mean()
    damped = moment + share * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.eigh(damped).eigenvectors.flip(1)


def _normed(state: Tensor, eps: float) -> Tensor:
    """The rows [tokens, width] of a state behind a norm without its factors, float64."""
    x = state[0].double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _along(
    basis: Tensor,
    states: Sequence[Tensor],
    eps: float,
    names: frozenset[str],
    group: Group,
) -> Statistics:
    """Sums of what the norm hands on along each direction."""
    statistics = Statistics.empty(names, group.units, group.units, group.device)
    for state in states:
        x = (_normed(state, eps) @ basis).to(group.device)
        statistics.add(contribution("inputs", x[None], names, layer=group.name))
    return statistics


def _step(
    half: Callable[..., Tensor], layer: nn.Module, span: Tensor | None
) -> Callable[..., Tensor]:
    def step(state: Tensor, **named: Any) -> Tensor:
        if span is not None:
            held = span.to(state.device)
            state = ((state.double() @ held) @ held.T).to(state.dtype)
        return half(layer, state, named)

    return step


def _behind_attention(layer: Any, state: Tensor, named: dict[str, Any]) -> Tensor:
    found: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(state), **named)[0]
    return state + found


def _behind_mlp(layer: Any, state: Tensor, named: dict[str, Any]) -> Tensor:
    found: Tensor = layer.mlp(layer.post_attention_layernorm(state))
    return state + found
