"""All pages of docs/results/ anew, from the JSON lines beside them.

    python benchmarks/results.py

A page that is a table alone is written whole by the report of its measurement. README.md there is
prose with tables between markers, and only what stands between them is written anew:

    <!-- table: NAME -->
    <!-- end of table -->

Pictures are drawn by the measurements themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_report
import cluster
import efficiency_report
import experts
import found_report
import memory_plan
import methods
import pruning
import pruning_report
import recovery
import results_tables
import rounding
import scoring_report
import search_efficiency
import speed
import stream_cuts
import units_report
import windows
from rows import read

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
TABLE = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)

Row = dict[str, Any]


def main() -> None:
    """Write every page."""
    for path, text in pages(RESULTS).items():
        path.write_text(text)
        print(path)


def pages(folder: Path) -> dict[Path, str]:
    """The text of every page that is made from lines of this folder; others are not measured."""
    made = {
        folder / f"{name}.md": "\n".join(page(read(folder / f"{name}.jsonl"))) + "\n"
        for name, page in PAGES.items()
        if (folder / f"{name}.jsonl").is_file()
    }
    prose = folder / "README.md"
    return made | {prose: with_tables(prose.read_text(), folder)}


def with_tables(text: str, folder: Path) -> str:
    """The text with every table between markers made anew.

    Raises:
        KeyError: a marker names a table that nobody makes.
    """

    def anew(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        file, table = results_tables.TABLES[name]
        lines = table(read(folder / f"{file}.jsonl"))
        return "\n".join([begin, *lines, "", end])

    return TABLE.sub(anew, text)


def latest(rows: list[Row], keys: tuple[str, ...]) -> list[Row]:
    """The rows under the conditions of the last one."""
    return [row for row in rows if all(row[key] == rows[-1][key] for key in keys)]


PAGES: dict[str, Callable[[list[Row]], list[str]]] = {
    "attention": attention_report.report,
    "cluster": cluster.report,
    "experts": experts.report,
    "found": found_report.report,
    "memory": memory_plan.report,
    "methods": lambda rows: methods.report(latest(rows, ("model", "calibration_tokens"))),
    "pruning": lambda rows: pruning_report.report(latest(rows, pruning.CONDITIONS)),
    "recovery": recovery.report,
    "rounding": lambda rows: rounding.report(latest(rows, rounding.CONDITIONS)),
    "scoring": lambda rows: scoring_report.report(scoring_report.latest(rows)),
    "speed": speed.report,
    "stream_cuts": stream_cuts.report,
    "units": units_report.report,
    "windows": windows.report,
    "search_efficiency": lambda rows: efficiency_report.report(
        search_efficiency.shown(rows, rows[-1])
    ),
}

if __name__ == "__main__":
    main()
