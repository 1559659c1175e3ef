"""Which windows make each step of a training?

Windows of one text come once before any comes again. Of several sources there may be more of those
on which the pruned model has lost most: with L the loss on held-out windows of a source,

    d = max(0, L / L_dense - 1)      share = balance / sources + (1 - balance) * d / sum of d

and where none has lost anything, or a loss is not finite, all sources have the same share. Shares
are turned into windows by credit: before each window a source gets its share of one, and the one
that has most gives the window and pays 1. So counts follow shares to within one, without chance.

Source: the dynamic recovery of LoRAShear, Chen et al. 2023, arXiv:2310.18356, Algorithm 5, which
prefers sources that degraded more and keeps a balanced part of the others. What the shares are, it
leaves open; the formula, and that stages have fixed lengths in place of a test for convergence,
are ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prunezero.pruning.recipes.training_options import Stepwise, Tune
from prunezero.pruning.recovery.mixture import Mixture


class Order(Protocol):
    """The windows of each step of a training."""

    steps: int
    """in all"""

    def is_measured_before(self, done: int) -> bool:
        """Whether the next step asks for losses on the windows held out."""

    def measured(self, done: int, losses: Mapping[int, float]) -> None:
        """Know the losses on windows held out, by their places, after so many steps."""

    def batch(self, done: int) -> list[int]:
        """Places of the windows of the next step, after so many; asked for once."""

    def drawn_of(self, done: int) -> tuple[int, ...]:
        """How many windows of each source came in so many steps; none of one source."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain numbers."""

    def load(self, state: dict[str, Any]) -> None:
        """Be as it was when `state` was taken."""


@dataclass
class Equal:
    """All windows come equally often; nothing is measured, and nothing depends on how it goes."""

    batches: list[list[int]]
    labels: Sequence[int] = ()
    """the source of each window; none where there is one"""

    def __post_init__(self) -> None:
        self.steps = len(self.batches)

    def is_measured_before(self, done: int) -> bool:
        """See `Order`."""
        return False

    def measured(self, done: int, losses: Mapping[int, float]) -> None:
        """See `Order`."""

    def batch(self, done: int) -> list[int]:
        """See `Order`."""
        return self.batches[done]

    def drawn_of(self, done: int) -> tuple[int, ...]:
        """See `Order`."""
        if not self.labels:
            return ()
        came = [self.labels[place] for batch in self.batches[:done] for place in batch]
        return tuple(came.count(source) for source in range(max(self.labels) + 1))

    def state(self) -> dict[str, Any]:
        """See `Order`."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """See `Order`."""


@dataclass
class ByDegradation:
    """More windows of sources on which the pruned model has lost most."""

    mixture: Mixture
    options: Tune | Stepwise
    usable: Sequence[int]
    """places of the windows that are trained on"""
    seed: str
    credit: list[float] = field(init=False)
    """of each source, in windows"""
    drawn: list[int] = field(init=False)
    """windows of each source so far"""
    growth: list[tuple[int, tuple[float, ...]]] = field(default_factory=list, init=False)
    """steps done by then, and the loss of each source over the dense model's"""
    shares: list[tuple[int, tuple[float, ...]]] = field(default_factory=list, init=False)
    """steps done by then, and the share of each source from there on"""

    def __post_init__(self) -> None:
        sources = range(len(self.mixture.names))
        self.credit, self.drawn = [0.0 for _ in sources], [0 for _ in sources]
        self.steps = math.ceil(self.options.drawn / self.options.batch)
        self._places = [self.mixture.places(source, self.usable) for source in sources]
        self._second = math.floor(self.options.second_from * self.steps)

    def is_measured_before(self, done: int) -> bool:
        """See `Order`."""
        last = self.growth[-1][0] if self.growth else -1
        return done % self.options.measure_every == 0 and done > last

    def measured(self, done: int, losses: Mapping[int, float]) -> None:
        """See `Order`."""
        self.growth.append((done, self.mixture.growth(losses)))

    def batch(self, done: int) -> list[int]:
        """See `Order`."""
        shares = self._shares(done)
        if not self.shares or self.shares[-1][1] != shares:
            self.shares.append((done, shares))
        size = min(self.options.batch, self.options.drawn - done * self.options.batch)
        return [self._next(shares) for _ in range(size)]

    def drawn_of(self, done: int) -> tuple[int, ...]:
        """See `Order`."""
        return tuple(self.drawn)

    def state(self) -> dict[str, Any]:
        """See `Order`."""
        return {name: getattr(self, name) for name in ("credit", "drawn", "growth", "shares")}

    def load(self, state: dict[str, Any]) -> None:
        """See `Order`."""
        self.credit, self.drawn = list(state["credit"]), list(state["drawn"])
        self.growth, self.shares = list(state["growth"]), list(state["shares"])

    def _shares(self, done: int) -> tuple[float, ...]:
        """The share of each source in the windows that come next; 0 of the other stage's."""
        sources, last = len(self.mixture.names), self.options.second_stage
        first = range(sources - last)
        active = range(sources - last, sources) if last and done >= self._second else first
        found = degradation_shares(
            [self.growth[-1][1][source] for source in active], self.options.balance
        )
        return tuple(
            found[source - active[0]] if source in active else 0.0 for source in range(sources)
        )

    def _next(self, shares: Sequence[float]) -> int:
        """The place of the next window."""
        active = [source for source, share in enumerate(shares) if share > 0]
        for source in active:
            self.credit[source] += shares[source]
        chosen = max(active, key=lambda source: self.credit[source])
        self.credit[chosen] -= 1
        places = self._places[chosen]
        turn, at = divmod(self.drawn[chosen], len(places))
        self.drawn[chosen] += 1
        return random.Random(f"{self.seed} {chosen} {turn}").sample(places, len(places))[at]


def degradation_shares(growth: Sequence[float], balance: float) -> list[float]:
    """The share of each source in a training, adding up to 1.

    Args:
        growth: of each source its loss over the dense model's.
        balance: share that is dealt out equally.
    """
    count = len(growth)
    lost = [max(0.0, one - 1) for one in growth]
    if not all(map(math.isfinite, growth)) or sum(lost) == 0:
        return [1 / count for _ in lost]
    return [balance / count + (1 - balance) * one / sum(lost) for one in lost]


def batches(count: int, drawn: int, size: int, seed: str) -> list[list[int]]:
    """Places of the windows of each step: every window comes once before any comes again.

    Args:
        count: windows there are.
        drawn: sequences in all.
        size: sequences of one step.
    """
    rng = random.Random(seed)
    rounds = math.ceil(drawn / count)
    order = [place for _ in range(rounds) for place in rng.sample(range(count), count)]
    del order[drawn:]
    return [order[at : at + size] for at in range(0, len(order), size)]


def order_of(
    options: Tune | Stepwise, count: int, mixture: Mixture | None, seed: str
) -> Equal | ByDegradation:
    """Which of so many calibration windows make each step.

    Args:
        mixture: the sources of the text; None of one.
        seed: of all chance.
    """
    sources = 1 if mixture is None else len(mixture.names)
    usable, _ = options.split(count, sources)
    if mixture is not None and options.measures(sources):
        return ByDegradation(mixture, options, usable, seed)
    labels = () if mixture is None else mixture.labels
    return Equal(batches(len(usable), options.drawn, options.batch, seed), labels)
