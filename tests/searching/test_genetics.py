"""Every child is a formula of its space, and every space can be searched."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.formula import Criterion
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.task import Task
from prunezero.searching.history import History
from prunezero.searching.spaces.space import SearchSpace, search_spaces
from prunezero.searching.strategies.catalogue import STRATEGIES
from prunezero.searching.strategies.evolution import Proposal, _chosen, _moved
from prunezero.searching.strategies.genetics import (
    as_seen,
    cross,
    mutate,
    random_criterion,
    tunable,
)
from prunezero.searching.strategies.parents import ParentPool
from tests.searching.testbed import bare_task, tiny_space


def test_the_folder_holds_the_three_spaces() -> None:
    assert {"formulas", "pruner_zero", "tiny"} <= set(search_spaces())


@pytest.mark.parametrize("name", sorted(search_spaces()))
def test_children_are_formulas_of_the_space(name: str) -> None:
    space = SearchSpace.load(name)
    rng = random.Random(0)
    fresh = [random_criterion(space, rng) for _ in range(60)]
    pool = [criterion for criterion in fresh if criterion is not None]
    assert len(pool) > 50
    children = [mutate(rng.choice(pool), space, rng) for _ in range(60)]
    children += [cross(rng.choice(pool), rng.choice(pool), space, rng) for _ in range(60)]
    found = [criterion for criterion in [*pool, *children] if criterion is not None]
    assert len(found) > 150
    for criterion in found:
        assert space.holds(criterion)
        assert set(criterion.features) <= set(space.features)
        assert Criterion.parse(criterion.text) == criterion
        # What no mask can see was taken away before anything was computed.
        assert as_seen(criterion, space) == criterion
    assert len({criterion.text for criterion in found}) > 40


# Nobody else to take a formula from.
ALONE = ParentPool((), [], [], 1)
# With factors and summands that are the same in each row, and others of a whole layer.
DRESSED = ("abs(W)*X/R1", "abs(W)*X + R1", "abs(W)*X*matrix_norm(W)", "abs(W)*X**0.5*exp(R2)")


def task_of(pattern: str = "free", also: tuple[str, ...] = (), seed: int = 0, **space: Any) -> Task:
    return bare_task(tiny_space(**space), pattern=pattern, also=also, seed=seed)


def parent_of(text: str, slot: int = 0, **choices: str) -> Candidate:
    fields: Any = {"choices": choices, "mask": str(slot), "layer_error": 0.1 + slot}
    return Candidate(slot, 0, Criterion.parse(text), "seed", (), "new", **fields)


def bred(task: Task, strategy: str = "evolution", **choices: str) -> list[Proposal]:
    """Children of formulas in row dress, all under the same choices."""
    history = History()
    for slot, text in enumerate(DRESSED):
        history.keep(parent_of(text, slot, **choices))
    history.slot = len(DRESSED)
    found = []
    for proposal in islice(STRATEGIES[strategy].start(task)(history, 1), 80):
        history.slot += 1
        if proposal is not None and proposal.origin != "choose":
            found.append(proposal)
    assert len(found) > 30
    return found


def shows_all_to(group: str, proposals: list[Proposal], space: SearchSpace) -> bool:
    """Whether nothing is left in any formula that no mask sees where this group competes."""
    formulas = [one.rule.criterion for one in proposals]
    return all(as_seen(formula, space, group) == formula for formula in formulas)


def test_who_competes_is_what_the_rule_says_unless_every_budget_is_a_pattern() -> None:
    free, pattern = task_of(), task_of("2:4")
    mixed = task_of("2:4", also=("0.7",))
    assert free.space.widest_group == "model" and free.space.compare == "row"
    assert free.competing({}) == "row" and free.competing({"compare": "layer"}) == "layer"
    assert pattern.competing({"compare": "model"}) == "row"
    assert mixed.competing({"compare": "model"}) == "model"


PATTERN = task_of("2:4", compare="model", fresh=0.5)


@pytest.mark.parametrize(
    ("strategy", "task", "group"),
    [
        ("evolution", PATTERN, "row"),
        ("random", PATTERN, "row"),
        ("enumeration", PATTERN, "row"),
        ("optuna", PATTERN, "row"),
        ("evolution", task_of("2:4", also=("3:4",), compare="layer"), "row"),
        ("evolution", task_of(fresh=0.5), "row"),
        ("evolution", task_of(compare="layer", fresh=0.5), "layer"),
    ],
)
def test_what_no_mask_of_the_task_sees_is_taken_away(strategy: str, task: Task, group: str) -> None:
    assert shows_all_to(group, bred(task, strategy), task.space)


def test_a_child_shows_all_to_the_group_that_its_mother_chose() -> None:
    task = task_of(compare="layer", fresh=0)
    assert shows_all_to("row", bred(task, compare="row"), task.space)
    among_layers = bred(task, compare="model")
    assert shows_all_to("model", among_layers, task.space)
    # there a factor of each row is seen, and stays
    assert not shows_all_to("row", among_layers, task.space)
    assert {one.rule.choices["compare"] for one in among_layers} == {"model"}


def test_a_rule_that_changes_who_competes_loses_what_is_no_longer_seen() -> None:
    task = task_of(compare="row")
    parent = parent_of("abs(W)*X*matrix_norm(W)/R1", compare="model")
    found = [_chosen(task, parent, ALONE, random.Random(seed)) for seed in range(30)]
    rules = {one.rule.choices["compare"]: one.rule.criterion.text for one in found if one}
    assert rules == {"row": "abs(W)*X", "layer": "abs(W)*X/R1"}
    # the other way round, what was written for a row is right as it is
    bare = parent_of("abs(W)*X")
    found = [_chosen(task, bare, ALONE, random.Random(seed)) for seed in range(30)]
    rules = {one.rule.choices["compare"]: one.rule.criterion.text for one in found if one}
    assert rules == {"layer": "abs(W)*X", "model": "abs(W)*X"}


def test_a_table_of_shares_takes_a_rule_out_of_the_competition_of_all_layers() -> None:
    task = replace(bare_task(tiny_space()), ratios=("q_proj",))
    parent = parent_of("abs(W)*X/R1", compare="model")
    moved = _moved(task, parent, random.Random(0))
    assert moved is not None and moved.rule.choices["compare"] == "row"
    assert moved.rule.criterion.text == "abs(W)*X"


def test_other_choices_leave_the_formula_as_it_was_written() -> None:
    task = task_of(choices={"update": [["none"], ["admm"]]}, compare="row")
    parent = parent_of("abs(W)*X/R1")
    found = [_chosen(task, parent, ALONE, random.Random(seed)) for seed in range(5)]
    assert {one.rule.criterion.text for one in found if one} == {parent.criterion.text}


def test_tuning_keeps_a_formula_at_its_own_numbers_and_moves_it_at_others() -> None:
    for text in ("abs(W)*(100*G1 + X)", "abs(W)*sqrt(X)", "W**2*minmax(G)", "abs(W)*X"):
        criterion = Criterion.parse(text)
        filled, values = tunable(criterion)
        assert Criterion.from_sympy(filled(values)) == criterion
        assert Criterion.from_sympy(filled([1.5 * value for value in values])) != criterion


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"operators": ["ad"]}, "did you mean 'add'"),
        ({"terminals": ["X", "R1"]}, "none varies by weight"),
        ({"compare": "rows"}, "did you mean 'row'"),
        ({"exponents": []}, "'power' needs some"),
        ({"exponents": [100]}, "exponents: an exponent is 100"),
        ({"exponents": [0]}, "and not 0"),
        ({"constants": [1e9]}, "constants: a constant .* too large"),
        ({"crossover": 2}, "crossover"),
        ({"budget": 3}, "not a known key"),
    ],
)
def test_a_faulty_space_is_refused_by_key(change: dict[str, object], complaint: str) -> None:
    from prunezero.pruning.recipes.documents import validated

    fields = SearchSpace.load("tiny").model_dump(mode="json") | change
    with pytest.raises(RecipeError, match=complaint):
        validated(SearchSpace, fields, "mine.yaml")


def test_an_unknown_space_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'formulas'"):
        SearchSpace.load("formula")
