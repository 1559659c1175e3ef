"""A candidate that is invalid says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunezero.searching.evaluation.rungs import Rungs
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.search import search
from tests.searching.test_search import session_in


def first_of(folder: Path) -> Candidate:
    """The first candidate that a search hands over."""
    session = session_in(folder)
    found = next(iter(search(session.rungs, max_candidates=3)))
    session.journal.close()
    return found


def answering(result: dict[str, Any]) -> Any:
    """A rung that says the same of everything."""

    def results(self: Rungs, rules: Any, *rest: Any) -> Iterator[dict[str, Any]]:
        for _ in rules:
            yield result

    return results


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"fault": "layer 3 is constant"}, "layer 3 is constant"),
        ({"layer_error": None}, "its layer error is not finite"),
    ],
)
def test_the_words_of_an_evaluator_are_kept(
    result: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rungs, "errors", answering(result))
    found = first_of(tmp_path)
    assert (found.status, found.fault) == ("invalid", words)
    assert found.row()["fault"] == words


def test_a_rule_without_a_mask_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rungs, "probe", lambda self, rule: None)
    found = first_of(tmp_path)
    assert found.status == "invalid" and "all alike" in found.fault


def test_others_have_no_fault(tmp_path: Path) -> None:
    found = first_of(tmp_path)
    assert found.status == "new" and found.fault == ""
