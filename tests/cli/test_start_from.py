"""A search that starts from what another one found, or from a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import SearchError
from prunezero.formula import Criterion
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.runs.summary import front, read_run
from prunezero.report.runs.warm_start import rules_of
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.experiment.rule import Rule
from tests.cli.conftest import Run, small_space
from tests.searching.testbed import make_task, tiny_space

OFFERS: dict[str, Any] = {"compare": ["row", "model"], "update": [["none"], ["admm"]]}


def task_of(start: list[Rule], **options: Any) -> Any:
    return make_task(tiny_space(choices=OFFERS), 0.5, start=start, **options)


def test_a_task_begins_with_these_rules_as_far_as_its_space_can_write_them() -> None:
    known = Rule(Criterion.parse("abs(W)*G"), {"compare": "model", "update": "admm"})
    half = Rule(Criterion.parse("abs(W)*Y"), {"update": ["obs"], "compare": "model"})
    foreign = Rule(Criterion.parse("abs(W)*H"))
    task = task_of([known, half, foreign])
    # Spelled as the space spells them; what it does not offer is left out.
    assert [rule.text for rule in task.seeds[:2]] == [
        "abs(W)*G; compare: model; update: ['admm']",
        "abs(W)*Y; compare: model",
    ]
    published = [rule.text for rule in task_of([]).seeds]
    assert published and [rule.text for rule in task.seeds[2:]] == published
    assert len(task_of([known], from_scratch=True).seeds) == 1
    with pytest.raises(SearchError, match="none of the 1 rules to start from can be written"):
        task_of([foreign])


def test_a_recipe_gives_its_formula_and_the_choices_that_a_search_may_make() -> None:
    (rule,) = rules_of("sparsegpt", Path("runs"))
    assert rule.criterion == Recipe.load("sparsegpt").criterion
    assert rule.choices == {"compare": "128 columns", "update": "obs"}


def test_a_search_starts_from_another_goes_on_and_keeps_what_that_had_found(
    run: Run, finished_search: Path
) -> None:
    shutil.copytree(finished_search, "runs/old")
    small_space(Path("small.yaml"))
    found = read_run(Path("runs/old"))
    begun = {rule.text for rule in rules_of("old", Path("runs"))}
    assert found.recipe is not None and len(begun) >= len(front(found.candidates or ())) > 1
    command = "search MODEL --sparsity 0.7 --space small.yaml --budget 6 --name new"
    result = run(f"{command} --from-scratch --start-from old")
    assert result.exit_code == 0, (result.output, result.exception)
    header = read_journal(Path("runs/new/journal.jsonl"))[0]["header"]
    assert set(header["fingerprints"]["seeds"]) == begun
    told = json.loads(Path("runs/new/search.json").read_text())
    assert told["start_from"] == ["old"] and len(told["start"]) >= len(begun)
    # The other search may be gone by then.
    shutil.rmtree("runs/old")
    again = run("search --name new --resume --budget 6")
    assert again.exit_code == 0, (again.output, again.exception)
    assert run("search --name new --resume --budget 6 --start-from old").exit_code == 0
    refused = run("search --name new --resume --budget 6 --start-from wanda")
    assert "--start-from old, now wanda" in str(refused.exception)
    assert run("show new").exit_code == 0
    verified = run("verify new --top 1")
    assert verified.exit_code == 0, (verified.output, verified.exception)
    missing = run(f"{command} --start-from older")
    assert isinstance(missing.exception, SearchError) and "older" in str(missing.exception)
