"""Units that go while low-rank factors train, against autograd and the equations of LoRAPrune."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import PruneZeroWarning, RecipeError, ScoreError, StatisticsError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.models.observing.calibration import calibrate
from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning import staging
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import StagedRecipe
from prunezero.pruning.recipes.training_options import Lora
from prunezero.pruning.recipes.word_options import WhileTraining
from prunezero.pruning.recovery import gradual, training
from prunezero.pruning.recovery.factors import Factors, train_factors
from prunezero.pruning.recovery.gradual import GradualRemoval
from prunezero.pruning.recovery.objectives import NextToken
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.schedule import part_gone
from prunezero.pruning.testbed import with_choices
from prunezero.scoring.feature_values import feature
from prunezero.scoring.statistics import Statistics
from tests.models.test_depth import deep_model
from tests.pruning.trained import (
    TEXT,
    StopError,
    digest,
    knowing_model,
    logits_of,
    recipe,
    stop_after,
)
from tests.tiny_models import tiny_batches, tiny_network, tiny_tokenizer

PUBLISHED = Recipe.load("lora_prune")
STEPS = 10
LORA: dict[str, Any] = {"lora": {"steps": STEPS, "batch": 2, "learning_rate": 0.02, "rank": 2}}


def chosen(**choices: Any) -> Recipe:
    """The published criterion on units of all blocks, with a short training."""
    usual: dict[str, Any] = {
        "criterion": PUBLISHED.criterion.text,
        "unit": {"width": {"members": "all"}},
        "compare": "group",
        "schedule": {"while_training": {"every": 2}},
        "recover": LORA,
    }
    return recipe(**{**usual, **choices})


# The estimate


def in_training(family: str) -> tuple[LanguageModel, Any]:
    """A tiny model whose factors are random, and what makes it train."""
    model = wrap_model(tiny_network(family), tiny_tokenizer(), name=family)
    options = Lora.model_validate({"rank": 3, "alpha": 6.0})
    return model, train_factors(model.model, find_linears(model.model), options)


def with_gradients(model: LanguageModel, factors: Factors, *, is_first: bool) -> None:
    for place, master in enumerate(factors.masters):
        generator = torch.Generator().manual_seed(place)
        # Of a pair the second is B, which is zero when a training begins.
        size = 0.0 if is_first and place % 2 else 0.2
        master.detach().copy_(size * torch.randn(master.shape, generator=generator))
    with torch.enable_grad():
        sequence_loss(model.model, TEXT[:1]).backward()  # type: ignore[no-untyped-call]


def dense_gradients(family: str, changes: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Gradients [out, in] of the weights themselves, with the changes merged, by autograd."""
    network = tiny_network(family)
    layers = find_linears(network)
    for layer in layers:
        layer.weight.add_(changes[layer.name])
    weights: list[Any] = [layer.module.weight for layer in layers]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        found = torch.autograd.grad(sequence_loss(network, TEXT[:1]), weights)
    is_turned = family == "gpt2"
    return {
        layer.name: (gradient.T if is_turned else gradient).double().numpy()
        for layer, gradient in zip(layers, found, strict=True)
    }


def estimate(seen: dict[str, Tensor], weight: Tensor, eta: float) -> np.ndarray:
    statistics = Statistics(0, 0, {})
    statistics.of_training = {**seen, "eta": eta}
    return feature("G_lora", weight, statistics).double().numpy()


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_estimate_is_the_gradient_of_the_weight_as_far_as_the_factors_can_follow_it(
    family: str, is_first: bool
) -> None:
    model, made = in_training(family)
    scale = 6.0 / 3
    with made as factors:
        with_gradients(model, factors, is_first=is_first)
        layers = find_linears(tiny_network(family))
        seen = {layer.name: factors.seen(layer.name) for layer in layers}
        changes = {name: one["change"].clone() for name, one in seen.items()}
        for name, gradient in dense_gradients(family, changes).items():
            first, second = (seen[name][key].double().numpy() for key in ("factor_a", "factor_b"))
            np.testing.assert_allclose(changes[name], scale * second @ first, atol=1e-6)
            weight = next(layer.weight for layer in layers if layer.name == name)
            found = estimate(seen[name], weight, 0.0)
            # dL/dB = s G A^T and dL/dA = s B^T G for the scale s.
            expected = scale * (gradient @ first.T @ first + second @ second.T @ gradient)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
            statistics = Statistics(0, 0, {})
            statistics.of_training = seen[name]
            value = feature("W_lora", weight, statistics).numpy()
            np.testing.assert_allclose(value, weight.numpy() + changes[name].numpy(), atol=1e-6)


def test_a_step_of_gradient_descent_moves_the_weight_by_the_estimate_times_rate_and_scale() -> None:
    model, made = in_training("llama")
    with made as factors:
        with_gradients(model, factors, is_first=False)
        layer = find_linears(tiny_network("llama"))[0]
        seen = {key: value.double() for key, value in factors.seen(layer.name).items()}
    errors = []
    for rate in (1e-1, 1e-2, 1e-3):
        first = seen["factor_a"] - rate * seen["gradient_a"]
        second = seen["factor_b"] - rate * seen["gradient_b"]
        moved = ((seen["factor_b"] @ seen["factor_a"] - second @ first) / rate).numpy()
        np.testing.assert_allclose(estimate(seen, layer.weight, rate), moved, rtol=1e-4, atol=1e-6)
        errors.append(np.abs(estimate(seen, layer.weight, 0.0) - moved).max())
    # What the first order leaves out shrinks with the rate.
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
    assert errors[2] == pytest.approx(errors[0] / 100, rel=0.2)


# The scores


Seen = list[dict[str, dict[str, np.ndarray]]]


@pytest.fixture
def steps_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Seen, list[GradualRemoval]]]:
    """What a training hands to its follower at each step, as numpy, and the follower."""
    seen: Seen = []
    removals: list[GradualRemoval] = []
    plain = GradualRemoval.see

    def see(self: GradualRemoval, trained: Factors) -> None:
        step = {}
        for name, module in trained.modules.items():
            parts = {key: one.double().numpy().copy() for key, one in trained.seen(name).items()}
            step[name] = parts | {"weight": module.get_base_layer().weight.double().numpy().copy()}
        seen.append(step)
        removals[:] = [self]
        plain(self, trained)

    monkeypatch.setattr(GradualRemoval, "see", see)
    yield seen, removals


def slow_scores(step: dict[str, dict[str, np.ndarray]], block: int, eta: float) -> dict[str, Any]:
    """Scores of a block's key-value groups and neurons at one step, from the equations."""

    def table(name: str) -> np.ndarray:
        (part,) = (part for key, part in step.items() if f"layers.{block}." in key and name in key)
        gradient = part["gradient_b"] @ part["factor_a"] + part["factor_b"] @ part["gradient_a"]
        gradient -= eta * part["gradient_b"] @ part["gradient_a"]
        return np.abs(gradient * (part["weight"] + part["change"]))

    def summed(values: np.ndarray, units: int) -> np.ndarray:
        """Rows of each unit added up, over the length of all."""
        size = len(values) // units
        sums = [values[unit * size : (unit + 1) * size].sum() for unit in range(units)]
        return np.array(sums) / math.sqrt(sum(one**2 for one in sums))

    heads = sum(summed(table(name), 2) for name in ("q_proj", "k_proj", "v_proj"))
    neurons = sum(summed(table(name), 64) for name in ("gate_proj", "up_proj"))
    return {
        "kv_group": heads + summed(table("o_proj").T, 2),
        "neuron": neurons + summed(table("down_proj").T, 64),
    }


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_averages_of_scores_are_those_of_the_equations(
    eta: float, steps_seen: tuple[Seen, list[GradualRemoval]]
) -> None:
    seen, removals = steps_seen
    schedule = {"while_training": {"every": 2, "momentum": 0.75, "eta": eta}}
    outcome = prune(knowing_model(), chosen(schedule=schedule), 0.5, windows=TEXT)
    assert len(seen) == STEPS
    (removal,) = removals
    expected: dict[tuple[str, int], Any] = {}
    for block in (0, 1):
        for step in seen:
            for kind, scores in slow_scores(step, block, eta).items():
                before = expected.get((kind, block), 0.0)
                expected[kind, block] = 0.75 * before + 0.25 * scores
    for group, average in zip(removal.groups, removal.averages, strict=True):
        np.testing.assert_allclose(average, expected[group.kind, group.block], rtol=1e-4)
    # Gone units have weights of zero since then, so that their averages are the lowest anyway.
    for group, kept in outcome.selection:
        scores = expected[group.kind, group.block]
        assert scores[kept.numpy()].min() > scores[~kept.numpy()].max()


# What goes, and when


def test_zeros_grow_by_the_cubic_schedule_until_exactly_the_share_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: list[int] = []
    plain = GradualRemoval.act

    def act(self: GradualRemoval, trained: Factors, done: int, total: int) -> None:
        plain(self, trained, done, total)
        masks = trained.modules["model.layers.0.mlp.down_proj"].is_removed
        assert torch.equal(masks, masks[:1].expand_as(masks))
        gone.append(int(masks[0].sum()))

    monkeypatch.setattr(GradualRemoval, "act", act)
    numbers = {"steps": 20, "batch": 1, "learning_rate": 0.01}
    rules = chosen(
        unit={"neuron": {"members": "all"}},
        schedule={"while_training": {"every": 4}},
        recover={"lora": numbers},
    )
    outcome = prune(knowing_model(), rules, 0.5, windows=TEXT)
    # Of 64 neurons 32 go; steps 2 and 18 of 20 are 10 % and 90 %.
    expected, now = [], 0
    for done in range(1, 21):
        if done in (4, 8, 12, 16, 18):
            now = math.floor(32 * (1 - (1 - Fraction(done - 2, 16)) ** 3))
        expected.append(now)
    assert gone == expected and gone[-1] == 32 and gone[0] == 0
    assert outcome.sparsity_reached == 0.5


def test_the_part_that_is_gone_rises_from_begin_to_end() -> None:
    options = WhileTraining(begin=0.25, end=0.75)
    parts = [part_gone(done, 8, options) for done in range(9)]
    assert parts == [0, 0, 0, Fraction(37, 64), Fraction(7, 8), Fraction(63, 64), 1, 1, 1]
    straight = WhileTraining(begin=0.25, end=0.75, shape="linear")
    assert part_gone(4, 8, straight) == Fraction(1, 2)


RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "neurons": {"unit": {"neuron": {"members": "all"}}},
    "key-value groups": {"unit": {"kv_group": {"members": "all"}}},
    "heads": {"unit": {"head": {"members": "all"}}},
    "all compete": {
        "compare": "model",
        "criterion": "row_sum(G_lora*W_lora)**2/PARAMS",
    },
    "another formula": {"criterion": "row_sum(W_lora**2) * M2"},
    "weights alone": {"criterion": "row_norm(W)", "compare": "model"},
    "towards the dense model": {"recover": {"distil": {**LORA["lora"], "through": "lora"}}},
}


@pytest.mark.parametrize("name", RULES)
def test_zeros_stay_zeros_and_the_sliced_model_computes_the_same(name: str) -> None:
    model, rules = knowing_model(), chosen(**RULES[name])
    before = {layer.name: layer.weight.clone() for layer in find_linears(model.model)}
    sums = dense_sums([rules])
    known = calibrate(model, TEXT, find_linears(model.model), sums) if sums else {}
    outcome = prune(model, rules, 0.5, statistics=known, windows=TEXT)
    masks = outcome.selection.matrix_masks()
    assert any(not bool(mask.all()) for mask in masks.values())
    for layer in find_linears(model.model):
        mask = masks.get(layer.name, torch.ones_like(layer.weight, dtype=torch.bool))
        assert bool((layer.weight[~mask] == 0).all())
        assert not bool(torch.signbit(layer.weight[~mask]).any())
        if bool(mask.any()):
            assert bool((layer.weight[mask] != before[layer.name][mask]).any())
    if rules.compare == "group":
        assert outcome.sparsity_reached == 0.5
    else:
        # A neuron, three rows or columns of 32, is the smallest that could go as well.
        assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5
    zeroed = logits_of(model, TEXT)
    size = sum(parameter.numel() for parameter in model.model.parameters())
    with sliced(model, outcome.selection):
        assert sum(parameter.numel() for parameter in model.model.parameters()) < size
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3"])
def test_fused_and_turned_matrices_lose_their_units_too(family: str, dtype: torch.dtype) -> None:
    model = wrap_model(tiny_network(family).to(dtype), tiny_tokenizer(), name=family)
    outcome = prune(model, chosen(), 0.5, windows=TEXT)
    assert outcome.sparsity_reached == 0.5
    masks = outcome.selection.matrix_masks()
    for layer in find_linears(model.model):
        assert bool((layer.weight[~masks[layer.name]] == 0).all())
        assert bool((layer.weight[masks[layer.name]] != 0).any()) and layer.weight.dtype == dtype
    model.model.float()
    zeroed = logits_of(model, TEXT)
    with sliced(model, outcome.selection):
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


def test_biases_of_rows_that_made_a_unit_go_with_it() -> None:
    network = tiny_network("opt")
    for layer in find_linears(network):
        assert layer.bias is not None
        layer.bias.fill_(0.5)
    model = wrap_model(network, tiny_tokenizer(), name="opt")
    outcome = prune(model, chosen(unit={"neuron": {"members": "all"}}), 0.5, windows=TEXT)
    for group, kept in outcome.selection:
        producer = group.members[0].linear
        assert producer.bias is not None
        assert bool((producer.bias[~kept] == 0).all()) and bool((producer.bias[kept] == 0.5).all())
    zeroed = logits_of(model, TEXT)
    with sliced(model, outcome.selection):
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


def test_lora_prune_keeps_the_first_blocks_and_the_last() -> None:
    model = deep_model("llama", num_hidden_layers=8)
    numbers = {**PUBLISHED.recover.options.model_dump(), "steps": 6, "batch": 1}
    quick = with_choices(
        PUBLISHED, recover={"lora": numbers}, schedule={"while_training": {"every": 2}}
    )
    outcome = prune(model, quick, 0.2, windows=TEXT)
    mlps = [(group.block, kept) for group, kept in outcome.selection if group.kind == "neuron"]
    assert {block for block, kept in mlps if bool(kept.all())} == {0, 1, 2, 7}
    # Whole neurons: what is left of the share is less than one of each of four blocks.
    assert 0.2 - 4 * 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.2


# Steps that count for nothing, and stops


def broken_loss(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make the loss NaN at some of its calls."""
    plain, count = NextToken.loss, iter(range(1000))

    def loss(self: NextToken, model: Any, ids: Tensor, place: int) -> Tensor:
        return plain(self, model, ids, place) * (math.nan if next(count) in calls else 1.0)

    monkeypatch.setattr(NextToken, "loss", loss)


def test_a_step_that_is_not_finite_counts_for_no_average_and_is_told(
    monkeypatch: pytest.MonkeyPatch, steps_seen: tuple[Seen, list[GradualRemoval]]
) -> None:
    seen, removals = steps_seen
    # Two sequences a step: the third step, and the ninth, after which the last units go.
    broken_loss(monkeypatch, 4, 15)
    with pytest.warns(PruneZeroWarning, match="2 of 10 training steps changed nothing"):
        outcome = prune(knowing_model(), chosen(), 0.5, windows=TEXT)
    assert outcome.trainings[0].skipped == (3, 9)
    assert len(seen) == STEPS - 2
    assert all(bool(torch.isfinite(one).all()) for one in removals[0].averages)
    assert outcome.sparsity_reached == 0.5


def test_scores_that_rank_nothing_are_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, count = chosen(), iter(range(1000))
    plain = type(rules.unit.row).scores

    def scores(self: Any, *given: Any, **numbers: Any) -> Tensor:
        if next(count) == 5:
            raise ScoreError("they rank nothing")
        return plain(self, *given, **numbers)

    monkeypatch.setattr(type(rules.unit.row), "scores", scores)
    with pytest.warns(PruneZeroWarning, match="1 training steps gave scores that rank no units"):
        outcome = prune(knowing_model(), rules, 0.5, windows=TEXT)
    assert outcome.sparsity_reached == 0.5


def test_a_formula_that_ranks_nothing_ends_it_at_the_first_removal_and_changes_nothing() -> None:
    model, places = knowing_model(), []
    before = digest(model)

    def tell(what: str, done: int, total: int) -> None:
        places.extend([done] if "tuning" in what else [])

    with pytest.raises(ScoreError, match="ranks nothing"):
        prune(model, chosen(criterion="PARAMS"), 0.5, windows=TEXT, progress=tell)
    assert places == [1]
    assert digest(model) == before


@pytest.mark.parametrize("stop", [3, 7])
def test_a_killed_training_goes_on_to_the_same_bits(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    whole, killed, model = knowing_model(), knowing_model(), knowing_model()
    before = digest(killed)
    outcome = prune(whole, chosen(), 0.5, windows=TEXT)
    call: dict[str, Any] = {"windows": TEXT, "folder": tmp_path}
    with pytest.raises(StopError):
        prune(killed, chosen(), 0.5, progress=stop_after(stop), **call)
    assert digest(killed) == before
    places: list[int] = []

    def tell(what: str, done: int, total: int) -> None:
        places.extend([done] if "tuning" in what else [])

    again = prune(model, chosen(), 0.5, progress=tell, **call)
    assert places == list(range(stop + 1, STEPS + 1))
    assert digest(model) == digest(whole)
    assert again.trainings[0].losses == outcome.trainings[0].losses
    for (_, kept), (_, known) in zip(again.selection, outcome.selection, strict=True):
        assert torch.equal(kept, known)


def test_no_weight_of_the_model_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = knowing_model(), []
    plain = gradual.GradualRemoval.see

    def see(self: GradualRemoval, trained: Factors) -> None:
        held = [one for one in model.model.parameters() if one.grad is not None]
        assert {id(one) for one in held} == {id(one) for one in trained.masters}
        counts.append(len(held))
        plain(self, trained)

    monkeypatch.setattr(GradualRemoval, "see", see)
    prune(model, chosen(), 0.5, windows=TEXT)
    assert counts == [2 * len(find_linears(model.model))] * STEPS


def test_as_a_stage_it_leaves_the_zeros_of_the_stage_before() -> None:
    stages: list[dict[str, Any]] = [
        {"unit": "kv_group", "criterion": "row_norm(W)", "compare": "group"},
        {
            "unit": {"neuron": {"members": "all"}},
            "criterion": "row_sum(abs(G_lora*W_lora))",
            "compare": "group",
            "schedule": {"while_training": {"every": 2}},
            "recover": LORA,
        },
    ]
    rules = validated(StagedRecipe, {"name": "mine", "stages": stages}, "mine.yaml")
    model = knowing_model()
    outcome = staging.prune(model, rules, 0.5, windows=TEXT)
    counts = {(group.kind, group.block): int((~kept).sum()) for group, kept in outcome.selection}
    assert counts == {
        (kind, at): n for kind, n in (("kv_group", 1), ("neuron", 32)) for at in (0, 1)
    }
    masks = outcome.selection.matrix_masks()
    for layer in find_linears(model.model):
        assert bool((layer.weight[~masks[layer.name]] == 0).all())


# Refusals


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"schedule": "one-shot"}, "feature W_lora .* so it needs schedule: while_training"),
        ({"recover": "none"}, "so it needs recover: lora, or distil through lora"),
        ({"recover": "tune"}, "so it needs recover: lora, or distil through lora"),
        ({"recover": "distil"}, "so it needs recover: lora, or distil through lora"),
        ({"recover": {"lora": {"patience": 2}}}, "so patience, .*, has to be 0"),
        ({"update": "refit"}, "update: refit looks at units that go at once"),
        ({"allocate": "slopes"}, "allocate: slopes looks at units that go at once"),
        ({"statistics": "sequential"}, "needs statistics: dense"),
        ({"schedule": {"while_training": {"begin": 0.9}}}, "begin 0.9 is not before end 0.9"),
        ({"schedule": {"while_training": {"eta": -1.0}}}, "eta: .*greater than or equal to 0"),
        (
            {"unit": "weight", "criterion": "abs(W)", "compare": "row"},
            "schedule: while_training is for unit .*, not for weight",
        ),
        (
            {"unit": {"channel": {"members": "all"}}, "schedule": "one-shot", "recover": "none"},
            "feature [GW]_lora is for unit neuron, .*, not for channel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(choices: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        chosen(**choices)


def test_layers_that_do_not_train_are_refused_before_the_work() -> None:
    rules = chosen(recover={"lora": {"targets": ["re:mlp"]}})
    with pytest.raises(RecipeError, match="q_proj is not among the targets of recover lora"):
        prune(knowing_model(), rules, 0.5, windows=TEXT)


def test_features_of_training_are_refused_where_nothing_trains() -> None:
    for name in ("G_lora", "W_lora"):
        with pytest.raises(StatisticsError, match=f"{name} looks at low-rank factors while they"):
            feature(name, torch.ones(2, 3), None)


def test_the_same_call_gives_the_same_bits_and_another_text_others() -> None:
    digests = []
    for windows in (TEXT, TEXT, tiny_batches(4, 10)):
        model = knowing_model()
        prune(model, chosen(), 0.5, windows=windows)
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_scores_look_at_one_place_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[str] = set()
    most: list[int] = []
    plain = Factors.seen

    def seen(self: Factors, layer: str) -> dict[str, Tensor]:
        found = plain(self, layer)
        alive.add(layer)
        most.append(len(alive))
        weakref.finalize(found["change"], alive.discard, layer)
        return found

    monkeypatch.setattr(Factors, "seen", seen)
    prune(knowing_model(), chosen(), 0.5, windows=TEXT)
    # Of a block with queries, keys, values and outputs those and the place before, at most.
    assert 4 <= max(most) <= 7 < len(find_linears(knowing_model().model))
