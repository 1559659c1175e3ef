"""What units take in time, by a clock that counts the weights which the model multiplies by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunezero.errors import ModelError, PruneZeroWarning, RecipeError, StatisticsError
from prunezero.formula.criterion import Criterion
from prunezero.models.anatomy.groups import Group, linears_of
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.models.observing.hooks import removing
from prunezero.pruning import requirements
from prunezero.pruning.budget import Budget
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import checked_groups, dense_sums
from prunezero.pruning.timing import with_milliseconds
from tests.models.test_depth import deep_model
from tests.models.test_heads import model_of
from tests.models.test_mlp import noisy
from tests.pruning.test_neurons import group_of
from tests.tiny_models import LAYOUTS, tiny_batches, tiny_model

BATCHES = tiny_batches(4, 16)
# Seconds of the clock for each weight.
PACE = 1e-6
MEASURED = "were measured on this machine"


class WeightClock:
    """Goes on by the weights of each linear map that runs, and stands still otherwise."""

    def __init__(self, model: LanguageModel, *, stalls: int = 0, pace: float = PACE) -> None:
        self.now, self.asked, self.stalls, self.pace = 0.0, 0, stalls, pace
        self.handles = [
            linear.module.register_forward_hook(self.ran) for linear in find_linears(model.model)
        ]

    def ran(self, module: nn.Module, inputs: object, output: object) -> None:
        assert isinstance(module.weight, torch.Tensor)
        self.now += self.pace * module.weight.numel()

    def __call__(self) -> float:
        self.asked += 1
        if self.stalls and self.asked % self.stalls == 0:
            # Another program has the processor for a while.
            self.now += 1.0
        return self.now


def timed(
    model: LanguageModel, word: str, *, stalls: int = 0, pace: float = PACE
) -> tuple[list[Group], WeightClock]:
    groups = UNITS[word].groups(find_linears(model.model), model)
    clock = WeightClock(model, stalls=stalls, pace=pace)
    with removing(clock.handles), pytest.warns(PruneZeroWarning, match=MEASURED):
        return with_milliseconds(groups, model, clock=clock), clock


def milliseconds(groups: list[Group]) -> list[float]:
    return [group.cost_of("milliseconds") for group in groups]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unit_takes_the_time_of_its_weights_and_the_model_is_what_it_was(layout: str) -> None:
    model = noisy(tiny_model(layout))
    before = model.model(BATCHES[:1]).logits
    groups, _ = timed(model, "width")
    wanted = [1000 * PACE * group.cost["weights"] for group in groups]
    assert milliseconds(groups) == pytest.approx(wanted, rel=1e-9)
    assert torch.equal(model.model(BATCHES[:1]).logits, before)


def test_a_head_takes_the_time_of_its_weights() -> None:
    groups, _ = timed(model_of("llama"), "head")
    wanted = [1000 * PACE * group.cost["weights"] for group in groups]
    assert milliseconds(groups) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("word", ["attention", "mlp", "block", "layer"])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "opt"])
def test_a_part_of_the_depth_takes_the_time_of_all_its_matrices(layout: str, word: str) -> None:
    groups, _ = timed(deep_model(layout), word)
    wanted = [1000 * PACE * group.cost["weights"] for group in groups]
    assert milliseconds(groups) == pytest.approx(wanted, rel=1e-9)


def test_groups_that_look_alike_are_timed_once_at_four_widths_and_stalls_do_not_count() -> None:
    plain, clock = timed(noisy(tiny_model("llama")), "neuron")
    # Nine turns at four widths, each of a call before and one that counts, seen at both ends.
    assert clock.asked == 9 * 4 * 2 * 2
    # Beside heads, which are two: all of them and one.
    assert timed(noisy(tiny_model("llama", seed=1)), "width")[1].asked == 9 * (4 + 2) * 2 * 2
    disturbed, clock = timed(noisy(tiny_model("llama", seed=2)), "neuron", stalls=11)
    assert clock.now > 10
    assert milliseconds(disturbed) == pytest.approx(milliseconds(plain), rel=1e-9)


def never() -> float:
    raise AssertionError("nothing is left to measure")


def test_what_was_measured_is_read_again_by_the_same_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = timed(noisy(tiny_model("llama")), "width")
    other = noisy(tiny_model("llama"))
    groups = UNITS["neuron"].groups(find_linears(other.model), other)
    again = with_milliseconds(groups, other, clock=never)
    assert milliseconds(again) == milliseconds(first)[1::2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    faster, _ = timed(noisy(tiny_model("llama")), "neuron", pace=PACE / 2)
    assert milliseconds(faster) == pytest.approx([one / 2 for one in milliseconds(again)])
    assert milliseconds(with_milliseconds(groups, other, clock=never)) == milliseconds(faster)


def test_a_damaged_or_missing_cache_is_measured_anew(tmp_path: Path) -> None:
    def measured() -> list[float]:
        model = noisy(tiny_model("llama"))
        groups = UNITS["neuron"].groups(find_linears(model.model), model)
        return milliseconds(with_milliseconds(groups, model, cache=tmp_path, clock=clock(model)))

    clock: Callable[[LanguageModel], Callable[[], float]] = WeightClock
    with pytest.warns(PruneZeroWarning, match=MEASURED):
        known = measured()
    (path,) = (tmp_path / "milliseconds").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.", b"1.", 1))
    with pytest.warns(PruneZeroWarning, match="measured") as told:
        assert measured() == known
    assert sum("is damaged" in str(one.message) for one in told) == 1
    assert path.read_bytes() == whole
    clock = lambda model: never  # noqa: E731
    assert measured() == known
    # Where nothing can be kept, a warning says so, and the numbers are the same.
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file in the place of the folder")
    clock = WeightClock
    with pytest.warns(PruneZeroWarning, match="measured") as told:
        assert measured() == known
    assert sum("are not kept in" in str(one.message) for one in told) == 1


def test_units_that_take_no_time_are_refused() -> None:
    model = noisy(tiny_model("llama"))
    groups = UNITS["neuron"].groups(find_linears(model.model), model)
    with pytest.raises(ModelError, match="cannot be told from noise .* 0 at 64, 0 at 48, 0 at 32"):
        with_milliseconds(groups, model, clock=lambda: 0.0)


def recipe(**choices: object) -> Recipe:
    fields = {"name": "mine", "criterion": "M2", "unit": "width", "compare": "model"}
    return validated(Recipe, {**fields, **choices}, "mine.yaml")


def pruned(model: LanguageModel, chosen: Recipe, share: float) -> Outcome:
    layers = linears_of(checked_groups(model, chosen, share))
    known = calibrate(model, BATCHES, layers, dense_sums([chosen]))
    return prune(model, chosen, share, statistics=known, windows=BATCHES)


@pytest.fixture
def by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prunings take their times from a clock that counts weights."""

    def measured(groups: list[Group], model: LanguageModel) -> list[Group]:
        clock = WeightClock(model)
        with removing(clock.handles):
            return with_milliseconds(groups, model, clock=clock)

    monkeypatch.setattr(requirements, "with_milliseconds", measured)


@pytest.mark.filterwarnings("ignore:milliseconds of .* were measured")
@pytest.mark.parametrize(
    ("compare", "allocate"), [("model", "uniform"), ("group", "uniform"), ("group", "slopes")]
)
def test_a_budget_of_time_takes_what_one_of_flops_takes_where_weights_make_the_time(
    compare: str, allocate: str, by_weights: None
) -> None:
    for share in (0.13, 0.3, 0.5):
        kept = [
            pruned(
                noisy(tiny_model("llama")),
                recipe(unit={"width": {"measure": word}}, compare=compare, allocate=allocate),
                share,
            )
            for word in ("flops", "milliseconds")
        ]
        for one, other in zip(*(outcome.selection.kept for outcome in kept), strict=True):
            assert torch.equal(one, other)
        assert kept[1].sparsity_reached == pytest.approx(kept[0].sparsity_reached)
        assert kept[1].measure == "milliseconds"


@pytest.mark.filterwarnings("ignore:milliseconds of .* were measured")
def test_gain_for_time_orders_units_as_gain_for_weights_does(by_weights: None) -> None:
    by_time, by_flops = (
        pruned(noisy(tiny_model("llama")), recipe(criterion=formula), 0.3).selection.kept
        for formula in ("M2/MS", "M2/FLOPS")
    )
    assert all(torch.equal(one, other) for one, other in zip(by_time, by_flops, strict=True))
    chosen = recipe(criterion="BI/MS", unit={"mlp": {"measure": "milliseconds"}})
    outcome = pruned(deep_model("llama"), chosen, 0.5)
    plain = pruned(deep_model("llama"), recipe(criterion="BI/FLOPS", unit="mlp"), 0.5)
    assert outcome.selection.removed() == plain.selection.removed() > 0
    assert all(map(torch.equal, outcome.selection.kept, plain.selection.kept))


def test_an_allowance_of_time_is_no_whole_number_and_of_things_it_is() -> None:
    assert Budget(0.3, measure="flops").allowance(9.0) == 2
    assert Budget(0.3, measure="milliseconds").allowance(0.09) == pytest.approx(0.027)
    # A tenth ten times: no sum of times may lose a unit to rounding.
    total = sum([0.1] * 10)
    assert Budget(0.5, measure="milliseconds").allowance(total) >= sum([0.1] * 5)


def test_time_that_nobody_measured_is_refused_by_name() -> None:
    criterion = Criterion.parse("MS")
    neurons, chosen = UNITS["neuron"], recipe(criterion="MS", unit="neuron", compare="group")
    with pytest.raises(StatisticsError, match="how many milliseconds a unit of mlp takes"):
        neurons.scores(
            group_of("mlp", 12, 7), criterion, {}, damping=0.01, options=chosen.unit.options
        )
    model = deep_model("llama")
    group = UNITS["mlp"].groups(find_linears(model.model), model)[0]
    chosen = recipe(criterion="MS", unit="mlp")
    with pytest.raises(StatisticsError, match=r"how many milliseconds model\.layers\.0\.mlp takes"):
        UNITS["mlp"].scores(group, criterion, {}, damping=0.01, options=chosen.unit.options)
    with pytest.raises(RecipeError, match="feature MS is for unit neuron, head"):
        recipe(criterion="A2/MS", unit="channel", compare="group")
