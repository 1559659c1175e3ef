"""Which links between tokens attention computes: each query chooses among the keys that it sees.

Nothing leaves the cache, and masks save no work, so what is measured here is what a kernel that
skips the other links would give. A query knows itself and what stands before it: no formula of
links may reduce over the table, and a page of keys counts only once it is full.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunezero.errors import ScoreError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import FEATURES
from prunezero.models.attending.observing import CHUNK, Attended, Looks
from prunezero.models.attending.values import VALUES
from prunezero.scoring.column_selection import kept_count
from prunezero.scoring.score import evaluate
from prunezero.scoring.torch_text import function_of


@dataclass(frozen=True)
class LinkPolicy:
    """How many links each query keeps in each head, and which."""

    criterion: Criterion
    """of one value for each link, or for each key; the lowest go"""
    kept: float
    """share of the keys that a query sees that it keeps, above 0 and at most 1"""
    sinks: int = 4
    """first keys that every query keeps, inside the budget"""
    recent: int = 32
    """keys at a query and just before it that it keeps, inside the budget"""
    page: int = 1
    """neighbouring keys that stay or go together"""
    share: str = "head"
    """who keeps the same links: a query head by itself, or all of a "layer", by the mean of their
    scores"""
    at_prompt: bool = False
    """whether links of the prompt go too, or those of what follows alone"""
    behind: bool = True
    """whether links of what follows go; where they do not, the queries of a page choose together"""

    is_simulated = True
    together = False
    each_step = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that it looks at."""
        return self.criterion.features

    @property
    def signal(self) -> str:
        """The costliest signal that it looks at, one of SIGNALS."""
        return self.criterion.signal

    def chosen(self, attended: Attended) -> Tensor:
        """Which links stay, bool [query heads, queries, keys].

        Raises:
            ScoreError: a score is NaN or infinite.
            StatisticsError: a feature looks at what was not measured.
        """
        count = attended.queries.shape[1]
        parts = [
            self._chosen(_Part(attended, start, min(start + CHUNK, count), self.page))
            for start in range(0, count, CHUNK)
        ]
        return torch.cat(parts, 1)

    def _chosen(self, part: _Part) -> Tensor:
        shape = part.shape
        if self.kept == 1:
            return part.sees.expand(shape)
        features = {name: _value(name, part) for name in self.criterion.features}
        scores = evaluate(self.criterion, features, shape)
        if not bool(torch.isfinite(scores[part.sees.expand(shape)]).all()):
            raise ScoreError(
                f"criterion {self.criterion.text} gives a link of layer {part.attended.layer} a "
                "score that is NaN or infinite; such scores never choose"
            )
        if self.share == "layer":
            scores = scores.mean(0, keepdim=True)
        always = self._always(part)
        ranked = scores.masked_fill(always, torch.inf).masked_fill(~part.sees, -torch.inf)
        places = ranked.sort(dim=-1, stable=True).indices.argsort(dim=-1)
        return (places >= shape[-1] - self._counts(part, always)[:, None]).expand(shape)

    def _always(self, part: _Part) -> Tensor:
        """Links that stay anyway, bool [queries, keys]: whole pages, and those not full yet."""
        keys = torch.arange(part.shape[-1], device=part.sees.device)
        # Where queries choose together, all of a page do as its first.
        since = part.queries if self.behind else part.queries // self.page * self.page
        near = since[:, None] - part.attended.positions[0] < self.recent
        sure = part.sees & (near | (keys < self.sinks))
        if self.page == 1:
            return sure
        pages = torch.nn.functional.pad(sure, (0, -len(keys) % self.page))
        whole = pages.view(len(sure), -1, self.page).any(-1).repeat_interleave(self.page, 1)
        is_full = part.last_of_page <= part.queries[:, None]
        return part.sees & (whole[:, : len(keys)] | ~is_full)

    def _counts(self, part: _Part, always: Tensor) -> Tensor:
        """How many links each query keeps, int64 [queries]; those that stay anyway, at least."""
        fixed = always.sum(-1)
        until = part.queries
        if not self.behind:
            # As many as the last of a page may keep, which also sees those behind the others.
            last = until // self.page * self.page + self.page - 1
            until = last.clamp(max=part.attended.seen - 1)
        wanted = [kept_count(place + 1, self.kept) for place in until.tolist()]
        sure = fixed + until - part.queries
        free = (torch.tensor(wanted, device=fixed.device) - sure).clamp(min=0)
        return fixed + free // self.page * self.page


@dataclass(frozen=True)
class _Part:
    """Some queries of a text, with all keys."""

    attended: Attended
    start: int
    stop: int
    page: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[query heads, queries, keys]."""
        heads = len(self.attended.queries)
        return heads, self.stop - self.start, self.attended.keys.shape[1]

    @property
    def queries(self) -> Tensor:
        """How many tokens stand before each query, int64 [queries]."""
        first = self.attended.seen - self.attended.queries.shape[1]
        device = self.attended.keys.device
        return torch.arange(first + self.start, first + self.stop, device=device)

    @property
    def distances(self) -> Tensor:
        """How many tokens each key stands before each query, int64 [queries, keys]."""
        return self.queries[:, None] - self.attended.positions[0]

    @property
    def sees(self) -> Tensor:
        """Which keys stand not behind a query, bool [queries, keys]."""
        return self.distances >= 0

    @property
    def last_of_page(self) -> Tensor:
        """Place of the last key of each key's page, int64 [keys]."""
        places = torch.arange(self.shape[-1], device=self.attended.keys.device)
        return places // self.page * self.page + self.page - 1

    def logits(self) -> Tensor:
        """What the softmax is made of [query heads, queries, keys]; minus infinity behind."""
        return self.attended.logits(self.start, self.stop).flatten(0, 1)

    def page_bounds(self) -> Tensor:
        """The most that a query's product with a key of a page can be [query heads, queries, keys].

        By the least and the largest value of each channel in the page. Of a page that is not full
        before a query it says what must not be known; such a page stays anyway.

        Source: Tang et al. 2024, Quest, arXiv:2406.10774, section 3.2.
        """
        keys, queries = self.attended.keys, self.attended.grouped[:, :, self.start : self.stop]
        full = keys.shape[1] // self.page * self.page
        pages = keys[:, :full].view(len(keys), -1, self.page, keys.shape[-1])
        low, high = pages.amin(2)[:, None], pages.amax(2)[:, None]
        # max(q l, q h) is q h where q is positive, and q l where it is negative.
        bounds = queries.clamp(min=0) @ high.mT + queries.clamp(max=0) @ low.mT
        spread = (bounds * self.attended.scaling).repeat_interleave(self.page, -1).flatten(0, 1)
        return torch.nn.functional.pad(spread, (0, keys.shape[1] - full))

    def block_products(self) -> Tensor:
        """Products of the mean queries and keys of pages [query heads, queries, keys].

        All queries of the text have to be there.

        Source: Jiang et al. 2024, MInference, arXiv:2407.02490, section 3.2, block-sparse heads.
        """
        queries = self._means(self.attended.grouped)
        keys = self._means(self.attended.keys)[:, None]
        products = (queries @ keys.mT * self.attended.scaling).flatten(0, 1)
        rows = self.queries // self.page
        columns = torch.arange(self.shape[-1], device=rows.device) // self.page
        return products[:, rows][..., columns]

    def _means(self, states: Tensor) -> Tensor:
        """Means over pages of tokens, the last of which may be shorter [..., pages, width]."""
        count = states.shape[-2]
        pages = torch.arange(count, device=states.device) // self.page
        sums = states.new_zeros((*states.shape[:-2], int(pages[-1]) + 1, states.shape[-1]))
        sums.index_add_(-2, pages, states)
        return sums / torch.bincount(pages)[:, None]


def _finite_logits(part: _Part) -> Tensor:
    # Of keys that a query does not see nothing is asked.
    return part.logits().masked_fill(~part.sees, 0.0)


_OF_LINKS: dict[str, Callable[[_Part], Tensor]] = {
    "logits": _finite_logits,
    "attention": lambda part: part.logits().softmax(-1),
    "distances": lambda part: part.distances,
    "page_bounds": _Part.page_bounds,
    "block_products": _Part.block_products,
}
"""By name in the torch text of a feature: [query heads, queries, keys] or [queries, keys]."""


def _value(name: str, part: _Part) -> Tensor:
    """A feature, float32, broadcastable to [query heads, queries, keys]."""
    row = FEATURES[name]
    read = {
        one: _OF_LINKS[one](part) if one in _OF_LINKS else VALUES[one](part.attended, Looks())
        for one in row.inputs
    }
    value = _function(name)(**read).float()
    if row.shape == "element":
        return value
    groups, heads = len(part.attended.keys), part.shape[0]
    return value.expand(groups, -1).repeat_interleave(heads // groups, 0)[:, None]


@functools.cache
def _function(name: str) -> Callable[..., Tensor]:
    row = FEATURES[name]
    return function_of(row.inputs, [f"return {row.torch}"])
