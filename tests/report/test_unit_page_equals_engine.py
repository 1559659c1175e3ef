"""Of random recipes that remove units, page and engine choose the same and refuse the same.

    F=tests/report/test_unit_page_equals_engine.py
    PRUNEZERO_RANDOM_UNIT_RECIPES=500 python -m pytest -s $F

runs that many from text to weights on tiny models of eight layouts, in three dtypes.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import OutputError, PruneZeroError, RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.report.export.page import no_page, pruner_page
from prunezero.scoring.statistics import SUMS, Statistics
from tests.report.random_unit_recipes import random_share, random_unit_recipe
from tests.tiny_models import LAYOUTS, tiny_batches, tiny_model

# Random formulas are simplified here and there, which is told.
pytestmark = pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
COUNT = int(os.environ.get("PRUNEZERO_RANDOM_UNIT_RECIPES", "32"))
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
# Mended numbers, relative to the largest: what a solve makes of the last bits of sums.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Stand:
    """A model with all that was seen of it."""

    model: LanguageModel
    windows: Tensor
    statistics: dict[str, Statistics]


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    refusal: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, list[bool]] = field(default_factory=dict)
    sparsity: float = 0.0


def fresh(family: str, dtype: torch.dtype) -> LanguageModel:
    """The same model each time; an update may have given the one before biases."""
    network = tiny_model(family, num_hidden_layers=3) if family == "llama" else tiny_model(family)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.linspace(-0.1, 0.2, parameter.numel()).view_as(parameter))
    network.model.to(dtype)
    device = torch.device("cpu")
    return LanguageModel(network.model, None, family, f"{family} {dtype}", dtype, device)


@functools.cache
def stand(family: str, dtype: torch.dtype) -> Stand:
    model, windows = fresh(family, dtype), tiny_batches(3, 12)
    return Stand(model, windows, calibrate(model, windows, find_linears(model.model), SUMS))


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def engine(family: str, dtype: torch.dtype, recipe: Recipe, sparsity: float) -> Answer:
    model, known = fresh(family, dtype), stand(family, dtype).statistics
    sums = dense_sums([recipe])
    asked = {
        name: Statistics(one.tokens, one.sequences, {sum: one.sums[sum] for sum in sums})
        for name, one in known.items()
    }
    try:
        outcome = prune(model, recipe, sparsity, statistics=asked, windows=tiny_batches(3, 12))
    except PruneZeroError as error:
        return Answer(refusal=str(error))
    kept = {group.name: stays.tolist() for group, stays in outcome.selection}
    return Answer("", weights(model), kept, outcome.sparsity_reached)


def page(family: str, dtype: torch.dtype, text: str, sparsity: float) -> Answer:
    model, names = fresh(family, dtype), dict[str, Any](__name__="page")
    exec(compile(text, "<page>", "exec", dont_inherit=True), names)
    before = weights(model)
    try:
        report = names["prune_"](model.model, torch.split(tiny_batches(3, 12), 1), sparsity)
    except names["RefusalError"] as error:
        after = weights(model)
        assert after.keys() == before.keys(), "a refusal changes nothing"
        assert all(torch.equal(after[name], before[name]) for name in before)
        return Answer(refusal=str(error))
    kept = {name: stays.tolist() for name, stays in report["kept"].items()}
    return Answer("", weights(model), kept, report["sparsity"])


def fault(wanted: Answer, found: Answer, *, dtype: torch.dtype, is_mended: bool) -> str:
    """How page and engine differ; nothing where they do not."""
    if wanted.refusal or found.refusal:
        if wanted.refusal and found.refusal:
            return ""
        who = "pruned where refused" if wanted.refusal else "refused where pruned"
        return f"{who}: {wanted.refusal}{found.refusal}"
    if list(wanted.kept.items()) != list(found.kept.items()):
        return "other units"
    if wanted.sparsity != found.sparsity:
        return f"told {found.sparsity} for {wanted.sparsity}"
    if wanted.weights.keys() != found.weights.keys():
        return "other parameters"
    for name, value in wanted.weights.items():
        if is_mended:
            scale = float(value.abs().max()) or 1.0
            if not float((found.weights[name] - value).abs().max()) <= CLOSE[dtype] * scale:
                return f"other numbers in {name}"
        elif not torch.equal(found.weights[name].view(torch.uint8), value.view(torch.uint8)):
            return f"other bits in {name}"
    return ""


def drawn(rng: random.Random) -> Recipe:
    """The first random recipe that is one: formulas may be of single weights, or constant."""
    while True:
        with suppress(RecipeError):
            return validated(Recipe, random_unit_recipe(rng), "random")


def test_units_weights_and_refusals_are_the_same_from_text_to_weights() -> None:
    results: Counter[str] = Counter()
    faults = []
    for seed in range(COUNT):
        rng = random.Random(f"units {seed}")
        family, dtype = LAYOUTS[seed % len(LAYOUTS)], rng.choice(DTYPES)
        recipe, sparsity = drawn(rng), random_share(rng)
        if no_page(recipe):
            with pytest.raises(OutputError, match="cannot follow|the dense model alone"):
                pruner_page(recipe)
            results["no page"] += 1
            continue
        wanted = engine(family, dtype, recipe, sparsity)
        found = page(family, dtype, pruner_page(recipe), sparsity)
        said = fault(wanted, found, dtype=dtype, is_mended=bool(recipe.updates))
        results["both refuse" if wanted.refusal and found.refusal else said or "same"] += 1
        if said:
            faults.append(f"{seed}: {family} {dtype} {recipe.effect} at {sparsity}: {said}")
    print(f"\n{COUNT} recipes: {dict(results)}")
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults[:8])
    assert results["same"] > COUNT // 3
