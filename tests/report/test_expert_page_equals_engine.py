"""Of random recipes that remove experts, page and engine choose the same and refuse the same.

    F=tests/report/test_expert_page_equals_engine.py
    PRUNEZERO_RANDOM_EXPERT_RECIPES=500 python -m pytest -s $F

runs that many from text to the smaller model, on tiny mixtures of nine families.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import OutputError, PruneZeroError, RecipeError
from prunezero.formula.features import FEATURES, features_of_domain
from prunezero.formula.vocabulary import OPERATORS
from prunezero.models.editing.routing import without_experts
from prunezero.models.editing.selection import Selection
from prunezero.models.loading.load import load_model
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.report.export.page import no_page, pruner_page
from prunezero.searching.spaces.space import SearchSpace
from tests.tiny_models import tiny_batches
from tests.tiny_moe import MIXTURES, MORE, moe_model, moe_network, save_moe

# Random formulas are simplified here and there, which is told.
pytestmark = pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
COUNT = int(os.environ.get("PRUNEZERO_RANDOM_EXPERT_RECIPES", "18"))
WINDOWS = tiny_batches(3, 12)
FAMILIES = (*MIXTURES, *MORE)


def formula(rng: random.Random, depth: int) -> str:
    space = SearchSpace.load("experts")
    words = [*map(str, space.terminals), "RND", "PARAMS", *features_of_domain("expert")]
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(words) if rng.random() < 0.93 else str(rng.choice(space.constants))
    operator = OPERATORS[rng.choice(list(space.operators))]
    sides = {"x": formula(rng, depth - 1), "y": formula(rng, depth - 1)}
    text = re.sub(r"\b[xy]\b", lambda found: f"({sides[found[0]]})", operator.usage)
    return text.replace("** 0.5", f"** ({rng.choice(space.exponents)})")


def drawn(rng: random.Random) -> Recipe:
    """The first random recipe that is one; one of ten is what no page can follow."""
    while True:
        numbers: dict[str, Any] = {}
        if rng.random() < 0.4:
            numbers = rng.choice(
                [{"guard": "super"}, {"protect_first": 1}, {"measure": "parameters"}, {"seed": 7}]
            )
        fields: dict[str, Any] = {
            "name": "random",
            "criterion": formula(rng, rng.choice([0, 1, 2])),
        }
        fields |= {"compare": rng.choice(["group", "model"]), "unit": {"expert": numbers}}
        if rng.random() < 0.1:
            fields["unit"] = {"expert": {"instead": "mean"}}
        with suppress(RecipeError):
            return validated(Recipe, fields, "random")


def answer_of_page(family: str, text: str, sparsity: float, **changes: Any) -> Any:
    """The model, what stays and the sparsity told; or what is refused."""
    network, names = moe_network(family, **changes), dict[str, Any](__name__="page")
    exec(compile(text, "<page>", "exec", dont_inherit=True), names)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        report = names["prune_"](network, torch.split(WINDOWS, 1), sparsity)
    except names["RefusalError"] as error:
        after = network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        return str(error)
    kept = {name: stays.tolist() for name, stays in report["kept"].items()}
    return network, kept, report["sparsity"]


def fault(family: str, recipe: Recipe, sparsity: float, **changes: Any) -> str:
    """How page and engine differ; nothing where they do not, or both refuse."""
    model = moe_model(family, **changes)
    found = answer_of_page(family, pruner_page(recipe), sparsity, **changes)
    try:
        outcome = prune(model, recipe, sparsity, windows=WINDOWS)
    except PruneZeroError as error:
        return "refused" if isinstance(found, str) else f"page removes, engine: {error}"
    if isinstance(found, str):
        return f"engine removes, page: {found}"
    network, kept, told = found
    if kept != {group.name: stays.tolist() for group, stays in outcome.selection}:
        return f"other experts: {kept}"
    if told != outcome.sparsity_reached:
        return f"told {told} for {outcome.sparsity_reached}"
    with without_experts(model, outcome.selection), torch.no_grad():
        wanted = model.model(WINDOWS).logits
        if not torch.equal(network(WINDOWS).logits, wanted):
            return "the smaller model computes something else"
    return ""


def test_experts_and_refusals_are_the_same_from_text_to_the_smaller_model() -> None:
    results: Counter[str] = Counter()
    faults = []
    for seed in range(COUNT):
        rng = random.Random(f"experts {seed}")
        family, recipe = FAMILIES[seed % len(FAMILIES)], drawn(rng)
        sparsity = rng.choice([0.17, 0.34, 0.5, 1 / 3, 0.0, 0.9])
        if no_page(recipe):
            with pytest.raises(OutputError, match="cannot follow"):
                pruner_page(recipe)
            results["no page"] += 1
            continue
        said = fault(family, recipe, sparsity)
        results["both refuse" if said == "refused" else said or "same"] += 1
        if said not in ("", "refused"):
            faults.append(f"{seed}: {family} {recipe.effect} at {sparsity}: {said}")
    print(f"\n{COUNT} recipes: {dict(results)}")
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults[:8])
    assert results["same"] > COUNT // 3


@pytest.mark.parametrize("recipe", published_of("expert"), ids=lambda one: one.name)
def test_published_recipes_have_a_page_or_a_reason(recipe: Recipe) -> None:
    without = {"mone", "dynamic_skipping", "expert_sparsity", "expert_sparsity_progressive"}
    if recipe.name in without | {"reap_evolved"}:
        assert no_page(recipe)
        return
    program = pruner_page(recipe)
    assert "import prunezero" not in program and "from prunezero" not in program
    assert fault("qwen3_moe", recipe, 0.34) == ""


def test_a_page_looks_at_nothing_that_its_formula_does_not_read() -> None:
    text = pruner_page(Recipe.load("aimer"))
    for word in ("class Watch", "def measure", "zlib", "backward"):
        assert word not in text
    assert len(text.splitlines()) < 400
    assert {name for name in features_of_domain("expert") if FEATURES[name].sums}


def test_the_command_writes_a_folder_of_the_plain_class(tmp_path: Path) -> None:
    folder, text = save_moe("deepseek_v3", tmp_path / "dense"), tmp_path / "letters.txt"
    text.write_text("".join(random.Random(1).choices("abcdefgh ,.", k=600)))
    page = tmp_path / "reap.py"
    page.write_text(pruner_page(Recipe.load("reap")))
    words = [sys.executable, str(page), str(folder), str(text), "--output", str(tmp_path / "out")]
    words += ["--sparsity", "0.34", "--length", "16"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "experts left: 4 in model.layers.1.mlp" in done.stdout
    model = load_model(str(folder))
    ids = [model.tokenizer(text.read_text()).input_ids]
    windows = torch.tensor(ids)[:, : len(ids[0]) // 16 * 16].reshape(-1, 16)
    outcome = prune(model, Recipe.load("reap"), 0.34, windows=windows)
    assert isinstance(outcome.selection, Selection)
    with without_experts(model, outcome.selection):
        wanted = model.model(WINDOWS).logits
    assert torch.equal(load_model(str(tmp_path / "out")).model(WINDOWS).logits, wanted)
