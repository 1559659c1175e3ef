"""A policy installed for a while: the keys of a prompt are chosen once it was read, layer by layer.

`evicting` makes the tensors of the cache smaller, so bytes really fall; it asks for as many keys of
each head of a layer. `masking` keeps all keys and masks those that would be gone: what unequal
heads, padded batches and the tests of the other way need. Both read the prompt as the dense model
does, for they choose behind its attention; what follows sees only what stayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezero.errors import ModelError, SelectionError
from prunezero.formula.features import FEATURES
from prunezero.models.attending.interface import (
    Call,
    refuse_extras,
    remembering_layers,
    watched_attention,
)
from prunezero.models.attending.links import LinkPolicy
from prunezero.models.attending.observing import Attended, Measured, attended_of, writers
from prunezero.models.attending.policy import Policy
from prunezero.models.attending.remembering import forgetting_cache, plain_cache
from prunezero.models.loading.language_model import LanguageModel
from prunezero.scoring.column_selection import protected

# What is known of each layer beforehand, by its index.
Known = Mapping[int, Measured]


@contextmanager
def evicting(
    language_model: LanguageModel, policy: Policy, known: Known | None = None
) -> Iterator[Any]:
    """Within it, the cache that it gives forgets keys of the text that is read into it first.

    Hand the cache to `model(ids, cache=...)` or `model.generate(ids, cache=...)`; after
    `cache.reset()` it takes another text. Leaving it, also after an error, the model is what it
    was.

    Args:
        known: what was measured beforehand, for features that need that.

    Raises:
        SelectionError: heads compete, so that each would keep another number.
        ModelError: the model has no such attention; within, a batch is padded, or the model runs
            without the cache.
    """
    if policy.together:
        raise SelectionError(
            "heads that compete keep unequal numbers of keys, for which the tensors of a cache "
            "have no room; use masking, which simulates it"
        )
    with _watched(_Evicting(language_model, policy, known or {})) as session:
        yield session.cache


@contextmanager
def masking(
    language_model: LanguageModel, policy: Policy, known: Known | None = None
) -> Iterator[Any]:
    """`evicting` by masks: the cache that it gives keeps all keys, and no memory is saved.

    Batches may be padded on either side; each text has a budget of its own tokens.

    Raises:
        SelectionError: heads compete at each step.
        ModelError: as `evicting`, padding aside.
    """
    if policy.together and policy.each_step:
        raise _together_at_each_step()
    with _watched(_Masking(language_model, policy, known or {})) as session:
        yield session.cache


@contextmanager
def installed(
    language_model: LanguageModel, policy: Policy | LinkPolicy, known: Known | None = None
) -> Iterator[Session]:
    """The way that a policy's budgets allow: `evicting`, or `masking` where heads compete.

    Links are masked too.

    Raises:
        SelectionError, ModelError: as these.
    """
    if policy.together and policy.each_step:
        raise _together_at_each_step()
    if isinstance(policy, LinkPolicy):
        session: Session = _Linking(language_model, policy, known or {})
    else:
        way = _Masking if policy.together else _Evicting
        session = way(language_model, policy, known or {})
    with _watched(session):
        yield session


@contextmanager
def _watched(session: Session) -> Iterator[Session]:
    with watched_attention(session.language_model, session.attend):
        yield session


def _together_at_each_step() -> SelectionError:
    return SelectionError(
        "heads compete once, when the prompt was read; with when: step leave compare: layer out"
    )


class Session(ABC):
    """A policy installed in a model, and what it remembers between calls of attention."""

    cache: Any
    """of the one text that it is installed for"""
    counts_behind = True
    """whether links are counted behind the prompt, or in it"""

    def __init__(
        self, language_model: LanguageModel, features: Collection[str], known: Known
    ) -> None:
        self.language_model, self.known = language_model, known
        self.layers = remembering_layers(language_model)
        self.writers = writers(language_model) if "VON" in features else {}
        self.cache = self._new_cache()
        # In all heads of the layers that remember: links that there are, and those that stayed.
        self.links = 0
        self.links_kept = 0

    @abstractmethod
    def _new_cache(self) -> Any: ...

    @abstractmethod
    def _after_prompt(self, call: Call) -> None: ...

    @abstractmethod
    def _later(self, call: Call) -> tuple[Tensor, Tensor | None]: ...

    def _at_prompt(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return call.usual()

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """What a call of attention gives under the policy."""
        if call.layer not in self.layers:
            return call.usual()
        held = self.cache.layers[call.layer].keys
        if held is None or held.shape != call.keys.shape:
            raise ModelError(
                "keys are chosen in the cache that was given with the policy, but the model runs "
                "with another one or with none; hand it over as cache=..."
            )
        if call.before:
            if self.counts_behind:
                seen = self.cache.layers[call.layer].get_seq_length()
                self.links += _pairs(call, seen)
            return self._later(call)
        refuse_extras(call)
        found = self._at_prompt(call)
        self._after_prompt(call)
        return found

    def read_again(self, calls: Mapping[int, Call]) -> None:
        """Do behind a prompt what would be done if the model read it, which it did before.

        Args:
            calls: what attention was called with at the prompt, by layer.
        """
        for layer, call in calls.items():
            self.cache.layers[layer].update(call.keys, call.values)
            if layer in self.layers:
                refuse_extras(call)
                self._after_prompt(call)

    def _attended(self, call: Call, item: int, places: Tensor | None = None) -> Attended:
        return attended_of(
            call,
            item=item,
            places=places,
            writer=self.writers.get(call.layer),
            measured=self.known.get(call.layer),
        )


class _Choosing(Session):
    """Keys are chosen behind the prompt, and at each step where the policy says so."""

    def __init__(self, language_model: LanguageModel, policy: Policy, known: Known) -> None:
        self.policy = policy
        super().__init__(language_model, policy.features, known)
        # Of each layer and text of a batch, what it saw last.
        self.last: dict[int, list[Attended]] = {}
        if policy.each_step or isinstance(self, _Masking):
            # What is remembered here beside the cache would not follow.
            self.cache.reorder_cache = self.cache.crop = _refuse_other_texts

    def _chosen(self, attended: Attended) -> Tensor:
        """Which keys of a prompt stay, bool [key-value heads, keys]."""
        keys = attended.keys.shape[1]
        counts = self.policy.counts(keys, len(self.layers))
        if self.policy.heads:
            whole = self.policy.retrieving(self.known, self.layers, keys)[attended.layer]
            always = protected(keys, self.policy.sinks, self.policy.recent)
            return (whole[:, None].cpu() | always).to(attended.keys.device)
        return self.policy.chosen(attended, counts[self.layers.index(attended.layer)])

    def _remember(self, attended: Attended, places: Tensor) -> Attended:
        """What is known of the keys that stay, for the next step.

        Args:
            places: of them among the keys that were there [key-value heads, kept].
        """
        sums = any(FEATURES[name].cost == "full map" for name in self.policy.features)
        totals = [one.gather(1, places) for one in attended.totals] if sums else None
        return replace(
            attended,
            queries=attended.queries[:, -max(self.policy.looks.window, 1) :],
            positions=attended.positions.gather(1, places),
            received=None if totals is None else (totals[0], totals[1]),
        )

    def _stepped(self, call: Call, item: int, held: tuple[Tensor, Tensor]) -> Attended:
        """What a layer sees once one more token came.

        Args:
            held: keys and values that are there by then [key-value heads, keys, width].
        """
        last = self.last[call.layer][item]
        new = torch.full_like(last.positions[:, :1], last.seen)
        window = max(self.policy.looks.window, 1)
        attended = replace(
            last,
            queries=torch.cat([last.queries, call.queries[item].float()], 1)[:, -window:],
            keys=held[0].float(),
            values=held[1].float(),
            positions=torch.cat([last.positions, new], 1),
            received=None,
        )
        if last.received is None:
            return attended
        count = attended.queries.shape[1]
        row = attended.attention(count - 1, count)[:, 0]
        total, most = (torch.cat([one, torch.zeros_like(one[:, :1])], 1) for one in last.received)
        return replace(attended, received=(total + row, torch.maximum(most, row)))

    def _refuse_several(self, call: Call) -> None:
        if self.policy.each_step and call.queries.shape[2] != 1:
            raise ModelError(
                f"keys go at each step, but {call.queries.shape[2]} tokens come at once behind the "
                "prompt; hand them over one by one"
            )


class _Evicting(_Choosing):
    """Keys leave the tensors of the cache."""

    def _new_cache(self) -> Any:
        return forgetting_cache(self.language_model)

    def _after_prompt(self, call: Call) -> None:
        _refuse_padding(call)
        self._keep(call, [self._attended(call, item) for item in range(len(call.keys))], None)

    def _later(self, call: Call) -> tuple[Tensor, Tensor | None]:
        self._refuse_several(call)
        count = call.queries.shape[2]
        allowed = None if count == 1 else _causal(call)[None, None]
        self.links_kept += _pairs(call, call.keys.shape[2])
        found = call.masked(allowed)
        if self.policy.each_step:
            pairs = zip(call.keys, call.values, strict=True)
            stepped = [self._stepped(call, item, held) for item, held in enumerate(pairs)]
            self._keep(call, stepped, call.keys.shape[2] - 1)
        return found

    def _keep(self, call: Call, seen: list[Attended], count: int | None) -> None:
        """Forget what is not chosen; `count` keys of each head stay, or what the budget says."""
        chosen = [
            self._chosen(one) if count is None else self.policy.chosen(one, count) for one in seen
        ]
        places = [mask.nonzero()[:, 1].view(len(mask), -1) for mask in chosen]
        self.cache.layers[call.layer].keep(torch.stack(places))
        if self.policy.each_step:
            pairs = zip(seen, places, strict=True)
            self.last[call.layer] = [self._remember(*pair) for pair in pairs]


class _Masking(_Choosing):
    """Keys are masked; which, by layer, bool [batch, key-value heads, keys]."""

    def __init__(self, language_model: LanguageModel, policy: Policy, known: Known) -> None:
        super().__init__(language_model, policy, known)
        self.alive: dict[int, Tensor] = {}

    def _new_cache(self) -> Any:
        return plain_cache(self.language_model)

    def _after_prompt(self, call: Call) -> None:
        batch, heads, keys, _ = call.keys.shape
        alive = torch.zeros(batch, heads, keys, dtype=torch.bool, device=call.keys.device)
        self.last[call.layer] = []
        for item in range(batch):
            places = _real(call, item)
            attended = self._attended(call, item, places)
            chosen = self._chosen(attended)
            alive[item][:, places] = chosen
            if self.policy.each_step:
                kept = chosen.nonzero()[:, 1].view(heads, -1)
                self.last[call.layer].append(self._remember(attended, kept))
        self.alive[call.layer] = alive

    def _later(self, call: Call) -> tuple[Tensor, Tensor | None]:
        self._refuse_several(call)
        alive = self.alive[call.layer]
        new = torch.ones_like(alive[:, :, :1]).expand(-1, -1, call.queries.shape[2])
        alive = self.alive[call.layer] = torch.cat([alive, new], 2)
        group = call.queries.shape[1] // alive.shape[1]
        allowed = alive.repeat_interleave(group, 1)[:, :, None] & _causal(call)
        if call.mask is not None:
            allowed = allowed & _allowed(call.mask)
        self.links_kept += int(allowed.sum())
        found = call.masked(allowed)
        if self.policy.each_step:
            for item in range(len(alive)):
                self._step(call, item)
        return found

    def _step(self, call: Call, item: int) -> None:
        alive = self.alive[call.layer][item]
        there = alive.nonzero()[:, 1].view(len(alive), -1)
        heads = torch.arange(len(alive), device=alive.device)[:, None]
        held = call.keys[item][heads, there], call.values[item][heads, there]
        attended = self._stepped(call, item, held)
        chosen = self.policy.chosen(attended, there.shape[1] - 1)
        kept = chosen.nonzero()[:, 1].view(len(alive), -1)
        alive.zero_().scatter_(1, there.gather(1, kept), True)
        self.last[call.layer][item] = self._remember(attended, kept)


class _Linking(Session):
    """Links are masked: each query keeps its own, and all keys stay."""

    def __init__(self, language_model: LanguageModel, policy: LinkPolicy, known: Known) -> None:
        self.policy, self.counts_behind = policy, policy.behind
        super().__init__(language_model, policy.features, known)

    def _new_cache(self) -> Any:
        return plain_cache(self.language_model)

    def _at_prompt(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if not self.counts_behind:
            self.links += _pairs(call, call.keys.shape[2])
        return self._chosen(call) if self.policy.at_prompt else call.usual()

    def _after_prompt(self, call: Call) -> None:
        _refuse_padding(call)

    def _later(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._chosen(call) if self.policy.behind else call.usual()

    def _chosen(self, call: Call) -> tuple[Tensor, Tensor | None]:
        parts = [self.policy.chosen(self._attended(call, item)) for item in range(len(call.keys))]
        allowed = torch.stack(parts)
        if bool(call.before) == self.counts_behind:
            self.links_kept += int(allowed.sum())
        return call.masked(allowed)


def _refuse_other_texts(*_: object) -> None:
    raise ModelError(
        "beams and drafts exchange or take back what a cache holds, which keys that go at each "
        "step, or are masked, do not follow; generate greedily or by sampling"
    )


def _refuse_padding(call: Call) -> None:
    if call.mask is not None and not bool(_allowed(call.mask)[..., -1, :].all()):
        raise ModelError(
            "a padded batch has texts of unequal length, which here are not told apart; read texts "
            "of one length, or one by one"
        )


def _pairs(call: Call, keys: int) -> int:
    """Links of the queries of a call, in all its heads, the last of which sees so many keys."""
    batch, heads, count, _ = call.queries.shape
    return batch * heads * (count * (keys - count) + count * (count + 1) // 2)


def _causal(call: Call) -> Tensor:
    """Which keys stand not behind each query, bool [queries, keys]."""
    count, keys = call.queries.shape[2], call.keys.shape[2]
    places = torch.arange(keys, device=call.keys.device)
    return places <= torch.arange(keys - count, keys, device=call.keys.device)[:, None]


def _allowed(mask: Tensor) -> Tensor:
    """A model's mask as bool: what is added is zero where a query sees a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def _real(call: Call, item: int) -> Tensor:
    """Places of the tokens of one text of a batch that are none of padding, int64 [tokens]."""
    if call.mask is None:
        return torch.arange(call.keys.shape[2], device=call.keys.device)
    mask = _allowed(call.mask)[item if len(call.mask) > 1 else 0, 0]
    # The last query sees all that is no padding.
    return mask[-1].nonzero()[:, 0]
