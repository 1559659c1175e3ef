"""`prunezero verify` agrees with a search that is as it was, and with no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from prunezero.errors import SearchError
from prunezero.report.runs.candidate_tables import write_candidates
from prunezero.report.runs.summary import front
from prunezero.report.runs.verification import Check
from prunezero.searching.evaluation.journal import Journal, read_journal
from tests.cli.conftest import Run
from tests.tiny_models import save_tiny_model

# What the version before left of a search.
OLDER = Path(__file__).parents[1] / "report" / "older_run"


def rewritten(journal: Path) -> None:
    """Make every perplexity in a journal another one, with proper checksums."""
    first, *records = read_journal(journal)
    journal.unlink()
    other = Journal(journal, first["header"], resume=False)
    for record in records:
        result = record["result"]
        for key in [key for key in result if key.endswith("perplexity")]:
            result[key] *= 2
        other.write(record["kind"], record["key"], result)
    other.close()


def test_an_untouched_search_is_agreed_with_though_its_journal_says_otherwise(
    run: Run, mine: Path
) -> None:
    rewritten(mine / "journal.jsonl")
    result = run("verify mine --top 2 --json o.json")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(Path("o.json").read_text())["rows"]
    assert [row["name"] for row in rows[:3]] == ["winner mine"] * 3
    assert [row["split"] for row in rows[:3]] == ["search", "validation", "test"]
    assert all(row["is_reported"] for row in rows[:3])
    assert all(abs(row["difference"]) < 1e-9 for row in rows if row["is_reported"])
    baselines = front(parquet.read_table(mine / "candidates.parquet").to_pylist(), 2)
    assert len(rows) == 3 + 3 * len(baselines)
    assert {"reported", "recomputed"} <= set(result.output.split())


def test_a_changed_number_of_the_winner_is_caught(run: Run, mine: Path) -> None:
    recipe = mine / "recipe.yaml"
    *before, last = recipe.read_text().split("test_perplexity: ")
    number, *after = last.split("\n")
    changed = float(number) * 1.001
    recipe.write_text("test_perplexity: ".join([*before, "\n".join([str(changed), *after])]))
    result = run("verify mine --top 0")
    assert result.exit_code == 1
    assert isinstance(result.exception, SearchError)
    assert "1 of 3 perplexities" in str(result.exception)
    assert f"winner mine on test text {changed:.6g} reported, {float(number):.6g} recomputed" in (
        str(result.exception)
    )


def test_a_changed_number_of_a_candidate_is_caught(run: Run, mine: Path) -> None:
    rows = parquet.read_table(mine / "candidates.parquet").to_pylist()
    (best,) = front(rows, 1)
    write_candidates(
        [
            {**row, "search_perplexity": row["search_perplexity"] * 0.99}
            if row["slot"] == best["slot"]
            else row
            for row in rows
        ],
        mine,
    )
    result = run("verify mine --top 1")
    assert result.exit_code == 1
    assert f"candidate-{best['slot']} on search text" in str(result.exception)
    assert "on test text" not in str(result.exception)


def test_a_perplexity_agrees_within_a_hundredth_of_a_percent_or_where_both_are_none() -> None:
    assert not Check("one", "test", None, 9.5, True).agrees
    assert not Check("one", "test", 9.5, None, True).agrees
    assert Check("one", "test", None, None, True).agrees
    assert Check("one", "test", 9.5).agrees
    assert Check("one", "test", 9.5, 9.5005, True).agrees
    assert not Check("one", "test", 9.5, 9.51, True).agrees


def test_a_search_without_a_winner_is_verified_by_its_front(run: Run, mine: Path) -> None:
    (mine / "recipe.yaml").unlink()
    result = run("verify mine --top 1")
    assert result.exit_code == 0, result.exception
    assert "winner" not in result.output and "candidate-" in result.output
    (mine / "candidates.parquet").unlink()
    result = run("verify mine")
    assert "no measured candidates to verify yet" in str(result.exception)


@pytest.mark.parametrize("changed", ["model", "text"])
def test_another_model_or_text_is_refused(
    changed: str, run: Run, mine: Path, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    options = json.loads((mine / "search.json").read_text())
    if changed == "text":
        options["text"] = str(tmp_path / "letters.txt")
        Path(options["text"]).write_text(tiny_files[1].read_text()[::-1])
    else:
        options["model"] = str(save_tiny_model("llama", tmp_path / "model", seed=1))
    (mine / "search.json").write_text(json.dumps(options))
    result = run("verify mine")
    assert isinstance(result.exception, SearchError)
    assert f"({changed}: " in str(result.exception) and "put back" in str(result.exception)


def test_the_journal_tells_what_search_json_would(run: Run, mine: Path) -> None:
    (mine / "search.json").unlink()
    assert run("verify mine --top 1").exit_code == 0


def test_a_search_from_before_is_told_how_to_become_verifiable(run: Run) -> None:
    shutil.copytree(OLDER, "runs/older")
    Path("runs/older/search.json").unlink()
    result = run("verify older")
    assert isinstance(result.exception, SearchError) and "search.json" in str(result.exception)
