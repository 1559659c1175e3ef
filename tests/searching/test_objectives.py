"""A search may look for another measure than perplexity, and is one search by that measure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.cli.final_table import verdict
from prunezero.cli.tables import results_table
from prunezero.errors import SearchError
from prunezero.formula import Criterion
from prunezero.models.anatomy.linears import find_linears
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.staging import prune
from prunezero.report.runs.candidate_tables import best_first
from prunezero.report.runs.summary import front, latex_of_front
from prunezero.report.tracking.records import candidate_name, row_metrics
from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.objectives import OBJECTIVES
from prunezero.searching.experiment.provenance import comparable, header, header_digest
from prunezero.searching.search import search
from prunezero.searching.session import Session, finalists, open_session
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

ACCEPTANCE = OBJECTIVES["acceptance"]
OTHERS = [word for word in OBJECTIVES if word != "perplexity"]


@contextmanager
def opened(
    folder: Path, objective: str, *, resume: bool = False, **named: Any
) -> Iterator[Session]:
    # Of larger weights pruning changes more of what the model says.
    testbed = tiny_testbed(initializer_range=0.3)
    space = tiny_space(tuned=0, measured=4)
    task = make_task(space, 0.6, testbeds=[testbed], objective=objective, **named)
    session = open_session([testbed], task, folder, resume=resume)
    with closing(session.journal):
        yield session


def last_of_each(session: Session, budget: int = 14) -> list[Candidate]:
    found = search(session.rungs, max_candidates=budget)
    return list({one.slot: one for one in found}.values())


def chances(session: Session, split: str) -> Tensor:
    """Of every next token, float64 [windows, tokens, vocabulary]."""
    testbed = session.testbeds[0]
    with torch.no_grad():
        logits = testbed.language_model.model(testbed.windows(split)).logits
    return logits[:, :-1].double().softmax(-1)


@pytest.mark.parametrize("objective", OTHERS)
def test_who_is_measured_validated_and_found_is_the_best_by_the_objective(
    objective: str, tmp_path: Path
) -> None:
    with opened(tmp_path / "run", objective) as session:
        found = last_of_each(session)
    own = OBJECTIVES[objective]
    measured = [one for one in found if one.search_objective is not None]
    assert len(measured) > 4 and all(one.search_perplexity is not None for one in measured)
    # What the rungs say is what the pruned model does.
    one = measured[-1]
    testbed = session.testbeds[0]
    layers = find_linears(testbed.language_model.model)
    weights = [layer.weight.clone() for layer in layers]
    dense = chances(session, "search")
    recipe = session.task.recipe(one.rule, "it")
    statistics = testbed.statistics(layers, dense_sums([recipe]))
    calibration = testbed.windows("calibration")
    prune(testbed.language_model, recipe, 0.6, statistics=statistics, windows=calibration)
    pruned = chances(session, "search")
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
    expected = {
        "kl": (dense * (dense / pruned).log()).sum(-1).mean(),
        "agreement": (dense.argmax(-1) == pruned.argmax(-1)).double().mean(),
        "acceptance": torch.minimum(dense, pruned).sum(-1).mean(),
    }
    assert one.search_objective == pytest.approx(float(expected[objective]), rel=1e-3)
    # The best on search text stand on validation text, whatever their perplexity.
    best = sorted(measured, key=lambda it: (own.turned(it.search_objective or 0.0), it.slot))
    assert finalists(found)[:3] == best[:3]
    assert all(it.validation_objective is not None for it in best[:3])
    assert best[0].search_objective != best[3].search_objective


def test_an_interrupted_search_by_another_objective_goes_on_to_the_same_end(
    tmp_path: Path,
) -> None:
    def outcome(found: list[Candidate]) -> list[Candidate]:
        return [replace(one, seconds=0.0, is_replayed=False) for one in found]

    with opened(tmp_path / "whole", "acceptance") as session:
        whole = outcome(list(search(session.rungs, max_candidates=14)))
    rng = random.Random(0)
    for _ in range(2):
        with opened(tmp_path / "parts", "acceptance", resume=True) as session:
            steps = search(session.rungs, max_candidates=14)
            for _, _ in zip(range(rng.randrange(8, 16)), steps, strict=False):
                pass
    with opened(tmp_path / "parts", "acceptance", resume=True) as session:
        parts = list(search(session.rungs, max_candidates=14))
    assert any(one.is_replayed for one in parts) and outcome(parts) == whole
    assert any(one.validation_objective is not None for one in parts)
    with pytest.raises(SearchError, match="under other settings .*objective"):
        with opened(tmp_path / "parts", "perplexity", resume=True):
            pass


def test_a_control_that_screens_nothing_keeps_the_objective_of_a_known_mask(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "run", "acceptance", strategy="plain-gp") as session:
        found = last_of_each(session, 30)
    value_of = {one.mask: one.search_objective for one in found if one.status == "new"}
    known = [one for one in found if one.status == "known" and one.mask in value_of]
    assert known and all(one.search_objective == value_of[one.mask] for one in known)


def test_a_search_by_perplexity_has_the_header_that_it_had_before_there_were_others() -> None:
    testbeds = [tiny_testbed()]
    task = make_task(tiny_space(), 0.5)
    told = header(task, testbeds)
    assert "objective" not in json.dumps(told)
    other = header(make_task(tiny_space(), 0.5, objective="kl"), testbeds)
    assert comparable(other).keys() - comparable(told).keys() == {"objective"}
    assert header_digest(other) != header_digest(told)


def test_a_word_that_is_no_objective_is_refused_with_the_nearest() -> None:
    with pytest.raises(SearchError, match="'acceptence' .* did you mean 'acceptance'"):
        make_task(tiny_space(), 0.5, objective="acceptence")


def candidate(slot: int, formula: str, accepted: float | None, **changes: Any) -> Candidate:
    plain = Candidate(slot, 0, Criterion.parse(formula), "random", (), "new")
    return replace(plain, objective="acceptance", search_objective=accepted, **changes)


def test_tables_and_the_front_put_the_highest_acceptance_first() -> None:
    rows = [
        candidate(0, "abs(W)", 0.5, search_perplexity=10.0).row(),
        candidate(1, "abs(W)*X", 0.75, search_perplexity=30.0, validation_objective=0.7).row(),
        candidate(2, "abs(W)*G", 0.625, search_perplexity=5.0).row(),
        candidate(3, "abs(W)*X*G", 0.7, search_perplexity=1.0).row(),
        candidate(4, "abs(W)*X*R1", None).row(),
    ]
    assert [row["slot"] for row in best_first(rows)] == [1, 3, 2, 0, 4]
    assert [row["slot"] for row in front(rows)] == [0, 1]
    assert "4 & 0.7500 & 0.7000 &" in latex_of_front(front(rows))
    assert candidate_name(rows[1]) == "g00-c0001 · 0.7500"
    assert row_metrics(rows[1])["eval/search_acceptance"] == 0.75


def test_the_winner_is_held_against_the_highest_acceptance_window_by_window() -> None:
    def row(name: str, validation: float, test: float, **more: Any) -> dict[str, Any]:
        windows = {"test": [test + 0.01 * place for place in range(-2, 3)]}
        values = {"validation_acceptance": validation, "test_acceptance": test}
        perplexities = {"validation_perplexity": 1.0 / test, "test_perplexity": 50 * test}
        return {"recipe": name, **values, **perplexities, "window_acceptance": windows, **more}

    rows = [row("dense", 1.0, 1.0), row("wanda", 0.8, 0.7), row("ria", 0.75, 0.9)]
    told = verdict([*rows, row("wanda +", 0.85, 0.76), row("it", 0.9, 0.8)], ACCEPTANCE)
    chance = chance_of_no_gain([0.0] * 5, [0.04, 0.041, 0.042, 0.043, 0.044])
    assert told == [
        "better than wanda +, the best of these on validation text: test acceptance 80.00 % "
        f"against 76.00 % (+4.00 points; chance of no gain {chance:.2g} over 5 windows)",
        "of the 10.00 % that it gains over wanda as published, 4.00 % (40%) are left on the same "
        "terms: those are the formula's",
    ]
    rounded = {"test_acceptance_rounding": 0.05, "test_rounding": 9.0}
    (told_again,) = verdict([rows[0], rows[1], row("it", 0.9, 0.74, **rounded)], ACCEPTANCE)
    assert told_again.startswith("no better than wanda, ")
    assert told_again.endswith("; 5.00 % may be rounding")
    table = results_table(rows, "rows", best="test_acceptance")
    assert [bool(one.style) for one in table.rows] == [False, False, True]
