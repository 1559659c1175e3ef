"""Replaced on export."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

NAME = "window_sink"  # under which attention is registered
KEPT = "0.25"  # share of a prompt's keys that stay
SINKS = 4  # first keys that always stay
RECENT = 32  # last keys of a prompt that always stay
WINDOW = 32  # last queries that the feature ATT_W looks at
POOL = 5  # neighbouring keys that it is averaged over
SHARED = False  # whether the heads of a layer keep the same keys, by the mean of their scores


def score(queries: Tensor, keys: Tensor, values: Tensor, numbers: dict[str, Any]) -> Tensor:
    """How much each key matters [key-value heads, 1, keys]; the lowest go."""
    return places(keys).float()[:, None]


def places(keys: Tensor) -> Tensor:
    """How many tokens stand before each key [key-value heads, keys]."""
    return torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])


def attention(queries: Tensor, keys: Tensor, numbers: dict[str, Any]) -> Tensor:
    """What the last queries pay, the mean over a group [key-value heads, queries, keys]."""
    heads, count, width = queries.shape
    scaling = numbers.get("scaling")
    grouped = queries.view(len(keys), heads // len(keys), count, width)
    logits = grouped @ keys[:, None].mT * (width**-0.5 if scaling is None else scaling)
    there = torch.arange(keys.shape[1], device=keys.device)
    behind = there > there[len(there) - count :, None]
    return logits.masked_fill(behind, -torch.inf).softmax(-1).mean(1)


def observed(queries: Tensor, keys: Tensor, numbers: dict[str, Any]) -> Tensor:
    """Its mean over the last queries, pooled among the keys before them."""
    window = min(WINDOW, queries.shape[1])
    mean = attention(queries[:, queries.shape[1] - window :], keys, numbers).mean(1)
    before = mean[:, : mean.shape[1] - window]
    if POOL == 1 or not before.shape[1]:
        return mean
    pooled = torch.nn.functional.avg_pool1d(before[:, None], POOL, 1, POOL // 2)[:, 0]
    return torch.cat([pooled, mean[:, before.shape[1] :]], 1)


def kept(queries: Tensor, keys: Tensor, values: Tensor, numbers: dict[str, Any]) -> Tensor:
    """Which keys of a prompt stay, bool [key-value heads, keys]; of equals the later ones."""
    heads, count = keys.shape[:2]
    wanted = count - math.floor(count * (1 - Fraction(KEPT)))
    there = torch.arange(count, device=keys.device)
    always = (there < SINKS) | (there >= count - RECENT)
    if wanted < int(always.sum()):
        raise ValueError(
            f"{wanted} of {count} keys may stay, but {int(always.sum())} always do; keep more, or "
            "read a longer prompt"
        )
    parts = (queries.float(), keys.float(), values.float())
    scores = score(*parts, numbers).expand(heads, 1, count)[:, 0]
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("a key has a score that is NaN or infinite; such scores never choose")
    scores = scores.mean(0, keepdim=True) if SHARED else scores
    order = torch.sort(scores.masked_fill(always, torch.inf), dim=-1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[:, count - wanted :], True).expand(heads, count)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **numbers: Any
) -> tuple[Tensor, Any]:
    """Attention of one layer: of a prompt as it is, and behind it without the keys that went."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if any(numbers.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("attention with sinks or biases of its own is not what this page follows")
    if numbers.get("sliding_window", getattr(module, "sliding_window", None)) is not None:
        # Such a layer forgets by itself.
        return usual(module, query, key, value, mask, **numbers)
    count, there = query.shape[2], torch.arange(key.shape[2], device=key.device)
    if count == len(there):
        if mask is not None and not bool(mask[..., -1, :].all()):
            raise ValueError("a padded batch has texts of unequal length; read them one by one")
        texts = zip(query, key, value, strict=True)
        module.alive = torch.stack([kept(*text, numbers) for text in texts])
        return usual(module, query, key, value, mask, **numbers)
    new = torch.ones_like(module.alive[..., :1]).expand(-1, -1, count)
    module.alive = torch.cat([module.alive, new], -1)
    seen = there <= there[len(there) - count :, None]
    alive = module.alive.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, None]
    return usual(module, query, key, value, alive & seen, **numbers)


def register() -> str:
    """Make the attention known under NAME, with the masks that keep it from seeing the future."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


if __name__ == "__main__":
    print(__doc__)
else:
    register()
