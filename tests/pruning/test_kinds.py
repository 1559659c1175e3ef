"""Rows of UNITS are whole, and a recipe is held to the row of its unit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from prunezero.errors import CriterionError, RecipeError, SelectionError
from prunezero.formula.criterion import Criterion
from prunezero.formula.domains import DOMAINS, Domain
from prunezero.formula.functions import AXES
from prunezero.models.anatomy.groups import Group, weight_groups
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.edit import Edit
from prunezero.pruning.budget import MEASURES, Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_recipes
from prunezero.pruning.recipes.words import WORDS
from prunezero.pruning.unit_kind import UnitKind
from prunezero.scoring.request import GROUPS
from tests.tiny_models import FAMILIES, tiny_model, tiny_network
from tests.tiny_moe import moe_model

WEIGHT = UNITS["weight"]
# A domain in which rows alone are ranked, and a word may look at nothing but the sum of one.
ROWS = Domain("matrix", ("unit", "part"), ("row",), frozenset({"row_sum"}), is_run_time=False)


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "abs(W)", **choices}
    return validated(Recipe, fields, "mine.yaml")


STORED = [kind for kind in UNITS.values() if not kind.domain.is_run_time]
OF_RUN_TIME = [kind for kind in UNITS.values() if kind.domain.is_run_time]


def whole(kind: UnitKind) -> None:
    """A row says what every kind has to say."""
    assert UNITS[kind.word] is kind and kind.meaning
    assert kind.domain is DOMAINS[kind.domain.name]
    assert set(kind.baselines) <= set(published_recipes())
    for name in kind.baselines:
        assert Recipe.load(name).on_unit(kind.word).unit.word == kind.word
    kind.domain.refuse(Criterion.parse(kind.reference))
    for axes in kind.compare.values():
        assert axes and set(axes) <= set(kind.domain.axes)


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.word)
def test_every_kind_finds_its_groups_its_edit_and_its_baselines(kind: UnitKind) -> None:
    whole(kind)
    assert isinstance(kind.edit, Edit)
    model = moe_model() if kind.word == "expert" else tiny_model("llama")
    groups = kind.groups(find_linears(model.model), model)
    kinds = {"width": {"neuron", "kv_group"}}.get(kind.word, {kind.word})
    assert {group.kind for group in groups} == kinds
    assert all(set(group.cost) <= set(MEASURES) for group in groups)


@pytest.mark.parametrize("kind", OF_RUN_TIME, ids=lambda kind: kind.word)
def test_what_comes_and_goes_while_a_model_runs_is_nothing_to_remove(kind: UnitKind) -> None:
    whole(kind)
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match="nothing is removed from the weights"):
        kind.groups(find_linears(model.model), model)


def test_weights_compete_in_every_group_and_pattern_that_there_is() -> None:
    assert WEIGHT.compare.keys() == {*GROUPS, "N:M"}
    rows = [row for words in WORDS.values() for row in words.values()]
    of_units = [WORDS["update"]["refit"], *(WORDS["allocate"][key] for key in ("slopes", "evolve"))]
    of_units += [row for row in rows if row.chooser or row.in_training]
    assert all((WEIGHT.word in row.units) != (row in of_units) for row in rows)
    assert WEIGHT.axes_of("128 columns", "free") == ("output", "input")
    assert WEIGHT.axes_of("layer", "2:4") == ("input",)


def test_an_unknown_unit_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match="'weights' is no kind of unit; did you mean 'weight'"):
        recipe(unit="weights")
    assert recipe(unit="weight") == recipe()


@pytest.mark.parametrize(
    ("changes", "choices", "said"),
    [
        ({"compare": {"row": ("input",)}}, {"compare": "layer"}, "compare: layer says nothing of"),
        ({"compare": {"row": ("input",)}}, {"pattern": "2:4"}, "pattern: 2:4 says nothing of"),
        ({"domain": ROWS}, {}, "one value per element of unit x part, but one per row is needed"),
        ({"domain": ROWS}, {"criterion": "row_max(W)", "compare": "layer"}, "row_max looks at"),
    ],
)
def test_a_recipe_is_held_to_the_row_of_its_unit(
    changes: dict[str, Any],
    choices: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert recipe(**choices)
    monkeypatch.setitem(UNITS, "weight", replace(WEIGHT, **changes))
    with pytest.raises(RecipeError, match=said):
        recipe(**choices)


def test_a_value_ranks_what_lies_along_an_axis_on_which_it_varies() -> None:
    matrix = DOMAINS["matrix"]
    ranked = {(shape, axis): matrix.ranks(shape, [axis]) for shape in AXES for axis in matrix.axes}
    assert {pair for pair, ranks in ranked.items() if ranks} == {
        ("element", "output"),
        ("element", "input"),
        ("row", "output"),
        ("column", "input"),
    }
    assert not matrix.ranks("row", []) and matrix.ranks("row", matrix.axes)


def test_a_domain_refuses_what_looks_further_than_it_may() -> None:
    ROWS.refuse(Criterion.parse("abs(row_sum(W*G))"))
    for text in ("row_sum(W/layer_max(W))", "row_sum(zscore(W))", "row_sum(W*col_norm(W))"):
        with pytest.raises(CriterionError, match="looks at more of unit x part"):
            ROWS.refuse(Criterion.parse(text))
    with pytest.raises(CriterionError, match="feature H says nothing of unit x part"):
        replace(ROWS, name="unit").refuse(Criterion.parse("row_sum(H)"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_all_matrices_compete_and_others_are_left_to_the_updates(family: str) -> None:
    groups = weight_groups(find_linears(tiny_network(family)))

    def scores_of(group: Group) -> torch.Tensor:
        return group.members[0].linear.weight.abs()

    chosen = WEIGHT.select(groups, scores_of, Budget(0.3), compare="model")
    lowest = max(float(scores_of(group)[~kept].max()) for group, kept in chosen)
    assert lowest <= min(float(scores_of(group)[kept].min()) for group, kept in chosen)
    assert chosen.removed("weights") == chosen.total("weights") * 3 // 10
    for compare, budget in (("row", Budget(0.3)), ("model", Budget(0.5, pattern="2:4"))):
        assert not WEIGHT.select(groups, scores_of, budget, compare=compare).groups
    with pytest.raises(SelectionError, match="removing a weight of .* saves no flops"):
        WEIGHT.select(groups, scores_of, Budget(0.3, measure="flops"), compare="model")


@pytest.mark.parametrize("word", ["0.7", "2:4", "0.2 parameters", "0.5 kv bytes"])
def test_a_budget_is_read_from_the_word_that_it_has(word: str) -> None:
    assert Budget.read(word).word == word


def test_budgets_hold_an_amount_a_measure_and_a_pattern() -> None:
    assert Budget.read("1:4") == Budget(0.75, measure="weights", pattern="1:4")
    assert Budget.read("0.20  units") == Budget(0.2, measure="units")
    for word, said in (
        ("half", "'half' is no budget"),
        ("0.3 flop", "did you mean 'flops'"),
        ("1.5", "below 1 but got 1.5"),
        ("4:2", "N < M"),
    ):
        with pytest.raises(SelectionError, match=said):
            Budget.read(word)


def test_recipes_and_kinds_are_read_without_torch() -> None:
    program = (
        "import sys; from prunezero.pruning.kinds import UNITS;"
        "from prunezero.pruning.recipes.recipe import Recipe; Recipe.load('wanda');"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "False"
