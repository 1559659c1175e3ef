"""Proxy for experts: what outputs of mixtures lose when routers choose only among those that stay.

Products of the outputs of all experts for a sample of tokens are kept, as the search among subsets
keeps them, so that a selection costs one call of each router and a quadratic form. Tokens are those
of the dense model: what earlier mixtures lose is not seen by later ones. The error is the squared
change of a mixture's output divided by the squared output, as a mean over mixtures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.models.anatomy.groups import Group
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.routing import watching
from prunezero.models.observing.subset_losses import SubsetLosses
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.proxies.unit_samples import UnitSamples

# Outputs of all experts are held for so many tokens of each mixture: the first of calibration text.
MOST_TOKENS = 512


@dataclass(frozen=True)
class ExpertSamples(UnitSamples):
    """All experts of a model, and what each makes of a sample of tokens."""

    losses: tuple[SubsetLosses, ...] = ()
    """of each group"""

    def error(self, recipe: Recipe, masks: Sequence[Tensor]) -> float:
        """The squared change of the mixtures' outputs, relative to them, a mean over mixtures."""
        pairs = zip(self.losses, masks, strict=True)
        return sum(_lost(known, kept) for known, kept in pairs) / len(self.losses)


def _lost(known: SubsetLosses, kept: Tensor) -> float:
    whole = sum(float(one.square().sum()) for one in known.outputs)
    return float(known.squares(kept[None]).sum()) / max(whole, 1e-30)


def losses_of(
    language_model: LanguageModel, groups: Sequence[Group], windows: Tensor
) -> tuple[SubsetLosses, ...]:
    """What each mixture loses without some experts, on the first tokens of calibration text.

    Args:
        windows: token ids [count, length], of which the first `MOST_TOKENS` are looked at.
    """
    length = windows.shape[1]
    tokens: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    for ids in windows[: max(1, MOST_TOKENS // length), :MOST_TOKENS]:
        with watching(language_model.model, groups) as seen, torch.no_grad():
            language_model.model.base_model(ids[None].to(language_model.device), use_cache=False)
        for group in groups:
            tokens[group.name].append(seen[group.name].tokens.detach())
    return tuple(SubsetLosses.of(language_model, group, tokens[group.name]) for group in groups)
