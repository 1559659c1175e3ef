"""A candidate that is invalid says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunezero.searching.evaluation.rungs import Ladder
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.search import search
from tests.searching.test_search import session_in


def first_of(folder: Path) -> Candidate:
    """The first candidate that a search hands over."""
    session = session_in(folder)
    found = next(iter(search(session.ladder, budget=3)))
    session.journal.close()
    return found


def answering(answer: dict[str, Any]) -> Any:
    """A rung that says the same of everything."""

    def answers(self: Ladder, rules: Any, *rest: Any) -> Iterator[dict[str, Any]]:
        for _ in rules:
            yield answer

    return answers


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"fault": "layer 3 is constant"}, "layer 3 is constant"),
        ({"layer_error": None}, "its layer error is not finite"),
    ],
)
def test_the_words_of_a_judge_are_kept(
    answer: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ladder, "errors", answering(answer))
    found = first_of(tmp_path)
    assert (found.status, found.fault) == ("invalid", words)
    assert found.row()["fault"] == words


def test_a_rule_without_a_mask_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ladder, "probe", lambda self, rule: None)
    found = first_of(tmp_path)
    assert found.status == "invalid" and "all alike" in found.fault


def test_others_have_no_fault(tmp_path: Path) -> None:
    found = first_of(tmp_path)
    assert found.status == "new" and found.fault == ""
