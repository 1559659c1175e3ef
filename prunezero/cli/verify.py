"""`prunezero verify`: measure what a search reports once more."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunezero.cli.options import MOST_ROWS, JsonFile, RunsDir, check_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prunezero.cli.fitting import Table
    from prunezero.report.runs.verification import Check


def verify(
    run: Annotated[str, typer.Argument(help="Name of a search in the runs folder, or its path.")],
    top: Annotated[
        int,
        typer.Option(
            help="How many of the best by size to measure beside the winner.", min=0, max=MOST_ROWS
        ),
    ] = 3,
    runs_dir: RunsDir = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Measure the winner of a search and the best of its front anew, and compare.

    Models and text are loaded as the search had them; its journal is not read for answers. Exit
    code 1 and one sentence tell that a perplexity differs by more than a hundredth of a percent.

    Examples:

        prunezero verify first

        prunezero verify runs/first --top 10 --json verified.json
    """
    from prunezero.cli.tables import Bars, console, say, say_about, waiting
    from prunezero.errors import SearchError
    from prunezero.report.runs import verification
    from prunezero.report.runs.summary import find_run, read_run

    check_json(json_file)
    found = read_run(find_run(run, runs_dir))
    claimed = verification.claims(found, top)
    with waiting(f"loading model and text of {found.folder}"):
        testbeds = verification.testbeds_of(found)
    say_about(testbeds)
    checks: list[Check] = []
    with Bars() as bars:
        total = len(claimed) * len(verification.SPLITS)
        for check in verification.verify(found, testbeds, claimed, bars):
            checks.append(check)
            bars(verification.measured_things(found), len(checks), total)
    console.print(_table(checks, f"verify {found.folder.name}"))
    rows = [{**asdict(one), "difference": one.difference, "agrees": one.agrees} for one in checks]
    write_json({"run": str(found.folder), "rows": rows}, json_file)
    wrong = verification.verdict(found, checks)
    if wrong:
        raise SearchError(wrong)
    count = sum(one.is_reported for one in checks)
    say(f"{found.folder} holds: {count} {verification.measured_things(found)} agree")


def _table(checks: Sequence[Check], title: str) -> Table:
    from prunezero.cli.fitting import Table

    table = Table(title=title)
    table.add_column("recipe")
    table.add_column("text")
    for column in ("reported", "recomputed", "difference"):
        table.add_column(column, justify="right")
    for check in checks:
        reported = _number(check.reported) if check.is_reported else "-"
        change = "-" if check.difference is None else f"{check.difference:+.4%}"
        style = None if check.agrees else "bold"
        table.add_row(
            check.name, check.split, reported, _number(check.recomputed), change, style=style
        )
    return table


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4f}"
