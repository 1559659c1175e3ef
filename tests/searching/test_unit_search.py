"""A search for criteria of units goes as one for weights does, and screens what it prunes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import PruneZeroError, RecipeError
from prunezero.formula import Criterion
from prunezero.models.anatomy.groups import Group
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.kinds import UNITS
from prunezero.pruning.recipes.choices import chosen_unit
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Options
from prunezero.pruning.testbed import Testbed
from prunezero.pruning.unit_kind import UnitKind
from prunezero.scoring.feature_values import depth_feature
from prunezero.scoring.statistics import Statistics
from prunezero.scoring.tables import Tables
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.baselines import baselines, on_terms_of, published_equivalent
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.task import Task
from prunezero.searching.experiment.testbeds import without_missing_biases
from prunezero.searching.history import History
from prunezero.searching.proxies.samples import ROW_WEIGHTS
from prunezero.searching.proxies.unit_samples import UnitSamples
from prunezero.searching.search import search
from prunezero.searching.session import find, make_task, open_session
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.catalogue import STRATEGIES
from prunezero.searching.strategies.genetics import as_seen, random_criterion
from tests.searching.test_search import outcome
from tests.searching.testbed import config_of, tiny_space, tiny_testbed
from tests.tiny_models import tiny_batches, tiny_model


def task_of(name: str = "width", **changes: object) -> Task:
    return make_task(config_of(tiny_space(name, **changes), 0.3))


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    return tiny_testbed()


@pytest.fixture(scope="module")
def samples(testbed: Testbed) -> UnitSamples:
    found = Evaluator(task_of(), [testbed])._sampled[0].samples
    assert isinstance(found, UnitSamples)
    return found


def removed_by(group: Group, kept: Tensor) -> Tensor:
    return (~kept).repeat_interleave(group.reader.width)


@pytest.mark.parametrize(
    "unit",
    [
        "width",
        {"width": {"normalise": "zscore"}},
        {"width": {"members": "all", "combine": "max"}},
        {"width": {"channels": "l2", "normalise": "mean"}},
    ],
    ids=str,
)
def test_tables_give_every_formula_the_scores_that_the_pruning_gives_it(
    samples: UnitSamples, unit: object
) -> None:
    space, rng, tables = tiny_space("width"), random.Random(1), Tables()
    options, row, tried = chosen_unit(unit).options, UNITS["width"], 0
    while tried < 25:
        criterion = random_criterion(space, rng)
        if criterion is None:
            continue
        tried += 1
        for group in samples.groups:
            known = [
                _scores_or_fault(row, group, criterion, samples.statistics, options, one)
                for one in (None, tables, tables)
            ]
            assert known[0] == known[1] == known[2]


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
@pytest.mark.parametrize("formula", ["row_norm(W)", "M2*row_mean(abs(W))"])
def test_tables_tell_apart_what_lies_in_one_fused_matrix(family: str, formula: str) -> None:
    model, criterion = tiny_model(family), Criterion.parse(formula)
    linears = find_linears(model.model)
    statistics = calibrate(model, tiny_batches(), linears, {"mask_gradients"})
    options, tables = chosen_unit({"width": {"members": "producers"}}).options, Tables()
    for group in UNITS["width"].groups(linears, model):
        alone, shared = (
            _scores_or_fault(UNITS["width"], group, criterion, statistics, options, one)
            for one in (None, tables)
        )
        assert alone == shared and not isinstance(alone, str)


def _scores_or_fault(
    row: UnitKind,
    group: Group,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    options: Options,
    tables: Tables | None,
) -> list[float] | str:
    try:
        found = row.scores(
            group, criterion, statistics, damping=0.01, options=options, tables=tables
        )
    except PruneZeroError as error:
        return str(error)
    return found.tolist()


@pytest.mark.parametrize("update", [[], ["bias"], ["refit"], ["refit", "bias"]], ids=str)
def test_the_error_is_what_outputs_lose_after_the_update_in_the_eyes_of_the_loss(
    samples: UnitSamples, update: list[str]
) -> None:
    recipe = Recipe.model_validate(
        {
            **{"name": "it", "criterion": "M2", "unit": "width", "compare": "model"},
            **({"update": update} if update else {}),
        }
    )
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(group.units, generator=generator) > 0.4 for group in samples.groups]
    for kept in masks:
        kept[0] = True
    lost = whole = 0.0
    for group, kept in zip(samples.groups, masks, strict=True):
        linear = group.reader.linear
        known = samples.statistics[linear.name]
        lost += _slowly_lost(linear.weight.detach(), known, removed_by(group, kept), update)
        gram = known.sums["gram"].double() / known.tokens
        weight = _weighted(linear.weight.detach(), known)
        whole += float(torch.einsum("oi,ij,oj->", weight, gram, weight))
        if "bias" in update:
            mean = known.sums["input_sum"].double() / known.tokens
            whole -= float((weight @ mean).square().sum())
    unmeasured = tuple(replace(group, first=0) for group in samples.groups)
    plain = UnitSamples(unmeasured, samples.blocks, samples.statistics)
    assert plain.error(recipe, masks) == pytest.approx(lost / whole, rel=1e-6)


def test_with_measured_slopes_the_error_foretells_the_distance_in_nats(
    samples: UnitSamples,
) -> None:
    slopes = [0.003 * (1 + place) for place in range(len(samples.groups))]
    groups = tuple(
        replace(group, cost={**group.cost, "slope": slope}, first=1 + place % 2)
        for place, (group, slope) in enumerate(zip(samples.groups, slopes, strict=True))
    )
    measured = UnitSamples(groups, samples.blocks, samples.statistics)
    fields = {"name": "it", "criterion": "M2", "unit": "width", "compare": "group"}
    refitted = Recipe.model_validate({**fields, "update": "refit"})
    everything = [torch.ones(group.units, dtype=torch.bool) for group in groups]
    assert measured.error(refitted, everything) == 0.0
    for place, (group, slope) in enumerate(zip(groups, slopes, strict=True)):
        options = refitted.unit.options
        scores = _scores_or_fault(
            UNITS["width"], group, refitted.criterion, samples.statistics, options, None
        )
        assert isinstance(scores, list)
        masks = [kept.clone() for kept in everything]
        masks[place][torch.tensor(scores).argsort(stable=True)[: group.first]] = False
        foretold = measured.error(refitted, masks)
        assert foretold == pytest.approx(slope * group.first, rel=1e-6)
        # Two places cost what each costs, and columns that are not refitted cost no less.
        other = (place + 1) % len(groups)
        masks[other][0] = False
        alone = [masks[other] if one == other else kept for one, kept in enumerate(everything)]
        both = measured.error(refitted, masks)
        assert both == pytest.approx(foretold + measured.error(refitted, alone))
        assert measured.error(Recipe.model_validate(fields), masks) >= both


def _weighted(weight: Tensor, known: Statistics) -> Tensor:
    return weight.double() * (known.sums[ROW_WEIGHTS].double() / known.tokens).sqrt()[:, None]


def _slowly_lost(weight: Tensor, known: Statistics, gone: Tensor, update: Sequence[str]) -> float:
    """By least squares on rows whose second moments are those that were collected."""
    gram = known.sums["gram"].double() / known.tokens
    if "bias" in update:
        mean = known.sums["input_sum"].double() / known.tokens
        gram = gram - torch.outer(mean, mean)
    wanted = _weighted(weight, known)
    if "refit" not in update:
        removed = wanted[:, gone]
        return float(torch.einsum("oi,ij,oj->", removed, gram[gone][:, gone], removed))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inputs = torch.linalg.cholesky(damped, upper=True)
    outputs = inputs @ wanted.T
    found = torch.linalg.lstsq(inputs[:, ~gone], outputs).solution
    return float((outputs - inputs[:, ~gone] @ found).square().sum())


def test_masks_are_the_selection_of_the_pruning_itself(
    testbed: Testbed, samples: UnitSamples
) -> None:
    task = task_of()
    evaluator = Evaluator(task, [testbed])
    for rule in (
        Rule(Criterion.parse("M2/PARAMS"), {"compare": "model"}),
        Rule(Criterion.parse("A*row_mean(abs(W))"), {"unit": {"width": {"normalise": "l2"}}}),
    ):
        recipe = task.recipe(rule, "it")
        (masks,) = samples.masks_under(recipe, task.budgets)
        evaluator.result(Request.of(recipe, ("validation",)))
        outcome_of = evaluator._sampled[0].runner.outcome
        assert outcome_of is not None
        pruned = {group.name: kept for group, kept in outcome_of.selection}
        for group, kept in zip(samples.groups, masks, strict=True):
            assert torch.equal(kept, pruned[group.name])


@pytest.mark.parametrize("name", ["neurons", "heads", "width"])
def test_a_search_of_units_finds_candidates_and_goes_on_as_it_would_have(
    name: str, testbed: Testbed, tmp_path: Path
) -> None:
    task = make_task(config_of(tiny_space(name), 0.5, testbeds=[testbed]))
    whole = list(find(testbed, tiny_space(name), 0.5, folder=tmp_path / "whole", budget=14))
    assert sum(one.validation_perplexity is not None for one in whole) >= 1
    assert {one.status for one in whole} <= {"new", "known", "invalid"}
    found = []
    for resume in (False, True):
        session = open_session([testbed], task, tmp_path / "cut", resume=resume)
        try:
            found = list(search(session.rungs, max_candidates=14 if resume else 7))
        finally:
            session.journal.close()
    assert outcome(found) == outcome(whole)


@pytest.mark.parametrize("name", ["width", "neurons", "heads", "blocks"])
def test_a_search_of_units_from_scratch_begins_with_formulas_of_its_own(
    name: str, tmp_path: Path
) -> None:
    testbed = tiny_testbed(num_hidden_layers=4)
    options: dict[str, Any] = {"budget": 3, "from_scratch": True}
    found = list(find(testbed, tiny_space(name), 0.3, folder=tmp_path, **options))
    assert found[0].origin == "random" and "seed" not in {one.origin for one in found}
    assert any(one.validation_perplexity is not None for one in found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_measures_formulas_of_units(
    strategy: str, testbed: Testbed, tmp_path: Path
) -> None:
    space = tiny_space("width", signals="activations", tuned=0)
    found = list(find(testbed, space, 0.5, folder=tmp_path, budget=6, strategy=strategy))
    assert {one.mask for one in found if one.search_perplexity is not None} - {""}


def test_words_that_rank_units_alone_are_whole_formulas_for_optuna() -> None:
    task = task_of("blocks", fresh_depth=1, constants=[])
    proposals = itertools.islice(STRATEGIES["optuna"].start(task)(History(), 0), 40)
    found = {one.rule.criterion.text for one in proposals if one is not None}
    assert found == {"BI", "ANG", "REL", "NLL", "KL", "PARAMS", "FLOPS"}


def test_a_search_of_blocks_screens_by_the_distance_without_each(tmp_path: Path) -> None:
    testbed = tiny_testbed(num_hidden_layers=4)
    space = tiny_space("blocks", choices={"schedule": ["one-shot", "greedy"]})
    found = list(find(testbed, space, 0.3, folder=tmp_path, budget=6))
    assert any(one.validation_perplexity is not None for one in found)
    task = make_task(config_of(space, 0.3, testbeds=[testbed]))
    samples = Evaluator(task, [testbed])._sampled[0].samples
    assert isinstance(samples, UnitSamples)
    recipe = task.recipe(Rule(Criterion.parse("KL")), "it")
    distances = [
        float(depth_feature("KL", samples.statistics[group.name], {})) for group in samples.groups
    ]
    masks = [torch.tensor([group.block % 2 == 0]) for group in samples.groups]
    gone = sum(size for size, kept in zip(distances, masks, strict=True) if not kept)
    assert samples.error(recipe, masks) == pytest.approx(gone / sum(map(abs, distances)))


def test_rivals_are_published_recipes_of_such_units_as_they_are_and_on_the_winners_terms() -> None:
    task = task_of()
    as_published = {one.name: one for one in baselines(task)}
    assert {"wanda_sp", "flap", "mask_fisher"} <= as_published.keys()
    assert all(one.unit.word == "width" for one in as_published.values())
    assert as_published["flap"].updates == ("bias",)
    winner = task.recipe(
        Rule(Criterion.parse("M2/sqrt(PARAMS)"), {"compare": "model", "update": ["refit"]}), "won"
    )
    fair, refused = on_terms_of(winner, task)
    assert not refused
    told = {one.name: one for one in fair}
    assert told["flap +"].updates == ("refit",) and told["flap +"].compare == "model"
    assert told["flap +"].criterion == as_published["flap"].criterion


def test_a_rule_that_does_what_a_published_recipe_does_is_known_by_its_name() -> None:
    task = task_of()
    fisher = Rule(Criterion.parse("M2/PARAMS"), {"compare": "model"})
    assert published_equivalent(task, fisher) == "mask_fisher"
    other = Rule(Criterion.parse("M2/PARAMS"), {"compare": "model", "update": ["refit"]})
    assert published_equivalent(task, other) is None


def test_nothing_is_taken_from_a_formula_whose_values_count() -> None:
    task = task_of()
    rising = Criterion.parse("log(A + 1)")
    for choices, kept in (
        ({"compare": "model"}, False),
        ({"compare": "model", "unit": {"width": {"normalise": "zscore"}}}, True),
        ({"compare": "model", "unit": {"width": {"members": "all"}}}, True),
    ):
        seen = as_seen(rising, task.space, task.competing(choices))
        assert (seen == rising) is kept


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"unit": "nerve"}, "'nerve' is nothing that is removed"),
        ({"unit": "channel"}, "cannot be screened"),
        ({"terminals": ["M2", "X"]}, "feature X says nothing of unit x part"),
        ({"terminals": ["M2", "BI"]}, "feature BI says nothing of unit x part"),
        ({"terminals": ["M2", "row_sum(G_lora)"]}, "G_lora is known only while layers train"),
        ({"choices": {"schedule": ["while_training"]}}, "so it needs recover: lora"),
        ({"compare": "row"}, None),
        ({"compare": "layer"}, "says nothing of unit: width; known: group, model"),
        ({"choices": {"unit": ["width", "neuron"]}}, "another than the space's own"),
        ({"choices": {"update": [["obs"]]}}, "obs is for unit weight"),
        ({"signals": "oracle"}, None),
    ],
    ids=str,
)
def test_a_space_that_says_nothing_of_its_units_is_refused(
    changes: dict[str, object], sentence: str | None, tmp_path: Path
) -> None:
    import yaml

    fields = {**SearchSpace.load("width").model_dump(mode="json"), **changes}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(fields))
    if sentence is None:
        assert SearchSpace.load(path).compare == "group"
        return
    with pytest.raises(RecipeError, match=sentence):
        SearchSpace.load(path)


def test_cheaper_signals_leave_out_what_costs_more() -> None:
    space = SearchSpace.load("width", signals="activations")
    assert {"M2", "Lr0"}.isdisjoint(space.features) and "A" in space.features
    assert [list(one) for one in space.choices["update"]] == [["none"], ["bias"]]
    assert not space.weighted_by_gradient


def test_only_linear_maps_with_units_are_looked_at(samples: UnitSamples, testbed: Testbed) -> None:
    linears = find_linears(testbed.language_model.model)
    readers = {group.reader.linear.name for group in samples.groups}
    assert readers <= {linear.name for linear in linears}
    assert {name.rsplit(".", 1)[-1] for name in readers} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_updates_of_biases_are_left_out_where_a_model_can_have_none(
    family: str, tmp_path: Path
) -> None:
    testbed = tiny_testbed(family)
    asked = config_of(tiny_space("width"), 0.3, testbeds=[testbed])
    config, reason = without_missing_biases(asked, [tiny_testbed(), testbed])
    if family != "mistral":
        assert (config, reason) == (asked, "")
        return
    assert "has no bias, and the configuration of this model (mistral)" in reason
    assert config.space_content.choices["update"] == (["none"], ["refit"])
    assert without_missing_biases(config, [testbed]) == (config, "")
    task = make_task(config)
    names = [one.name for one in baselines(task)]
    assert "mask_fisher" in names and not {"flap", "obs_bias"} & {*names}
    session = open_session([testbed], task, tmp_path)
    (candidate, *_) = search(session.rungs, max_candidates=1)
    session.rungs.close()
    assert candidate.fault == ""
