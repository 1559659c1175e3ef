"""Records keep their words and numbers through MLflow's rules and through a file."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from prunezero.report.tracking.records import (
    METRIC_NAMES,
    RunRecord,
    candidate_name,
    clean_key,
    clean_name,
    clean_title,
    record_from_line,
    record_to_line,
    run_record,
    split_finite,
)
from prunezero.report.tracking.spool import Spool, read_record

ROW = {
    "slot": 31,
    "generation": 7,
    "formula": "abs(W)*X",
    "complexity": 4,
    "parents": (3, 5),
    "status": "ok",
    "search_perplexity": 8.414,
    "layer_error": 0.25,
    "kl": 0.125,
    "top1_agreement": 0.75,
    "top5_agreement": 0.875,
    "acceptance": 0.5,
    "validation_perplexity": None,
    "sparsity": 0.5,
    "unknown": "x",
}


@pytest.mark.parametrize("role", ["candidate", "baseline", "dense", "champion"])
def test_every_role_uses_the_same_names(role: str) -> None:
    record = run_record("night/00031", "x", role, ROW)
    assert record.metrics == {
        "eval/search_perplexity": 8.414,
        "eval/layer_error": 0.25,
        "eval/kl": 0.125,
        "eval/top1_agreement": 0.75,
        "eval/top5_agreement": 0.875,
        "eval/acceptance": 0.5,
        "formula/complexity": 4.0,
    }
    assert record.params == {
        "formula": "abs(W)*X",
        "complexity": 4,
        "sparsity": 0.5,
        "generation": 7,
    }
    assert record.tags == {"status": "ok", "parents": "3 5"}
    assert record.note == "`abs(W)*X`"


def test_a_candidate_is_named_by_its_place_and_its_perplexity() -> None:
    assert candidate_name(ROW) == "g07-c0031 · 8.41"
    assert candidate_name({"slot": 2, "generation": None}) == "g00-c0002"


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("eval/kl", "eval/kl"),
        ("../x", "x"),
        ("/etc/passwd", "etc/passwd"),
        ("a/../../b", "a/b"),
        ("|W|*sqrt(X)", "_W__sqrt_X_"),
        ("50 %", "50 _"),
        ("line\nbreak", "line_break"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_that_mlflow_refuses_are_cleaned(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_our_own_metric_names_need_no_cleaning() -> None:
    assert all(clean_name(name) == name for name in METRIC_NAMES.values())


def test_titles_stay_on_one_line_and_keys_have_no_quotes() -> None:
    assert clean_title("a\nb\tc" + "d" * 300) == "a b c" + "d" * 245
    assert not re.search("[\"'`%]", clean_key("it's/\"00%`"))


def test_infinite_metrics_are_set_apart() -> None:
    finite, unfit = split_finite({"a": 1.0, "b": math.inf, "c": math.nan})
    assert finite == {"a": 1.0} and unfit == ["b", "c"]


def record(key: str = "night/00001") -> RunRecord:
    return RunRecord(
        key=key,
        name="g00 · 8.41",
        role="candidate",
        params={"formula": "abs(W)*X", "sparsity": 0.5, "seed": 3},
        metrics={"eval/kl": math.inf},
        curves={"search/best": [(0, 9.5), (1, math.nan)]},
        artifacts=(Path("/tmp/a b.txt"),),
        recorded_at=17,
    )


def test_a_record_survives_a_line_of_json() -> None:
    line = record_to_line(record())
    assert "\n" not in line and "NaN" not in line and "Infinity" not in line
    assert str(record_from_line(line)) == str(record())


def test_a_torn_line_swallows_no_other_record(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "untracked.jsonl")
    spool.append([record("a")])
    with spool.path.open("a") as file:
        file.write('{"key": "torn')
    spool.append([record("b")])
    found = [read_record(line) for line in spool.lines()]
    assert [run.key if run else None for run in found] == ["a", None, "b"]


def test_dropping_lines_leaves_those_that_others_added(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "untracked.jsonl")
    spool.append([record("a"), record("b")])
    lines = spool.lines()
    spool.append([record("c")])
    spool.drop(set(lines))
    assert [run.key for line in spool.lines() if (run := read_record(line))] == ["c"]
    spool.drop(set(spool.lines()))
    assert not spool.path.exists() and spool.lines() == []
