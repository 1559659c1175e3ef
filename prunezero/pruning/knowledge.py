"""Where is what a model knows: which places must lose nothing, since its loss would grow most?

Each place loses a share of its units by itself, those whose weights are smallest and at least one,
and the loss is measured; then it gets them back. Places where the loss grew most keep all.

Source: the knowledge distribution of LoRAShear, Chen et al. 2023, arXiv:2310.18356. That units go
by the norm of their weights, and that nats are averaged over the shares, is ours: the paper says
that a proxy prunes them at several ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning.recipes.word_options import Periods
from prunezero.scoring.request import removed_count
from prunezero.scoring.selection import lowest_first


def with_protected(
    groups: Sequence[Group],
    language_model: LanguageModel,
    windows: Tensor,
    options: Periods,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Group]:
    """The groups, of which those are protected besides that a model needs most.

    Args:
        language_model: afterwards as it was, bit for bit.
        windows: token ids [count, length], of which the first are looked at.
        options: which share of the places is protected, rounded down; and how they are probed.
        progress: told (what, done, total) as the work goes on.
    """
    free = [group for group in groups if not group.is_protected]
    count = removed_count(len(free), options.protect)
    if not count:
        return list(groups)
    growths = []
    for done, group in enumerate(free, start=1):
        losses = _losses_without(group, language_model, windows[: options.probe_windows], options)
        # Without what it is with all units, which is the same for every place.
        growths.append(sum(losses) / len(losses))
        if progress is not None:
            progress("losses without some units, of place", done, len(free))
    # The earlier of two equal places is protected.
    order = sorted(range(len(free)), key=lambda place: -growths[place])
    needed = {free[place].key for place in order[:count]}
    return [replace(one, is_protected=one.is_protected or one.key in needed) for one in groups]


@torch.no_grad()
def _losses_without(
    group: Group, language_model: LanguageModel, windows: Tensor, options: Periods
) -> list[float]:
    """Nats per predicted token where a place lacks some units, for each share of them."""
    reader = group.reader
    weight = reader.linear.weight
    before, order = weight.clone(), lowest_first(_norms(group).cpu(), group.strata)
    losses = []
    try:
        for share in options.probe:
            kept = torch.ones(group.units, dtype=torch.bool)
            kept[order[: max(1, removed_count(group.units, share))]] = False
            # What is not read is as good as gone.
            weight.copy_(before).masked_fill_(~reader.mask(kept.to(weight.device)), 0.0)
            losses.append(_mean_loss(language_model, windows))
    finally:
        weight.copy_(before)
    return losses


def _norms(group: Group) -> Tensor:
    """The norm of all weights of each unit, float64 [units]."""
    parts = (member.oriented(member.linear.weight.double()) for member in group.members)
    square = sum((part.square().sum(1) for part in parts), torch.zeros((), dtype=torch.float64))
    return torch.as_tensor(square).sqrt()


def _mean_loss(language_model: LanguageModel, windows: Tensor) -> float:
    """Nats per predicted token, the mean over windows."""
    losses = [
        float(sequence_loss(language_model.model, ids[None].to(language_model.device)))
        for ids in windows
    ]
    return sum(losses) / len(losses)
