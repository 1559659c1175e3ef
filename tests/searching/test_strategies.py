"""Every strategy finds what is there to be found, by its seed alone; controls pay what they say."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import ScoreError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.allocation import Evidence, table
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Table
from prunezero.scoring.feature_values import feature
from prunezero.scoring.score import evaluate
from prunezero.searching.evaluation.evaluator import ProbeMask
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.history import History
from prunezero.searching.proxies.layer_error import mask_digest, masks_on
from prunezero.searching.proxies.samples import Sample, stacked
from prunezero.searching.search import search
from prunezero.searching.session import find
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.catalogue import STRATEGIES
from prunezero.searching.strategies.controls import POPULATION, suggest
from prunezero.searching.strategies.enumeration import Blocks, enumerate_formulas
from prunezero.searching.strategies.evolution import _chosen, generator
from prunezero.searching.strategies.genetics import random_criterion
from prunezero.searching.strategies.parents import ParentPool
from tests.searching.testbed import bare_task, make_task, tiny_space, tiny_testbed
from tests.tiny_models import tiny_model

# Nobody else to take a formula from.
ALONE = ParentPool((), [], [], 1)
PLANTED = Criterion.parse("abs(W)*sqrt(X)")
SPACE = tiny_space(
    terminals=["abs(W)", "X", "R1", "C1"],
    operators=["add", "mul", "div", "abs", "sqrt"],
    constants=[],
    exponents=[],
    max_complexity=9,
    fresh_depth=3,
    population=16,
    tuned=0,
)
# New masks, and for plain-gp evaluations, in which each finds the planted ranking.
BUDGETS = {"plain-gp": 100, "enumeration": 40, "optuna": 40}
# A space of which every formula can be looked at.
SMALL = {
    "terminals": ["abs(W)", "X"],
    "operators": ["add", "mul", "abs", "sqrt"],
    "max_complexity": 7,
}


class PlantedRungs:
    """Rungs without a model: all say how far a ranking is from that of the planted formula."""

    def __init__(self, seed: int = 0, space: SearchSpace = SPACE) -> None:
        self.task = bare_task(space, seed=seed)
        self.asked: Counter[str] = Counter()
        numbers = torch.Generator().manual_seed(5)
        weight = torch.randn((8, 24), generator=numbers)
        features = {name: feature(name, weight) for name in ("W", "R1", "C1")}
        features["X"] = torch.rand((1, 24), generator=numbers) * 4 + 0.1
        self._features = features
        self._stacks = stacked([Sample("layer", features, None, torch.ones(8))])

    def probe(self, rule: Rule | Criterion) -> ProbeMask | None:
        criterion = rule.criterion if isinstance(rule, Rule) else rule
        try:
            masks = masks_on(self._stacks, Recipe(name="it", criterion=criterion), 0.5, "free")
        except ScoreError:
            return None
        return ProbeMask(mask_digest(masks), masks[0].numpy().ravel())

    def errors(self, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
        for rule in rules:
            self.asked["layer error"] += 1
            yield {"layer_error": self.distance(rule.criterion), "seconds": 1.0}

    def tunings(self, rules: Sequence[Rule], trials: int) -> Iterator[dict[str, Any]]:
        for rule in rules:
            yield {"formula": rule.criterion.text}

    def rows(
        self, recipes: Sequence[Recipe], splits: Sequence[str], *, rival: Sequence[float] = ()
    ) -> Iterator[dict[str, Any]]:
        for recipe in recipes:
            distance = self.distance(recipe.criterion)
            self.asked.update(splits)
            yield {f"{split}_perplexity": distance for split in splits} | {"kl": distance}

    def distance(self, criterion: Criterion) -> float:
        """1 minus the mean rank correlation over rows; a little more than 0 at the least."""
        mine, planted = (self._ranks(one) for one in (criterion, PLANTED))
        return 1.01 - float(
            np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(mine, planted, strict=True)])
        )

    def _ranks(self, criterion: Criterion) -> Any:
        features = {name: self._features[name] for name in criterion.features}
        scores = evaluate(criterion, features, self._features["W"].shape)
        return scores.argsort(1).argsort(1).double().numpy()


def run(
    strategy: str, max_candidates: int | None, *, seed: int = 0, space: SearchSpace = SPACE
) -> tuple[list[Candidate], PlantedRungs]:
    rungs: Any = PlantedRungs(seed, space)
    found = search(rungs, strategy=strategy, max_candidates=max_candidates)
    return list({one.slot: one for one in found}.values()), rungs


def outcome(candidates: list[Candidate]) -> list[tuple[object, ...]]:
    return [
        (one.slot, one.criterion.text, one.origin, one.parents, one.status, one.search_perplexity)
        for one in candidates
    ]


def small_space() -> SearchSpace:
    return SearchSpace.model_validate({**SPACE.model_dump(mode="json"), **SMALL})


def test_the_catalogue_holds_evolution_and_five_controls() -> None:
    words = {"evolution", "random", "no-memory", "enumeration", "optuna", "plain-gp"}
    assert words == set(STRATEGIES)
    assert all(strategy.note for strategy in STRATEGIES.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_planted_formula_is_found_and_measured(strategy: str) -> None:
    found, rungs = run(strategy, BUDGETS.get(strategy, 60))
    planted = rungs.probe(PLANTED)
    measured = [one for one in found if one.search_perplexity is not None]
    best = min(measured, key=lambda one: one.search_perplexity or 0.0)
    assert planted is not None and best.mask == planted.digest
    assert best.search_perplexity == pytest.approx(0.01)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_is_a_function_of_its_seed(strategy: str) -> None:
    first, _ = run(strategy, 30)
    again, _ = run(strategy, 30)
    other, _ = run(strategy, 30, seed=1)
    assert outcome(first) == outcome(again)
    assert (outcome(first) != outcome(other)) == (strategy != "enumeration")


def test_enumeration_ends_by_itself_and_sees_every_mask_that_chance_finds_once() -> None:
    space = small_space()
    found, rungs = run("enumeration", None, space=space)
    new = [one.mask for one in found if one.status == "new"]
    assert len(set(new)) == len(new) > 20
    assert {one.origin for one in found} == {"enumerate"}
    drawn = [random_criterion(space, generator(0, slot, "draw")) for slot in range(400)]
    probes = [rungs.probe(criterion) for criterion in drawn if criterion is not None]
    masks = {probe.digest for probe in probes if probe is not None}
    assert len(masks) > 10 and masks <= set(new)


def test_enumeration_is_not_over_when_many_known_masks_come_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = run("enumeration", None, space=small_space())
    monkeypatch.setattr("prunezero.searching.search._MAX_PROPOSALS", 1)
    one_by_one = small_space().model_copy(update={"generation": 1})
    patient, _ = run("enumeration", None, space=one_by_one)
    assert {one.mask for one in patient} == {one.mask for one in whole}


def test_enumeration_goes_from_short_to_long_and_proposes_no_ranking_twice() -> None:
    propose = enumerate_formulas(PlantedRungs(space=small_space()).task)
    criteria = [one.rule.criterion for one in propose(History(), 0) if one is not None]
    texts = [criterion.text for criterion in criteria]
    assert texts[0] == "abs(W)" and "abs(W)*X" in texts[:3]
    assert texts.index("abs(W)*X") < texts.index("abs(W)*sqrt(X)") < texts.index("abs(W)*X**0.75")
    assert len(set(texts)) == len(texts)
    # sqrt(X*W), (X*W)*(X*W) and the like rank as X*W does
    assert "W**2*X**2" not in texts and "sqrt(abs(W))*sqrt(X)" not in texts


def test_enumeration_goes_on_in_the_next_generation_where_it_stopped() -> None:
    task = PlantedRungs(space=small_space()).task
    whole = list(enumerate_formulas(task)(History(), 0))
    propose, history = enumerate_formulas(task), History()
    parts = [
        proposal
        for generation in range(len(whole))
        for proposal in itertools.islice(propose(history, generation), 3)
    ]
    assert len(whole) > 20 and parts == whole


def test_enumeration_builds_on_far_fewer_formulas_than_there_are() -> None:
    space = small_space()
    blocks = Blocks(space)
    criteria = list(blocks)
    written = [0, len(space.terminals)]
    for size in range(2, space.max_complexity + 1):
        pairs = sum(written[left] * written[size - 1 - left] for left in range(1, size - 1))
        written.append(2 * written[size - 1] + 2 * pairs)
    assert blocks.is_complete and blocks.kept == len(criteria)
    assert 10 * blocks.kept < sum(written)


def test_enumeration_ends_before_it_builds_on_more_than_it_may() -> None:
    few = Blocks(small_space(), 8)
    texts = [criterion.text for criterion in few]
    whole = [criterion.text for criterion in Blocks(small_space())]
    assert 8 < len(texts) < len(whole) and texts == whole[: len(texts)]
    assert not few.is_complete


def test_plain_genetic_programming_pays_for_repeats_but_measures_none() -> None:
    found, rungs = run("plain-gp", 3 * POPULATION)
    status = Counter(one.status for one in found)
    assert len(found) == 3 * POPULATION == sum(status.values())
    assert status["known"] > POPULATION
    assert rungs.asked == {"search": status["new"]}
    value_of = {one.mask: one.search_perplexity for one in found if one.status == "new"}
    known = [one for one in found if one.status == "known" and one.mask]
    assert all(one.search_perplexity == value_of[one.mask] for one in known)
    assert all(one.search_perplexity is None for one in found if one.status == "invalid")


def test_plain_genetic_programming_breeds_the_last_generation_and_the_best_so_far() -> None:
    found, _ = run("plain-gp", 4 * POPULATION)
    generations = {one.slot: one.generation for one in found}
    assert {one.origin for one in found if one.generation == 0} == {"random"}
    assert {one.origin for one in found if one.generation > 0} == {"cross", "mutate"}
    for one in found:
        if one.generation:
            before = [
                other
                for other in found
                if other.generation < one.generation and other.search_perplexity is not None
            ]
            best = min(before, key=lambda other: (other.search_perplexity or 0.0, other.slot))
            old = {slot for slot in one.parents if generations[slot] < one.generation - 1}
            assert old <= {best.slot}


def test_optuna_proposes_more_of_the_words_that_had_small_errors() -> None:
    propose, history = suggest(PlantedRungs().task), History()
    shares = []
    for generation in range(3):
        endless = (one for one in propose(history, generation) if one is not None)
        rules = [one.rule for one in itertools.islice(endless, 60)]
        shares.append(np.mean(["X" in rule.criterion.features for rule in rules]))
        for slot, rule in enumerate(rules, start=60 * generation):
            error = 0.1 if "X" in rule.criterion.features else 1.0
            fields: Any = {"mask": str(slot), "status": "new", "layer_error": error}
            history.keep(Candidate(slot, generation, rule.criterion, "optuna", (), **fields))
    assert shares[-1] > shares[0] + 0.2


def test_another_choice_is_another_recipe_and_never_the_parents_own_in_other_words() -> None:
    space = tiny_space(choices={"update": [["none"], ["admm"]], "allocate": ["uniform", "owl"]})
    task = make_task(space, 0.5)
    parent = Candidate(0, 0, PLANTED, "seed", (), "new")
    found = [_chosen(task, parent, ALONE, random.Random(seed)) for seed in range(40)]
    choices = [dict(one.rule.choices) for one in found if one is not None]
    assert len(choices) == 40
    assert {"update": ["admm"]} in choices and {"allocate": "owl"} in choices
    own = task.recipe(parent.rule, "it")
    assert all(task.recipe(Rule(PLANTED, one), "it") != own for one in choices)


def test_a_search_moves_the_shares_of_layers_that_the_model_has() -> None:
    space = tiny_space(ratios=["q_proj", "c_attn", "down_proj"], choices={})
    layers = find_linears(tiny_model().model)
    task = make_task(space, 0.5).on(layers)
    assert task.ratios == ("q_proj", "down_proj")
    parent = Candidate(0, 0, PLANTED, "seed", (), "new", {"compare": "model"})
    tables = []
    for seed in range(40):
        found = _chosen(task, parent, ALONE, random.Random(seed))
        assert found is not None and found.rule.choices["compare"] == "row"
        recipe = task.recipe(found.rule, "it")
        options = recipe.allocate.options
        assert isinstance(options, Table)
        shares = table(layers, 0.5, options, Evidence({}, None, None))
        weights = {layer.name: layer.weight.numel() for layer in layers}
        removed = sum(shares[name] * count for name, count in weights.items())
        assert removed / sum(weights.values()) == pytest.approx(0.5)
        tables.append(found.rule.choices["allocate"]["table"]["ratios"])
        parent = replace(parent, choices=found.rule.choices)
    spread = replace(parent, choices={"allocate": {"owl": {"spread": 0.1}}})
    found = _chosen(task, spread, ALONE, random.Random(0))
    assert found is not None and list(found.rule.choices["allocate"]) == ["table"]
    # A child goes on from its parent's table.
    assert {"q_proj", "down_proj"} == set(tables[-1])
    assert len({str(one) for one in tables}) > 30


def test_no_shares_are_moved_where_a_pattern_fixes_them() -> None:
    space = tiny_space(ratios=["q_proj"])
    layers = find_linears(tiny_model().model)
    assert make_task(space, None, pattern="2:4").on(layers).ratios == ()
    assert make_task(space, 0.7, also="2:4").on(layers).ratios == ()
    assert make_task(space, 0.7, also="0.5").on(layers).ratios == ("q_proj",)


def test_a_search_races_candidates_with_tables(tmp_path: Path) -> None:
    space = tiny_space(ratios=["q_proj", "mlp"], choices={}, chosen=0.6, crossover=0.1)
    found = list(find(tiny_testbed(), space, 0.5, folder=tmp_path / "run", budget=12))
    tables = [one for one in found if "allocate" in one.choices and one.kl is not None]
    assert any(one.origin == "choose" for one in tables)


def test_a_pattern_of_layers_that_cannot_be_read_is_told() -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        tiny_space(ratios=["re:("])
