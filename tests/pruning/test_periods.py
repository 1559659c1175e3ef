"""Units that shrink to nothing in periods of a training, against the equations of HESSO."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import PruneZeroWarning, RecipeError, ScoreError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel, wrap_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.moves import clip_scale, coming_move
from prunezero.pruning.recovery.periods import PeriodicRemoval
from prunezero.pruning.recovery.training import OPTIMIZERS
from prunezero.pruning.schedule import period_bounds
from tests.pruning.test_while_training import broken_loss
from tests.pruning.trained import (
    TEXT,
    StopError,
    digest,
    knowing_model,
    logits_of,
    recipe,
    stop_after,
)
from tests.tiny_models import tiny_network, tiny_tokenizer

PUBLISHED = Recipe.load("hesso")
STEPS = 12
NUMBERS: dict[str, Any] = {"batch": 2, "learning_rate": 0.01}
TUNE = {"tune": {**NUMBERS, "sequences": 2 * STEPS}}
LORA = {"lora": {**NUMBERS, "steps": STEPS, "rank": 2}}
RECOVERIES: dict[str, dict[str, Any]] = {
    "tune": TUNE,
    "lora": LORA,
    "distil": {"distil": {**NUMBERS, "steps": STEPS}},
    "distil through lora": {"distil": {**NUMBERS, "steps": STEPS, "through": "lora"}},
}
TERMS = ("T_norm", "T_mean", "T_cos", "T_first", "T_second")
# Of 12 steps periods begin after 2, 5 and 8, and the last ends after 11.
PERIODS = {"periods": {"periods": 3, "begin": 0.17, "end": 0.92}}


def chosen(**choices: Any) -> Recipe:
    """The published formula on units of all blocks, with a short training."""
    usual: dict[str, Any] = {
        "criterion": PUBLISHED.criterion.text,
        "unit": "width",
        "compare": "model",
        "schedule": PERIODS,
        "recover": TUNE,
    }
    return recipe(**{**usual, **choices})


def test_periods_lie_between_begin_and_end_and_are_equal() -> None:
    options = Periods.model_validate(PERIODS["periods"])
    assert period_bounds(12, options) == (2, 5, 8, 11)
    assert period_bounds(100, Periods(periods=4, begin=0.1, end=0.9)) == (10, 30, 50, 70, 90)
    assert period_bounds(5, Periods(periods=1, begin=0.0, end=1.0)) == (0, 5)


# The direction


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_coming_move_is_what_the_next_step_takes_and_asking_changes_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    optimizer = OPTIMIZERS[name](masters, 0.25)
    for size in (0.1, 30.0, 1.0):
        for master in masters:
            draw = torch.randn(master.shape, generator=generator, dtype=torch.float64)
            master.grad = size * draw
        before, scale = [master.clone() for master in masters], clip_scale(masters)
        moves = [coming_move(optimizer, master, scale) for master in masters]
        again = [coming_move(optimizer, master, scale) for master in masters]
        assert all(map(torch.equal, moves, again)) and all(map(torch.equal, masters, before))
        assert (scale < 1) == (size > 0.1)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, was, move in zip(masters, before, moves, strict=True):
            torch.testing.assert_close(was - master, 0.25 * move, rtol=1e-6, atol=1e-9)


# The scores and the way out


@dataclass
class Seen:
    """What a training did, step by step, as numpy in float64."""

    removal: list[PeriodicRemoval] = field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)
    """of all layers with their change, before each step that was finite"""
    moves: list[dict[str, np.ndarray]] = field(default_factory=list)
    after: list[dict[str, np.ndarray]] = field(default_factory=list)
    """weights of the model with their change, after each step and what followed it"""
    stepped: list[dict[str, np.ndarray]] = field(default_factory=list)
    """the same before what followed it"""
    scores: list[dict[tuple[str, str], np.ndarray]] = field(default_factory=list)


def computed(trained: Any) -> dict[str, np.ndarray]:
    """The weights that a model in training computes with, by layer name."""
    if hasattr(trained, "weights"):
        return {
            name: one.turned(one.parameter.detach()).double().numpy().copy()
            for name, one in trained.weights.items()
        }
    pairs = {name: trained.changing(name) for name in trained.modules}
    return {name: (one + other).double().numpy() for name, (one, other) in pairs.items()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen()
    see, act, choose = PeriodicRemoval.see, PeriodicRemoval.act, PeriodicRemoval._choose

    def watched_see(self: PeriodicRemoval, trained: Any) -> None:
        found.removal[:] = [self]
        found.weights.append(computed(trained))
        moves = {
            name: trained.moving(name, self._optimizer, clip_scale(trained.masters))[1]
            for name in found.weights[-1]
        }
        found.moves.append({name: move.double().numpy().copy() for name, move in moves.items()})
        see(self, trained)

    def watched_act(self: PeriodicRemoval, trained: Any, done: int, total: int) -> None:
        found.stepped.append(computed(trained))
        act(self, trained, done, total)
        found.after.append(computed(trained))

    def watched_choose(self: PeriodicRemoval, moving: Any) -> None:
        scores = self._scores(moving)
        found.scores.append({key: one.double().numpy().copy() for key, one in scores.items()})
        choose(self, moving)

    monkeypatch.setattr(PeriodicRemoval, "see", watched_see)
    monkeypatch.setattr(PeriodicRemoval, "act", watched_act)
    monkeypatch.setattr(PeriodicRemoval, "_choose", watched_choose)
    yield found


def unit_rows(values: dict[str, np.ndarray], kind: str, block: int) -> np.ndarray:
    """All weights of each unit of the tiny Llama, [units, weights], written by hand."""

    def part(name: str) -> np.ndarray:
        (found,) = (one for key, one in values.items() if f"layers.{block}." in key and name in key)
        return found

    if kind == "neuron":
        return np.concatenate([part("gate_proj"), part("up_proj"), part("down_proj").T], axis=1)
    pieces = [part("q_proj"), part("k_proj"), part("v_proj"), part("o_proj").T]
    return np.concatenate([one.reshape(2, -1) for one in pieces], axis=1)


def slow_scores(
    weights: dict[str, np.ndarray], moves: dict[str, np.ndarray], free: dict[Any, np.ndarray]
) -> dict[Any, np.ndarray]:
    """The five sizes of each unit, each over its norm over all that are free, added up."""
    terms = {}
    for kind, block in free:
        x, d = unit_rows(weights, kind, block), unit_rows(moves, kind, block)
        product = (x * d).sum(1)
        sizes = np.sqrt((x**2).sum(1) * (d**2).sum(1))
        cosine = np.divide(product, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        norm, mean = np.sqrt((x**2).sum(1)), np.abs(x).mean(1)
        terms[kind, block] = [norm, mean, 1 + cosine, np.abs(product), product**2 / 2]
    total: Any = 0.0
    for place in range(5):
        everything = np.concatenate([terms[key][place][free[key]] for key in free])
        norm = np.sqrt((everything**2).sum())
        total = total + np.concatenate([terms[key][place] / norm for key in free])
    lengths = np.cumsum([len(free[key]) for key in free])[:-1]
    return dict(zip(free, np.split(total, lengths), strict=True))


@pytest.mark.parametrize("word", ["tune", "lora"])
def test_scores_when_a_period_begins_are_those_of_the_equations(word: str, seen: Seen) -> None:
    model = knowing_model()
    outcome = prune(model, chosen(recover=RECOVERIES[word]), 0.5, windows=TEXT)
    (removal,) = seen.removal
    assert len(seen.scores) == 3
    free = {(group.kind, group.block): np.ones(group.units, dtype=bool) for group in removal.groups}
    for place, scores in zip((2, 5, 8), seen.scores, strict=True):
        expected = slow_scores(seen.weights[place], seen.moves[place], free)
        for group in removal.groups:
            found = scores[group.key]
            np.testing.assert_allclose(found, expected[group.kind, group.block], rtol=1e-4)
        # What is zero once this period has ended is no longer free.
        stop = place + 3
        for kind, block in free:
            rows = unit_rows(seen.after[stop - 1], kind, block)
            free[kind, block] = (rows != 0).any(1)
    for group, kept in outcome.selection:
        assert np.array_equal(free[group.kind, group.block], kept.numpy())


@pytest.mark.parametrize("word", RECOVERIES)
def test_units_of_a_period_shrink_linearly_to_nothing_and_stay_so(word: str, seen: Seen) -> None:
    outcome = prune(knowing_model(), chosen(recover=RECOVERIES[word]), 0.5, windows=TEXT)
    counts = []
    for group, kept in outcome.selection:
        key = group.kind, group.block
        rows = [unit_rows(one, *key) for one in seen.after]
        stepped = [unit_rows(one, *key) for one in seen.stepped]
        for unit in range(group.units):
            zeros = [step + 1 for step in range(STEPS) if not rows[step][unit].any()]
            if kept[unit]:
                assert not zeros
                continue
            # It is zero from the end of a period on, and before shrinks by what is left of it.
            end = zeros[0]
            assert end in (5, 8, 11) and zeros == list(range(end, STEPS + 1))
            counts.append(end)
            for done in range(1, end):
                factor = (end - done) / (end - done + 1) if done > end - 3 else 1.0
                np.testing.assert_allclose(
                    rows[done - 1][unit], factor * stepped[done - 1][unit], rtol=1e-5, atol=1e-7
                )
    # Units of one period are a third of the parameters each, as far as whole units can be.
    assert {counts.count(end) > 0 for end in (5, 8, 11)} == {True}
    assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5


def test_units_that_compete_in_their_place_go_by_equal_counts(seen: Seen) -> None:
    rules = chosen(unit="neuron", compare="group")
    outcome = prune(knowing_model(), rules, 0.375, windows=TEXT)
    for group, kept in outcome.selection:
        gone = [int((~unit_rows(one, "neuron", group.block).any(1)).sum()) for one in seen.after]
        assert gone == [0] * 4 + [8] * 3 + [16] * 3 + [24] * 2
        assert int((~kept).sum()) == 24
    assert outcome.sparsity_reached == 0.375


RULES: dict[str, dict[str, Any]] = {
    "published": {},
    "through lora": {"recover": LORA},
    "key-value groups": {"unit": "kv_group", "compare": "group"},
    "heads": {"unit": "head", "compare": "group", "recover": LORA},
    "another formula": {"criterion": "T_norm*T_first/sqrt(PARAMS)"},
    "weights alone": {"criterion": "row_norm(W)", "unit": {"width": {"members": "all"}}},
    "at once": {"schedule": {"periods": {"periods": 1, "begin": 0.0, "end": 1.0}}},
    "tried before": {"schedule": {"periods": {"periods": 2, "cycles": 3}}, "recover": LORA},
    "more periods than steps": {"schedule": {"periods": {"periods": 40}}},
    "down a hill": {"recover": {"tune": {**TUNE["tune"], "optimizer": "sgd"}}},
}


@pytest.mark.parametrize("name", RULES)
def test_zeros_stay_zeros_and_the_sliced_model_computes_the_same(name: str) -> None:
    model, rules = knowing_model(), chosen(**RULES[name])
    before = {layer.name: layer.weight.clone() for layer in find_linears(model.model)}
    outcome = prune(model, rules, 0.5, windows=TEXT)
    masks = outcome.selection.matrix_masks()
    assert any(not bool(mask.all()) for mask in masks.values())
    for layer in find_linears(model.model):
        mask = masks.get(layer.name, torch.ones_like(layer.weight, dtype=torch.bool))
        assert bool((layer.weight[~mask] == 0).all())
        assert not bool(torch.signbit(layer.weight[~mask]).any())
        # What the recipe does not prune is not trained by `tune`.
        if layer.name in masks and bool(mask.any()):
            assert bool((layer.weight[mask] != before[layer.name][mask]).any())
    assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5
    zeroed = logits_of(model, TEXT)
    with sliced(model, outcome.selection):
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("word", ["tune", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3"])
def test_fused_and_turned_matrices_lose_their_units_too(
    family: str, dtype: torch.dtype, word: str
) -> None:
    model = wrap_model(tiny_network(family).to(dtype), tiny_tokenizer(), name=family)
    rules = chosen(compare="group", recover=RECOVERIES[word])
    outcome = prune(model, rules, 0.5, windows=TEXT)
    assert outcome.sparsity_reached == 0.5
    masks = outcome.selection.matrix_masks()
    for layer in find_linears(model.model):
        assert bool((layer.weight[~masks[layer.name]] == 0).all())
        assert bool((layer.weight[masks[layer.name]] != 0).any()) and layer.weight.dtype == dtype
    model.model.float()
    zeroed = logits_of(model, TEXT)
    with sliced(model, outcome.selection):
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


def test_hesso_takes_out_what_is_asked_for() -> None:
    numbers = {**PUBLISHED.recover.options.model_dump(), "sequences": 40, "batch": 2}
    outcome = prune(knowing_model(), chosen(recover={"tune": numbers}), 0.2, windows=TEXT)
    assert 0.2 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.2
    assert set(PUBLISHED.criterion.features) == set(TERMS)


# Steps that count for nothing, and stops


def test_a_step_that_is_not_finite_chooses_nothing_and_shrinking_goes_on(
    monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    # Two sequences a step: the third, before which the first period begins, and the seventh.
    broken_loss(monkeypatch, 4, 12)
    with pytest.warns(PruneZeroWarning, match="2 of 12 training steps changed nothing"):
        outcome = prune(knowing_model(), chosen(), 0.5, windows=TEXT)
    assert outcome.trainings[0].skipped == (3, 7)
    assert len(seen.weights) == STEPS - 2
    assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5
    for group, kept in outcome.selection:
        ends = [unit_rows(one, group.kind, group.block).any(1) for one in seen.after]
        assert all(bool(ends[step].all()) for step in range(4))
        assert np.array_equal(ends[-1], kept.numpy())


def test_scores_that_rank_nothing_wait_for_the_next_step_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules, count = chosen(), iter(range(1000))
    plain = type(rules.unit.row).scores

    def scores(self: Any, *given: Any, **numbers: Any) -> torch.Tensor:
        if next(count) == 0:
            raise ScoreError("they rank nothing")
        return plain(self, *given, **numbers)

    monkeypatch.setattr(type(rules.unit.row), "scores", scores)
    with pytest.warns(PruneZeroWarning, match="1 training steps gave scores that rank no units"):
        outcome = prune(knowing_model(), rules, 0.5, windows=TEXT)
    assert 0.5 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.5


def test_a_formula_that_ranks_nothing_ends_it_and_changes_nothing() -> None:
    model = knowing_model()
    before = digest(model)
    with pytest.raises(ScoreError, match="ranks nothing"):
        prune(model, chosen(criterion="PARAMS"), 0.5, windows=TEXT)
    assert digest(model) == before


def same_again(rules: Recipe, stop: int, folder: Path) -> tuple[LanguageModel, LanguageModel]:
    """A model pruned in one go, and one pruned after a stop; both have the same outcome."""
    whole, killed, model = knowing_model(), knowing_model(), knowing_model()
    before = digest(killed)
    outcome = prune(whole, rules, 0.5, windows=TEXT)
    call: dict[str, Any] = {"windows": TEXT, "folder": folder}
    with pytest.raises(StopError):
        prune(killed, rules, 0.5, progress=stop_after(stop), **call)
    assert digest(killed) == before
    places: list[int] = []

    def tell(what: str, done: int, total: int) -> None:
        places.extend([done] if "tuning" in what else [])

    again = prune(model, rules, 0.5, progress=tell, **call)
    assert places == list(range(stop + 1, STEPS + 1))
    assert again.trainings[0].losses == outcome.trainings[0].losses
    for (_, kept), (_, known) in zip(again.selection, outcome.selection, strict=True):
        assert torch.equal(kept, known)
    return whole, model


@pytest.mark.parametrize("word", ["tune", "lora"])
@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_a_killed_training_goes_on_to_the_same_bits(
    stop: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    whole, model = same_again(chosen(recover=RECOVERIES[word]), stop, tmp_path)
    assert digest(model) == digest(whole)


# Refusals


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (
            {"schedule": "one-shot"},
            "T_norm looks at units while they train, so it needs sch.*: per",
        ),
        ({"schedule": "while_training", "recover": LORA}, "T_norm .* needs schedule: periods"),
        ({"criterion": "row_sum(W_lora)"}, "W_lora looks at low-rank factors while they train"),
        ({"recover": "none"}, "units out of a training, so it needs recover: tune, lora or distil"),
        ({"recover": {"tune": {"patience": 2}}}, "so patience, .*, has to be 0"),
        ({"update": "refit"}, "update: refit looks at units that go at once"),
        ({"schedule": {"periods": {"begin": 0.9}}}, "begin 0.9 is not before end 0.9"),
        (
            {"schedule": {"periods": {"cycles": 2, "cycles_end": 0.9}}},
            "cycles_end 0.9 is not between begin 0.1 and end 0.9",
        ),
        ({"schedule": {"periods": {"periods": 0}}}, "greater than or equal to 1"),
        (
            {"unit": "weight", "criterion": "abs(W)", "compare": "row"},
            "schedule: periods is for unit .*, not for weight",
        ),
        (
            {"unit": "channel", "compare": "group"},
            "schedule: periods is for unit .*, not for channel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(choices: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        chosen(**choices)


def test_the_same_call_gives_the_same_bits() -> None:
    digests = []
    for _ in range(2):
        model = knowing_model()
        prune(model, chosen(), 0.5, windows=TEXT)
        digests.append(digest(model))
    assert digests[0] == digests[1]
    assert math.isfinite(float(logits_of(model, TEXT).sum()))
