"""Search for criteria of keys: propose, screen by lost attention, measure KL, keep the front.

    published recipes -> children -> attention lost -> KL on text and on recall -> Pareto front

A generation proposes recipes until enough of them keep keys on the prompts that none before kept.
Those of the lowest Pareto ranks by lost attention are measured, and a third by chance from the
rest, so that the cheap rung is put to the test; the best that were ever measured breed. Which share
of keys stays is an argument, as the sparsity is elsewhere.

Source of the selection: Deb et al. 2002, NSGA-II (`front.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prunezero.errors import SearchError
from prunezero.models.attending.installing import Known
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.searching.attending.front import best_first, pareto_front
from prunezero.searching.attending.proposals import (
    Proposal,
    Proposer,
    key_of,
    ranked_alike,
    seeds_of,
)
from prunezero.searching.attending.results import Results
from prunezero.searching.attending.rungs import Rungs, Texts
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.evolution import generator

# Proposals for one recipe that keeps other keys before a space counts as exhausted.
_MAX_PROPOSALS = 40


@dataclass(frozen=True)
class Experiment:
    """What is searched."""

    space: SearchSpace
    """the formulas and numbers that recipes may have; of unit: kv_column"""
    kept: float
    """share of the prompt's keys that stay, above 0 and at most 1"""
    candidates: int | None
    """recipes whose KL is measured, those that it starts from among them; None: until it is
    stopped"""
    seed: int = 0
    """of every draw"""
    layers: int = 4
    """that the cheap rung looks at"""
    start: tuple[Recipe, ...] = ()
    """recipes to start from, beside the published ones of the space's words"""
    from_scratch: bool = False
    """whether it starts without published ones"""


@dataclass(frozen=True)
class Tried:
    """One recipe that a search tried, and how far it came."""

    slot: int
    """its place in the order of proposals"""
    generation: int
    """0 holds what the search starts from"""
    recipe: Recipe
    """the formula and its choices"""
    origin: str
    """seed, random, mutate, cross or choose"""
    parents: tuple[str, ...]
    """names of the recipes it was made from"""
    mask: str = ""
    """digest of the keys that it keeps on the prompts"""
    lost: Mapping[str, float] = field(default_factory=dict)
    """share of the coming attention that it loses, by text; empty where it cannot choose"""
    kl: Mapping[str, float] = field(default_factory=dict)
    """nats per token to the dense model, by text; empty unless it earned that"""
    fault: str = ""
    """why it is no candidate"""


@dataclass(frozen=True)
class Found:
    """What a search found."""

    tried: tuple[Tried, ...]
    """all that keep keys that none before kept, in order of their slots"""
    proposed: int
    """recipes that were drawn, those among them that keep known keys"""

    @property
    def measured(self) -> list[Tried]:
        """Those with a KL, in order of their slots."""
        return [one for one in self.tried if one.kl]

    @property
    def front(self) -> list[Tried]:
        """Those measured that no other one dominates, in order of the first text's KL."""
        measured = self.measured
        return [measured[place] for place in pareto_front([_point(one.kl) for one in measured])]

    def rung_tau(self, text: str) -> float:
        """Kendall's tau between attention lost and KL on one text; NaN where nothing is known."""
        from scipy.stats import kendalltau

        pairs = [(one.lost[text], one.kl[text]) for one in self.measured]
        if len(pairs) < 2:
            return float("nan")
        return float(kendalltau(*zip(*pairs, strict=True)).statistic)


def search_attention(
    language_model: LanguageModel,
    texts: Texts,
    experiment: Experiment,
    *,
    known: Known | None = None,
    results: Results | None = None,
    told: Callable[[Tried], None] = lambda tried: None,
    stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Look for recipes of keys that are best on several texts at once.

    The same experiment gives the same recipes in the same order, also after a cut, from its
    results.

    Args:
        texts: prompts and what follows, as the dense model read them, by name; an objective each.
        known: how queries of calibration text are distributed (`query_moments`), for EXPECTED.
        results: of before, to go on from; None begins anew, and keeps them in memory.
        told: is handed each recipe when it was screened, and again when it was measured.
        stop: asked before every piece of work; True ends the search.

    Raises:
        SearchError: the space is not of keys, looks at what is not known, or cannot hold what it
            is to start from.
        OutputError: the results cannot be written.
    """
    _check(experiment, known)
    rungs = Rungs(language_model, texts, known or {}, layers=experiment.layers)
    rungs.prepare(looked_at(experiment))
    run = _Run(rungs, results or Results(), experiment, (told, stop))
    run.all_generations()
    return Found(tuple(run.tried.values()), run.slot)


def _check(experiment: Experiment, known: Known | None) -> None:
    space = experiment.space
    if space.unit != "kv_column":
        raise SearchError(
            f"search space {space.name} is of unit: {space.unit}, and criteria of keys in a cache "
            "are looked for; use the space attention, or another one of unit: kv_column"
        )
    if "STREAM" in looked_at(experiment):
        raise SearchError(
            f"search space {space.name} looks at STREAM, which is of whole heads, and no rung sees "
            "those; take it out of the space"
        )
    if "EXPECTED" in looked_at(experiment) and not known:
        raise SearchError(
            f"search space {space.name} looks at EXPECTED, so how queries are distributed has to "
            "be measured on calibration text by query_moments, and handed over as known"
        )


def looked_at(experiment: Experiment) -> set[str]:
    """Features that some recipe of the search may look at."""
    seeds = _seeds_of(experiment)
    offered = experiment.space.examples("free")
    others = [name for recipe in (*seeds, *offered) for name in recipe.features]
    return {*experiment.space.features, *others}


def _seeds_of(experiment: Experiment) -> list[Recipe]:
    return seeds_of(experiment.space, experiment.start, from_scratch=experiment.from_scratch)


def _point(values: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(values.values())


# Who is told of each recipe, and who says when to end.
_Asked = tuple[Callable[[Tried], None], Callable[[], bool]]


class _Run:
    """One search under way."""

    def __init__(
        self, rungs: Rungs, results: Results, experiment: Experiment, asked: _Asked
    ) -> None:
        self.slot = 0
        self.tried: dict[int, Tried] = {}
        self._rungs, self._results, self._experiment = rungs, results, experiment
        self._told, self._stop = asked
        self._proposer = Proposer(experiment.space, experiment.kept, experiment.seed)
        self._alike: set[str] = set()
        self._masks: set[str] = set()

    def all_generations(self) -> None:
        """Go on until enough is measured, or nothing new is drawn any more."""
        self._measure(self._screened(0, self._seeds()))
        number = 1
        while self._left and (fresh := self._new(number)):
            self._measure(self._climbing(number, fresh))
            number += 1

    @property
    def _left(self) -> bool:
        """Whether another recipe may be measured."""
        most = self._experiment.candidates
        done = sum(bool(one.kl) for one in self.tried.values())
        return not self._stop() and (most is None or done < most)

    def _seeds(self) -> Iterator[Proposal]:
        for recipe in _seeds_of(self._experiment):
            yield Proposal(recipe, "seed")

    def _new(self, generation: int) -> list[Tried]:
        """As many recipes that keep keys which none before kept as a generation has."""
        wanted = self._experiment.space.generation
        found: list[Tried] = []
        population = self._population()
        for _ in range(_MAX_PROPOSALS * wanted):
            proposal = self._proposer.draw(self.slot, population)
            found += self._screened(generation, [proposal])
            if len(found) >= wanted or self._stop():
                break
        return found

    def _population(self) -> list[Recipe]:
        """Who breeds: the best that were measured, the best first."""
        measured = [one for one in self.tried.values() if one.kl]
        order = best_first([_point(one.kl) for one in measured])
        return [measured[place].recipe for place in order][: self._experiment.space.population]

    def _screened(
        self, generation: int, proposals: Iterator[Proposal] | Sequence[Proposal | None]
    ) -> list[Tried]:
        """Those of them that keep other keys than all before."""
        found = []
        for proposal in proposals:
            if self._stop():
                break
            slot = self.slot
            self.slot += 1
            if proposal is None or not self._is_unlike(proposal.recipe):
                continue
            tried = self._probed(slot, generation, proposal)
            if not tried.fault and tried.mask not in self._masks:
                self._masks.add(tried.mask)
                found.append(self._keep(tried))
        return found

    def _is_unlike(self, recipe: Recipe) -> bool:
        alike = ranked_alike(recipe, self._experiment.space)
        is_new = alike not in self._alike
        self._alike.add(alike)
        return is_new

    def _probed(self, slot: int, generation: int, proposal: Proposal) -> Tried:
        recipe, kept = proposal.recipe, self._experiment.kept
        answer = self._results.result(
            "screened", key_of(recipe), partial(self._rungs.screened, recipe, kept)
        )
        fields = self._in_order(answer)
        return Tried(slot, generation, recipe, proposal.origin, proposal.parents, **fields)

    def _climbing(self, generation: int, fresh: Sequence[Tried]) -> list[Tried]:
        """Whose KL is measured: the best by lost attention, and a third by chance of the rest."""
        wanted = min(self._experiment.space.measured, len(fresh))
        by_chance = wanted // 3
        order = best_first([_point(one.lost) for one in fresh])
        best, rest = order[: wanted - by_chance], order[wanted - by_chance :]
        rng = generator(self._experiment.seed, generation, "climbing")
        return [fresh[place] for place in [*best, *rng.sample(rest, by_chance)]]

    def _measure(self, climbing: Sequence[Tried]) -> None:
        for tried in climbing:
            if not self._left:
                return
            recipe, kept = tried.recipe, self._experiment.kept
            answer = self._results.result(
                "measured", key_of(recipe), partial(self._rungs.measured, recipe, kept)
            )
            self._keep(replace(tried, **self._in_order(answer)))

    def _in_order(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """An answer whose numbers are in the order of the texts; a log has lost it."""
        names = self._rungs.names
        return {
            key: {name: value[name] for name in names} if isinstance(value, dict) else value
            for key, value in answer.items()
        }

    def _keep(self, tried: Tried) -> Tried:
        self.tried[tried.slot] = tried
        self._told(tried)
        return tried
