"""The one loop over blocks, on tiny models of every family."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from prunezero.errors import (
    ModelError,
    RecipeError,
    ScoreError,
    SelectionError,
    StatisticsError,
)
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.editing.zeroing import DenseWeights
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune, prune_layers
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.pruning.requirements import dense_sums
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

BATCHES = tiny_batches(3, 16)


def recipe(criterion: str = "abs(W) * X", **choices: object) -> Recipe:
    return Recipe.model_validate({"name": "mine", "criterion": criterion, **choices})


def statistics_for(model: object, chosen: Recipe) -> dict[str, Any]:
    layers = find_linears(model.model)  # type: ignore[attr-defined]
    return calibrate(model, BATCHES, layers, dense_sums([chosen]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [recipe.name for recipe in published_of("weight")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_prunes_every_family_to_its_sparsity(family: str, name: str) -> None:
    model = tiny_model(family)
    chosen = Recipe.load(name)
    known = statistics_for(model, chosen)
    outcome = prune(model, chosen, 0.5, statistics=known, windows=BATCHES)
    if chosen.allocate.word == "uniform":
        assert outcome.sparsity_reached == 0.5
    else:
        # Every row of every layer rounds its own count down.
        assert 0.5 - 1 / 32 < outcome.sparsity_reached <= 0.5
    for layer in find_linears(model.model):
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
        if chosen.compare == "row" and chosen.allocate.word == "uniform":
            assert ((layer.weight == 0).sum(dim=1) == layer.weight.shape[1] // 2).all()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_fixes_the_sparsity_and_holds_in_every_group(pattern: str) -> None:
    model = tiny_model()
    chosen = recipe(pattern=pattern)
    prune(model, chosen, statistics=statistics_for(model, chosen))
    keep, of = map(int, pattern.split(":"))
    for layer in find_linears(model.model):
        groups = (layer.weight != 0).view(-1, of)
        assert (groups.sum(dim=1) == keep).all()


def test_embeddings_norms_and_head_are_never_touched() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    pruned = {f"{layer.name}.weight" for layer in find_linears(model.model)}
    prune(model, recipe("abs(W)"), 0.5)
    after = model.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == pruned


def test_sequential_statistics_see_what_pruned_blocks_make_of_the_text() -> None:
    dense_model, sequential_model = tiny_model(), tiny_model()
    dense, sequential = recipe(), recipe(statistics="sequential")
    prune(dense_model, dense, 0.5, statistics=statistics_for(dense_model, dense))
    prune(sequential_model, sequential, 0.5, windows=BATCHES)
    pairs = zip(find_linears(dense_model.model), find_linears(sequential_model.model), strict=True)
    equal = [(one.block, torch.equal(one.weight, other.weight)) for one, other in pairs]
    # Nothing before the first block was pruned, so it is scored alike.
    assert all(same for block, same in equal if block == 0)
    assert not all(same for block, same in equal if block == 1)


def test_sequential_statistics_keep_the_gradients_of_the_dense_model() -> None:
    model = tiny_model()
    chosen = Recipe.load("gblm")
    assert dense_sums([chosen]) == {"gradient_absolute_sum"}
    outcome = prune(model, chosen, 0.5, statistics=statistics_for(model, chosen), windows=BATCHES)
    assert outcome.sparsity_reached == 0.5


def test_gram_matrices_of_pruned_blocks_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[list[weakref.ref[torch.Tensor]]] = []

    def watched(chosen: Recipe, layers: Any, known: Any, *rest: Any, **masks: Any) -> None:
        for block in alive:
            assert not any(gram() is not None for gram in block)
        alive.append([weakref.ref(known[layer.name].sums["gram"]) for layer in layers])
        prune_layers(chosen, layers, known, *rest, **masks)

    monkeypatch.setattr("prunezero.pruning.prune.prune_layers", watched)
    prune(tiny_model(), Recipe.load("sparsegpt"), 0.5, windows=BATCHES)
    assert len(alive) > 1


def test_no_gradients_are_collected_where_no_formula_asks_for_them() -> None:
    assert dense_sums([recipe()]) == {"input_square_sum"}
    assert dense_sums([recipe("abs(W)/R1")]) == frozenset()


def test_the_whole_model_can_compete_and_the_count_is_exact() -> None:
    model = tiny_model()
    outcome = prune(model, recipe("abs(W)", compare="model"), 0.29)
    assert outcome.zeros == int(outcome.total * 29 // 100)
    shares = {float((layer.weight == 0).float().mean()) for layer in find_linears(model.model)}
    assert len(shares) > 1


def test_weights_that_are_already_zero_count_like_any_other() -> None:
    model = tiny_model()
    layer = find_linears(model.model)[0]
    layer.weight[:, :16] = -0.0
    prune(model, recipe("abs(W)"), 0.5)
    assert ((layer.weight == 0).sum(dim=1) == 16).all()
    assert not torch.signbit(layer.weight[layer.weight == 0]).any()


def test_targets_and_ignore_choose_layers_and_say_when_they_match_none() -> None:
    model = tiny_model()
    prune(model, recipe("abs(W)", targets=["q_proj", "re:down"], ignore=[r"re:layers\.0"]), 0.5)
    pruned = {
        (layer.block, layer.kind)
        for layer in find_linears(model.model)
        if (layer.weight == 0).any()
    }
    assert pruned == {(1, "q_proj"), (1, "down_proj")}
    with pytest.raises(ModelError, match="did you mean 'q_proj'"):
        prune(model, recipe("abs(W)", targets=["qproj"]), 0.5)


def test_scores_that_rank_nothing_are_refused_by_formula_and_layer() -> None:
    with pytest.raises(ScoreError, match=r"layers\.0.*same score"):
        prune(tiny_model(), recipe("layer_max(W)"), 0.5)
    model = tiny_model()
    find_linears(model.model)[3].weight[0, 0] = float("nan")
    with pytest.raises(ScoreError, match=r"abs\(W\) gives 1 of .*layers\.0.* score that is NaN"):
        prune(model, recipe("abs(W)"), 0.5)


def test_requests_that_no_mask_satisfies_are_refused_before_any_work() -> None:
    model = tiny_model()
    before = [(layer, layer.weight.clone()) for layer in find_linears(model.model)]
    for sparsity, choices, complaint in (
        (None, {}, "say how much"),
        (1.0, {}, "below 1"),
        (-0.1, {}, "at least 0"),
        (0.6, {"pattern": "2:4"}, "0.5"),
        (0.5, {"pattern": "17:34"}, "multiple of 34|wider"),
    ):
        with pytest.raises(SelectionError, match=complaint):
            prune(model, recipe("abs(W)", **choices), sparsity)
    for layer, copy in before:
        assert torch.equal(layer.weight, copy)


def test_choices_that_exclude_each_other_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(RecipeError, match="needs statistics 'dense'"):
        prune(model, recipe(compare="model", statistics="sequential"), 0.5, windows=BATCHES)
    with pytest.raises(RecipeError, match="sequential statistics need calibration text"):
        prune(model, recipe(statistics="sequential"), 0.5)
    with pytest.raises(StatisticsError, match="input_square_sum"):
        prune(model, recipe(), 0.5)


def test_dense_weights_come_back_exactly() -> None:
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with DenseWeights(find_linears(model.model)):
        prune(model, recipe("abs(W)"), 0.7)
        assert any(not torch.equal(before[n], v) for n, v in model.model.state_dict().items())
    assert all(torch.equal(before[name], v) for name, v in model.model.state_dict().items())
