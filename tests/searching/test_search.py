"""The search: deterministic, exactly resumable, and blind to masks it has seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunezero.errors import OutputError, PruneZeroWarning, SearchError
from prunezero.formula import Criterion
from prunezero.searching.evaluation.journal import Journal
from prunezero.searching.experiment.baselines import published_equivalent
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.search import search
from prunezero.searching.session import (
    Session,
    finalists,
    found_recipe,
    measure_baselines,
    measure_finalist,
    open_session,
)
from tests.searching.testbed import make_task, tiny_space, tiny_testbed


@pytest.fixture(autouse=True)
def closed_journals() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().journal.close()


OPENED: list[Session] = []


def session_in(
    folder: Path, name: str = "formulas", *, resume: bool = False, seed: int = 0, **space: object
) -> Session:
    task = make_task(tiny_space(name, **space), 0.5, seed=seed)
    session = open_session([tiny_testbed()], task, folder, resume=resume)
    OPENED.append(session)
    return session


def outcome(candidates: list[Candidate]) -> list[tuple[object, ...]]:
    """What must not depend on interruptions: everything but seconds and replays."""
    return [
        (one.slot, one.criterion.text, one.origin, one.parents, one.status, one.mask)
        + (one.layer_error, one.kl, one.search_perplexity, one.validation_perplexity)
        for one in candidates
    ]


def test_the_same_seed_gives_the_same_candidates_and_another_seed_others(tmp_path: Path) -> None:
    first = outcome(list(search(session_in(tmp_path / "a").rungs, max_candidates=20)))
    again = outcome(list(search(session_in(tmp_path / "b").rungs, max_candidates=20)))
    other = outcome(list(search(session_in(tmp_path / "c", seed=1).rungs, max_candidates=20)))
    assert first == again
    assert first != other
    assert {row[4] for row in first} >= {"new", "known"}
    assert {row[2] for row in first} >= {"seed", "random", "mutate"}


def test_a_candidate_whose_mask_is_known_is_never_scored_again(tmp_path: Path) -> None:
    session = session_in(tmp_path / "a")
    found = list({one.slot: one for one in search(session.rungs, max_candidates=30)}.values())
    screened = [one for one in found if one.status == "new"]
    assert len({one.mask for one in screened}) == len(screened) == 30
    known = [one for one in found if one.status == "known"]
    assert known and all(one.seconds == 0 for one in known)


@pytest.mark.parametrize(
    ("formula", "duplicate"),
    [
        ("abs(W)*X", "3*abs(W)*X + 0.5"),
        ("abs(W)*X", "exp(abs(W)*X)"),
        ("abs(W)*X", "W**2*X**2"),
        ("abs(W)*X", "minmax(abs(W)*X)"),
        ("abs(W)*X", "abs(W)*X/R1"),
        ("abs(W)*X", "abs(W)*X*matrix_norm(W)"),
    ],
)
def test_monotone_wrappers_scalings_and_row_factors_have_the_same_mask(
    formula: str, duplicate: str, tmp_path: Path
) -> None:
    rungs = session_in(tmp_path / "a").rungs
    one, other = (rungs.probe(Criterion.parse(text)) for text in (formula, duplicate))
    assert one is not None and other is not None
    assert one.digest == other.digest
    different = rungs.probe(Criterion.parse("abs(W)"))
    assert different is not None and different.digest != one.digest


def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = outcome(list(search(session_in(tmp_path / "whole").rungs, max_candidates=20)))
    rng = random.Random(0)
    for _ in range(3):
        session = session_in(tmp_path / "parts", resume=True)
        steps = rng.randrange(3, 12)
        for _, _ in zip(range(steps), search(session.rungs, max_candidates=20), strict=False):
            pass
        session.journal.close()
    session = session_in(tmp_path / "parts", resume=True)
    parts = list(search(session.rungs, max_candidates=20))
    assert outcome(parts) == whole
    assert any(one.is_replayed for one in parts) and not all(one.is_replayed for one in parts)


def test_a_torn_last_record_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path, {"model": "a"}, resume=False)
    journal.write("layer error", "W", {"layer_error": 0.1})
    before = path.stat().st_size
    journal.write("layer error", "X", {"layer_error": 0.2})
    journal.close()
    content = path.read_bytes()
    for cut in range(before, len(content)):
        path.write_bytes(content[:cut])
        journal = Journal(path, {"model": "a"}, resume=True)
        assert journal.known("layer error", "W") == {"layer_error": 0.1}
        assert journal.known("layer error", "X") is None
        journal.write("layer error", "X", {"layer_error": 0.3})
        journal.close()
        journal = Journal(path, {"model": "a"}, resume=True)
        assert journal.known("layer error", "X") == {"layer_error": 0.3}
        journal.close()


def test_an_edited_line_of_a_journal_is_named_and_counts_for_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path, {"model": "a"}, resume=False)
    for word in "WXG":
        journal.write("layer error", word, {"layer_error": 0.1})
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'"X"', b'"Y"'))
    with pytest.warns(PruneZeroWarning, match="line 3: damaged"):
        journal = Journal(path, {"model": "a"}, resume=True)
    known = {word: journal.known("layer error", word) for word in "WXYG"}
    journal.close()
    assert [word for word, result in known.items() if result is not None] == ["W", "G"]


def test_resuming_under_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    session_in(tmp_path / "a").journal.close()
    with pytest.raises(SearchError, match="seed: 0, now 1"):
        session_in(tmp_path / "a", resume=True, seed=1)
    with pytest.raises(SearchError, match="space: .*, now"):
        session_in(tmp_path / "a", resume=True, generation=7)
    with pytest.raises(SearchError, match="model: "):
        task = make_task(tiny_space(), 0.5)
        open_session([tiny_testbed(intermediate_size=32)], task, tmp_path / "a", resume=True)


def test_a_search_is_never_overwritten_and_never_run_twice_at_once(tmp_path: Path) -> None:
    session = session_in(tmp_path / "a")
    with pytest.raises(SearchError, match="in use"):
        session_in(tmp_path / "a", resume=True)
    session.journal.close()
    with pytest.raises(SearchError, match="--resume"):
        session_in(tmp_path / "a")


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        session_in(tmp_path / "file" / "run")


def test_the_winner_is_measured_on_text_that_the_search_never_saw(tmp_path: Path) -> None:
    session = session_in(tmp_path / "a")
    candidates = list({one.slot: one for one in search(session.rungs, max_candidates=12)}.values())
    final = finalists(candidates)
    assert len({one.slot for one in final}) == len(final) >= 3
    assert all(one.validation_perplexity is not None for one in final)
    row = measure_finalist(session, final[0])
    assert row["validation_perplexity"] != final[0].search_perplexity
    assert "test_perplexity" not in row and "search_perplexity" not in row
    recipe = found_recipe(session, "mine", final[0])
    assert recipe.criterion == final[0].criterion
    assert recipe.provenance["model_fingerprint"] == session.testbeds[0].language_model.fingerprint
    baselines = list(measure_baselines(session, ("validation", "test")))
    assert [row["recipe"] for row in baselines] == [
        "dense",
        "magnitude",
        "wanda",
        "ria",
        "gblm",
        "pruner_zero",
        "fisher",
    ]


def test_a_search_without_a_measured_candidate_says_what_to_do() -> None:
    with pytest.raises(SearchError, match="--resume"):
        finalists([])


def test_stop_ends_the_search_between_two_pieces_of_work(tmp_path: Path) -> None:
    asked = itertools.count()
    session = session_in(tmp_path / "a")
    found = list(search(session.rungs, max_candidates=50, stop=lambda: next(asked) >= 20))
    assert 0 < len(found) < 20
    written = len(session.journal)
    assert next(asked) < 25 and written < 20


def test_a_space_that_is_exhausted_ends_the_search(tmp_path: Path) -> None:
    task = make_task(
        tiny_space(
            terminals=["abs(W)", "X"], operators=["neg"], constants=[], choices={}, max_complexity=6
        ),
        0.5,
    )
    session = open_session([tiny_testbed()], task, tmp_path / "a")
    OPENED.append(session)
    found = list(search(session.rungs))
    assert len({one.mask for one in found if one.status == "new"}) == 2


def test_scratch_starts_without_published_formulas_and_the_default_with_them() -> None:
    space = tiny_space(max_complexity=20)
    texts = {criterion.text for criterion in make_task(space, 0.5).seeds}
    assert {"abs(W)*X", "W**2*minmax(G)", "(abs(W)/C1 + abs(W)/R1)*sqrt(X)"} <= texts
    assert make_task(space, 0.5, from_scratch=True).seeds == ()


@pytest.mark.parametrize(
    ("formula", "pattern", "compare", "duplicate"),
    [
        ("log(W**2 * X**2 / R1)", "free", "row", "wanda"),
        ("W**2 * X**2", "free", "layer", "obd"),
        ("3 * abs(W)", "free", "layer", "magnitude"),
        ("3 * W**2 * X**2", "2:4", "layer", "obd"),
        ("abs(W) * X**0.4", "free", "row", None),
    ],
)
def test_a_published_formula_is_known_in_another_dress(
    formula: str, pattern: str, compare: str, duplicate: str | None
) -> None:
    task = make_task(tiny_space(compare=compare), 0.5, pattern=pattern, seed=0)
    assert published_equivalent(task, Criterion.parse(formula)) == duplicate
