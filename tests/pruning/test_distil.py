"""Training towards the dense model's next-token distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunezero.errors import RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.evaluation import dense_reference, evaluate
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.training_options import Distil
from prunezero.pruning.recovery.answers import dense_answers
from prunezero.pruning.recovery.objectives import ToDense
from tests.pruning.trained import TEXT, halved, knowing_model, logits_of, recipe
from tests.tiny_models import tiny_batches, tiny_model


def options(**changes: Any) -> Distil:
    return Distil.model_validate(changes)


def chances_of(logits: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    scaled = logits.double().numpy() / temperature
    scaled = np.exp(scaled - scaled.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def divergence(dense: np.ndarray[Any, Any], own: np.ndarray[Any, Any]) -> float:
    """The mean over places of KL(dense || own)."""
    return float(np.mean(np.sum(dense * (np.log(dense) - np.log(own)), axis=-1)))


def outputs_of(model: LanguageModel, ids: Tensor) -> list[np.ndarray[Any, Any]]:
    """What each block of a Llama hands on, as what stands behind it reads it."""
    body, seen = model.model.model, []
    hook = body.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        states = body(ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    # The last of them is behind the norm.
    return [state[0].double().numpy() for state in (*states[1:-1], *seen)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_kl_of_the_equation(family: str, temperature: float) -> None:
    model, windows = tiny_model(family), tiny_batches(3, 9)
    chosen = options(temperature=temperature, plain=0.5)
    # The first windows alone are used, so the last has no answers.
    answers = dense_answers(model, windows, chosen.model_copy(update={"windows": 2}))
    before = logits_of(model, windows)
    halved(model)
    after = logits_of(model, windows)
    for place in (0, 1):
        found = ToDense(answers, chosen).loss(model.model, windows[place], place)
        dense, own = (chances_of(one[place, :-1], temperature) for one in (before, after))
        plain = chances_of(after[place, :-1], 1.0)[range(8), windows[place, 1:].numpy()]
        expected = temperature**2 * divergence(dense, own) - 0.5 * np.log(plain).mean()
        assert float(found) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(KeyError):
        answers.log_chances(2)


def test_tokens_that_are_not_kept_count_as_one() -> None:
    model, windows = knowing_model(), TEXT[:2]
    chosen = options(top=3, temperature=2.0)
    answers = dense_answers(model, windows, chosen)
    before = logits_of(model, windows)
    halved(model)
    after = logits_of(model, windows)
    dense, own = (chances_of(one[1, :-1], 2.0) for one in (before, after))
    best = np.argsort(-dense, axis=-1)[:, :3]
    few = []
    for chances in (dense, own):
        some = np.take_along_axis(chances, best, axis=-1)
        few.append(np.concatenate([some, 1 - some.sum(-1, keepdims=True)], axis=-1))
    found = float(ToDense(answers, chosen).loss(model.model, windows[1], 1))
    assert found == pytest.approx(4 * divergence(*few), rel=1e-3)
    assert found < 4 * divergence(dense, own)
    assert answers.reference.states.numel() == 0


def test_as_many_tokens_as_there_are_is_all_of_them() -> None:
    model = knowing_model()
    every, all_kept = (dense_answers(model, TEXT, options(top=top)) for top in (0, 97))
    assert torch.equal(every.log_chances(1)[0], all_kept.log_chances(1)[0])
    assert all_kept.log_chances(1)[1] is None


def test_outputs_of_blocks_may_be_compared_too() -> None:
    model, windows = tiny_model(num_hidden_layers=3), tiny_batches(2, 9)
    chosen = options(states=2.0)
    answers = dense_answers(model, windows, chosen)
    before, logits = outputs_of(model, windows[1:]), logits_of(model, windows)
    halved(model)
    after, own = outputs_of(model, windows[1:]), logits_of(model, windows)
    assert len(before) == 3
    parts = [
        np.mean((late - early) ** 2) / np.mean(early**2)
        for late, early in zip(after, before, strict=True)
    ]
    kl = divergence(chances_of(logits[1, :-1], 1.0), chances_of(own[1, :-1], 1.0))
    found = float(ToDense(answers, chosen).loss(model.model, windows[1], 1))
    assert found == pytest.approx(kl + 2.0 * np.mean(parts), rel=1e-4)


def test_the_dense_model_itself_has_no_loss() -> None:
    model = knowing_model()
    chosen = options(states=1.0)
    loss = ToDense(dense_answers(model, TEXT, chosen), chosen).loss(model.model, TEXT[0], 0)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


WORDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"steps": 12, "batch": 3, "learning_rate": 0.02}},
    "distil": {"distil": {"steps": 12, "batch": 3, "learning_rate": 0.005}},
    "distil few tokens": {"distil": {"steps": 12, "learning_rate": 0.005, "top": 5}},
    "distil through lora": {
        "distil": {"steps": 12, "batch": 3, "learning_rate": 0.02, "through": "lora"}
    },
}


@pytest.mark.parametrize("word", WORDS)
def test_a_model_that_knew_a_text_knows_it_better_again(word: str) -> None:
    dense, plain, model = knowing_model(), knowing_model(), knowing_model()
    reference = dense_reference(dense, TEXT)
    prune(plain, recipe(), 0.75)
    outcome = prune(model, recipe(recover=WORDS[word]), 0.75, windows=TEXT)
    before = evaluate(plain, TEXT, reference=reference)
    after = evaluate(model, TEXT, reference=reference)
    assert after.kl is not None and before.kl is not None
    assert after.perplexity < 0.8 * before.perplexity
    assert after.kl < 0.8 * before.kl
    (training,) = outcome.trainings
    assert training.losses[-1] < training.losses[0]
    for layer, masked in zip(find_linears(model.model), find_linears(plain.model), strict=True):
        assert bool((layer.weight[masked.weight == 0] == 0).all())


def test_the_first_loss_is_the_distance_to_the_model_before_pruning() -> None:
    model, window = knowing_model(), TEXT[:1]
    before = logits_of(model, window)
    numbers = {"steps": 1, "batch": 1, "learning_rate": 1e-12}
    outcome = prune(model, recipe(recover={"distil": numbers}), 0.5, windows=window)
    after = logits_of(model, window)
    expected = divergence(chances_of(before[0, :-1], 1.0), chances_of(after[0, :-1], 1.0))
    assert expected > 0.01
    assert outcome.trainings[0].losses == pytest.approx((expected,), rel=1e-4)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"plain": -1.0}, "plain: .*greater than or equal to 0"),
        ({"top": -1}, "top: .*greater than or equal to 0"),
        ({"states": -0.5}, "states: .*greater than or equal to 0"),
        ({"through": "adapters"}, "through: .*'weights' or 'lora'"),
    ],
)
def test_bad_numbers_are_refused_when_the_recipe_is_read(
    numbers: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(recover={"distil": numbers})
