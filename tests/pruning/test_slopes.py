"""SLOPE is how far the model moves when the first units of a place go, measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prunezero.errors import PruneZeroError, PruneZeroWarning
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.evaluation import dense_reference, evaluate
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning import slopes as slopes_module
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.slopes import with_slopes
from prunezero.pruning.trials import Trials
from prunezero.pruning.unit_allocation import first_steps
from prunezero.scoring.statistics import Statistics
from tests.tiny_models import VOCABULARY, tiny_model

WINDOWS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(3))


def recipe_of(**fields: object) -> Recipe:
    told = {"name": "it", "criterion": "SLOPE*M2", "unit": "width", "compare": "model"}
    return Recipe.model_validate({**told, **fields})


def seen(model: LanguageModel) -> dict[str, Statistics]:
    return calibrate(
        model, WINDOWS, find_linears(model.model), dense_sums([recipe_of(update="refit")])
    )


def found(model: LanguageModel, known: dict[str, Statistics], cache: Path) -> list[Group]:
    groups = UNITS["width"].groups(find_linears(model.model), model)
    return with_slopes(groups, model, "width", known, WINDOWS, cache=cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_slope_is_the_distance_without_the_first_step_by_the_units_that_went(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    known = seen(model)
    groups = found(model, known, tmp_path)
    counts = first_steps(groups, "parameters")
    reference = dense_reference(model, WINDOWS[:4])
    for group in groups:
        linear, count = group.reader.linear, counts[group.name]
        dense = linear.weight.detach().clone()
        # By hand: M2 from gradients of a mask of ones, and least squares on the columns that stay.
        scores = by_autograd(model, group)
        gone = torch.zeros(group.units, dtype=torch.bool)
        gone[scores.argsort(stable=True)[:count]] = True
        columns = gone.repeat_interleave(group.reader.width)
        gram = known[linear.name].sums["gram"].double()
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        upper = torch.linalg.cholesky(damped, upper=True)
        wanted = upper @ dense.double().T
        mended = torch.linalg.lstsq(upper[:, ~columns], wanted).solution.T
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, ~columns] = mended.float()
        moved = evaluate(model, WINDOWS[:4], reference=reference).kl
        with torch.no_grad():
            linear.weight.copy_(dense)
        assert moved is not None
        assert group.cost_of("slope") * count == pytest.approx(moved, rel=2e-3, abs=2e-8)


def by_autograd(model: LanguageModel, group: Group) -> torch.Tensor:
    """The sum over sequences of squared gradients of a mask on each unit."""
    linear, width = group.reader.linear, group.reader.width
    total = torch.zeros(group.units, dtype=torch.float64)
    for ids in WINDOWS:
        mask = torch.ones(group.units, requires_grad=True)
        handle = linear.module.register_forward_pre_hook(
            lambda _, args, mask=mask: (args[0] * mask.repeat_interleave(width),)
        )
        with torch.enable_grad():
            loss = model.model(ids[None], labels=ids[None]).loss
            (gradient,) = torch.autograd.grad(loss, mask)
        handle.remove()
        total += gradient.double().square()
    return total


def test_what_was_measured_is_read_and_what_is_damaged_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    known = seen(model)
    first = [group.cost_of("slope") for group in found(model, known, tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(slopes_module, "Trials", None)
        assert [group.cost_of("slope") for group in found(model, known, tmp_path)] == first
    (path,) = (tmp_path / "slopes").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(PruneZeroWarning, match="damaged"):
        assert [group.cost_of("slope") for group in found(model, known, tmp_path)] == first


@pytest.mark.parametrize("multiple_of", [1, 32])
def test_what_a_recipe_measures_does_not_depend_on_what_others_left_in_the_cache(
    multiple_of: int, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    known = seen(model)
    unit = {"neuron": {"normalise": "slope", "multiple_of": multiple_of}}
    options = recipe_of(criterion="M2", unit=unit).unit.options
    (own, others), row = (tmp_path / "own", tmp_path / "others"), UNITS["neuron"]
    linears = find_linears(model.model)
    # Steps of other recipes: of another multiple, and of one block pruned by itself.
    for groups in (row.groups(linears, model), row.groups(linears, model)[:1]):
        with_slopes(groups, model, "neuron", known, WINDOWS, cache=others)
    groups = row.groups(linears, model, options)
    found = [
        with_slopes(groups, model, "neuron", known, WINDOWS, cache=one) for one in (own, others)
    ]
    assert found[0] == found[1]
    # Sixteenths of an MLP of 64, as far as the multiple allows them.
    assert [group.first for group in found[0]] == [max(4, multiple_of)] * 2
    for group in found[0]:
        scores = scores_of(group, recipe_of(criterion="M2", unit=unit), known)
        assert len(set(scores.tolist())) > 32


def test_a_later_stage_measures_the_model_that_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dense = found(model, seen(model), tmp_path)
    with torch.no_grad():
        dense[1].reader.linear.weight[:, :32] = 0
    left = seen(model)
    assert found(model, left, tmp_path) == found(model, left, tmp_path / "empty")


def test_formulas_of_slopes_prune_and_need_calibration_text() -> None:
    model = tiny_model("llama")
    known = seen(model)
    dense = [linear.weight.detach().clone() for linear in find_linears(model.model)]
    outcome = prune(model, recipe_of(update="refit"), 0.3, statistics=known, windows=WINDOWS)
    assert outcome.selection.removed("parameters") > 0
    for linear, weight in zip(find_linears(model.model), dense, strict=True):
        with torch.no_grad():
            linear.weight.copy_(weight)
    with pytest.raises(PruneZeroError, match="feature SLOPE needs calibration text"):
        prune(model, recipe_of(), 0.3, statistics=known)


@pytest.mark.parametrize("criterion", ["SLOPE*A", "A"])
def test_slopes_of_the_dense_model_come_before_sequential_statistics(criterion: str) -> None:
    model, unit = tiny_model("llama"), {"neuron": {"normalise": "slope"}}
    fields = {"criterion": criterion, "unit": unit, "compare": "group"}
    chosen = recipe_of(**fields, statistics="sequential")
    known = calibrate(model, WINDOWS, find_linears(model.model), dense_sums([chosen]))
    outcome = prune(model, chosen, 0.5, statistics=known, windows=WINDOWS)
    assert [int(kept.sum()) for kept in outcome.selection.kept] == [32, 32]


def test_a_slope_that_nobody_measured_is_told() -> None:
    model = tiny_model("llama")
    (group, *_) = UNITS["width"].groups(find_linears(model.model), model)
    chosen = recipe_of()
    with pytest.raises(PruneZeroError, match="how far the model moves for a unit of .* not known"):
        UNITS["width"].scores(
            group, chosen.criterion, seen(model), damping=0.01, options=chosen.unit.options
        )


def test_normalised_by_slope_the_first_units_of_every_place_sum_to_what_was_measured(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    known = seen(model)
    chosen = recipe_of(criterion="M2", unit={"width": {"normalise": "slope"}})
    plain = recipe_of(criterion="M2")
    for group in found(model, known, tmp_path):
        scores, before = (scores_of(group, one, known) for one in (chosen, plain))
        assert scores.argsort(stable=True).tolist() == before.argsort(stable=True).tolist()
        lowest = float(scores.double().sort().values[: group.first].sum())
        moved = group.cost["slope"] * group.first
        assert lowest * group.cost["parameters"] == pytest.approx(moved, rel=1e-5)


def test_normalised_by_slope_sizes_of_scores_do_not_matter() -> None:
    model = tiny_model("llama")
    known = seen(model)
    dense = [linear.weight.detach().clone() for linear in find_linears(model.model)]
    kept = []
    for criterion in ("M2", "100*M2"):
        fields = {"criterion": criterion, "unit": {"width": {"normalise": "slope"}}}
        chosen = recipe_of(**fields, update="refit")
        assert chosen.signal == "oracle"
        outcome = prune(model, chosen, 0.3, statistics=known, windows=WINDOWS)
        kept.append(torch.cat([one.flatten() for one in outcome.selection.kept]))
        for linear, weight in zip(find_linears(model.model), dense, strict=True):
            with torch.no_grad():
                linear.weight.copy_(weight)
    assert kept[0].equal(kept[1])
    with pytest.raises(PruneZeroError, match="feature SLOPE needs calibration text"):
        prune(model, chosen, 0.3, statistics=known)


@pytest.mark.parametrize("criterion", ["M2-10", "-M2"])
def test_scores_whose_lowest_are_nothing_are_not_normalised_by_slope(
    criterion: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    known = seen(model)
    chosen = recipe_of(criterion=criterion, unit={"width": {"normalise": "slope"}})
    (group, *_) = found(model, known, tmp_path)
    with pytest.raises(PruneZeroError, match="cannot be normalised by slope"):
        scores_of(group, chosen, known)


def scores_of(group: Group, recipe: Recipe, known: dict[str, Statistics]) -> torch.Tensor:
    return recipe.unit.row.scores(
        group, recipe.criterion, known, damping=0.01, options=recipe.unit.options
    )


def test_a_place_smaller_than_a_step_is_measured_without_one_unit(tmp_path: Path) -> None:
    # A key-value group costs as much as 16 neurons.
    model = tiny_model("llama", intermediate_size=6)
    measured = found(model, seen(model), tmp_path)
    assert [group.first for group in measured] == [1] * 4
    few = [replace(group, least=group.units) for group in measured]
    assert set(first_steps(few, "parameters").values()) == {0}


@pytest.mark.parametrize("noise", [-1e-12, 0.0])
def test_units_of_a_place_keep_their_order_where_the_distance_is_noise(
    noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    known = seen(model)
    monkeypatch.setattr(Trials, "kl", lambda *_: noise)
    chosen = recipe_of(criterion="M2", unit={"width": {"normalise": "slope"}})
    plain = recipe_of(criterion="M2")
    for group in found(model, known, tmp_path):
        order, before = (scores_of(group, one, known).argsort() for one in (chosen, plain))
        assert order.equal(before)


def test_steps_of_a_schedule_would_look_for_first_units_that_are_gone() -> None:
    schedule = {"iterative": {"steps": 2, "anew": True}}
    with pytest.raises(ValueError, match="units that go first, which later steps of schedule"):
        recipe_of(unit={"width": {"normalise": "slope"}}, schedule=schedule)
    assert recipe_of(schedule=schedule).looks_anew
