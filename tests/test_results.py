"""The pages of docs/results/ say what the lines beside them say, and README stays short."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# Pages whose links have to lead somewhere.
PROSE = [ROOT / "README.md", ROOT / "docs" / "using.md", RESULTS / "README.md"]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


def test_every_page_is_what_its_lines_make(results: Any) -> None:
    pages = results.pages(RESULTS)
    assert {path.name for path in pages} == {path.name for path in RESULTS.glob("*.md")}
    for path, text in pages.items():
        assert path.read_text() == text, f"{path}: run python benchmarks/results.py"


def test_a_line_less_changes_the_page_and_the_table_in_the_prose(
    results: Any, tmp_path: Path
) -> None:
    for path in RESULTS.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = results.pages(tmp_path)
    lines = (tmp_path / "methods.jsonl").read_text().splitlines()
    assert "wanda" in lines.pop(2) and len(lines) > 10
    (tmp_path / "methods.jsonl").write_text("\n".join(lines) + "\n")
    after = results.pages(tmp_path)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == {"methods.md", "README.md"}


def test_every_table_has_its_place_in_the_prose(results: Any) -> None:
    named = re.findall(r"<!-- table: ([\w -]+) -->", (RESULTS / "README.md").read_text())
    assert sorted(named) == sorted(results.results_tables.TABLES)


def test_every_file_of_lines_is_shown(results: Any) -> None:
    shown = {*results.PAGES, *(file for file, _ in results.results_tables.TABLES.values())}
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= shown


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_readme_is_short_and_leads_to_the_rest() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for path in (
        *("docs/using.md", "docs/formulas.md", "docs/architecture.md", "docs/scaling.md"),
        "docs/structured.md",
        *("docs/results/README.md", "CONTRIBUTING.md"),
    ):
        assert f"]({path})" in text, path
