"""Whole units and recovery: zeros are trained around, and what is sliced last is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.errors import RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.slicing import sliced
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning import staging
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.staged import StagedRecipe
from prunezero.pruning.recipes.training_options import Lora
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.words import lora
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import with_choices
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

NUMBERS: dict[str, Any] = {"batch": 2, "learning_rate": 0.01}
WORDS: dict[str, dict[str, Any]] = {
    "tune": {"tune": {**NUMBERS, "sequences": 6}},
    "lora": {"lora": {**NUMBERS, "steps": 3}},
    "distil": {"distil": {**NUMBERS, "steps": 3}},
}
# What needs no statistics of the model.
FORMULAS = {
    "neuron": "row_norm(W)",
    "kv_group": "row_norm(W)",
    "head": "row_norm(W)",
    "width": "row_norm(W)",
    "attention": "PARAMS*RND",
    "mlp": "PARAMS*RND",
    "layer": "RND",
}


def recovered(model: LanguageModel, unit: str, word: str, **call: Any) -> Outcome:
    compare = "group" if unit in ("neuron", "kv_group", "head") else "model"
    chosen = recipe(unit=unit, criterion=FORMULAS[unit], compare=compare, recover=WORDS[word])
    return prune(model, chosen, 0.5, windows=TEXT, **call)


@pytest.mark.parametrize(
    ("unit", "word"),
    [(unit, "lora") for unit in FORMULAS]
    + [(unit, word) for unit in ("width", "layer") for word in ("tune", "distil")],
)
def test_units_that_went_stay_zero_and_the_sliced_model_computes_the_same(
    unit: str, word: str
) -> None:
    model = knowing_model()
    before = {layer.name: layer.weight.clone() for layer in find_linears(model.model)}
    outcome = recovered(model, unit, word)
    masks = outcome.selection.matrix_masks()
    assert any(not bool(mask.all()) for mask in masks.values())
    for layer in find_linears(model.model):
        mask = masks.get(layer.name, torch.ones_like(layer.weight, dtype=torch.bool))
        assert bool((layer.weight[~mask] == 0).all())
        if layer.name in masks and bool(mask.any()):
            assert bool((layer.weight[mask] != before[layer.name][mask]).any())
    zeroed = logits_of(model, TEXT)
    size = sum(parameter.numel() for parameter in model.model.parameters())
    with sliced(model, outcome.selection):
        assert sum(parameter.numel() for parameter in model.model.parameters()) < size
        torch.testing.assert_close(logits_of(model, TEXT), zeroed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit", ["channel", "direction"])
@pytest.mark.parametrize("word", WORDS)
def test_what_no_zeros_stand_for_is_refused_in_a_sentence(unit: str, word: str) -> None:
    with pytest.raises(RecipeError, match=f"recover: {word} is for unit .*, not for {unit}"):
        recipe(unit=unit, criterion="A", compare="group", recover=word)


def test_a_training_of_units_goes_on_and_the_units_are_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    whole = knowing_model()
    outcome = recovered(whole, "neuron", "lora")
    with pytest.raises(StopError):
        recovered(knowing_model(), "neuron", "lora", folder=tmp_path, progress=stop_after(2))
    model, done = knowing_model(), []

    def tell(what: str, place: int, total: int) -> None:
        done.extend([place] if "tuning" in what else [])

    again = recovered(model, "neuron", "lora", folder=tmp_path, progress=tell)
    assert done == [3]
    assert digest(model) == digest(whole)
    assert again.trainings[0].losses == outcome.trainings[0].losses
    masks, known = again.selection.matrix_masks(), outcome.selection.matrix_masks()
    assert masks.keys() == known.keys()
    assert all(torch.equal(mask, known[name]) for name, mask in masks.items())


def test_a_later_stage_learns_from_the_dense_model_not_from_the_stage_before() -> None:
    window = TEXT[:1]
    barely = {"distil": {"steps": 1, "batch": 1, "learning_rate": 1e-12}}
    stages = [
        {"unit": "neuron", "criterion": "row_norm(W)", "compare": "group"},
        {"unit": "attention", "criterion": "RND", "compare": "model", "recover": barely},
    ]
    chosen = validated(StagedRecipe, {"name": "mine", "stages": stages}, "mine.yaml")
    model = knowing_model()
    before = logits_of(model, window)[0, :-1].double().log_softmax(-1).numpy()
    outcome = staging.prune(model, chosen, 0.4, windows=window)
    after = logits_of(model, window)[0, :-1].double().log_softmax(-1).numpy()
    expected = float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1)))
    (report,) = outcome.trainings
    assert report.losses == pytest.approx((expected,), rel=1e-4)


def test_llm_pruner_looks_anew_before_each_step_and_trains_once_when_all_are_gone() -> None:
    chosen = Recipe.load("llm_pruner")
    numbers = {**chosen.recover.options.model_dump(), "steps": 3, "batch": 2}
    model, by_hand = (deep_model("llama", num_hidden_layers=8) for _ in range(2))
    trained = with_choices(chosen, recover={"lora": numbers})
    plain = with_choices(chosen, recover="none")
    told: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        told.extend([what] if done == total else [])

    sums = calibrate(model, TEXT, find_linears(model.model), dense_sums([chosen]))
    known: dict[str, Any] = {"statistics": sums, "windows": TEXT}
    outcome = prune(model, trained, 0.1, progress=tell, **known)
    # Sums for the first of four steps were given.
    order = [what.split(" ")[0] for what in told]
    assert order == ["layers", *["gradients", "layers"] * 3, "steps"], told
    assert len(outcome.trainings) == 1
    expected = prune(by_hand, plain, 0.1, **known)
    assert outcome.selection.removed() == expected.selection.removed() > 0
    options = trained.recover.options
    assert isinstance(options, Lora)
    lora(by_hand, find_linears(by_hand.model), TEXT, options, step=3)
    assert digest(model) == digest(by_hand)


def test_a_training_after_every_step_is_what_recipes_have_that_say_nothing() -> None:
    steps = {"iterative": {"steps": 2}}
    for after, count in (({}, 2), ({"after": "every step"}, 2), ({"after": "last step"}, 1)):
        chosen = recipe(schedule=steps, recover={"lora": {"steps": 1, "batch": 1, **after}})
        assert len(prune(knowing_model(), chosen, 0.5, windows=TEXT).trainings) == count
