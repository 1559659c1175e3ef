"""A search as a person watches it: the best formula so far beside what it has to beat."""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prunezero.cli.tables import cell, console, say
from prunezero.searching.candidate import Candidate

# How many of the best candidates are shown.
_SHOWN = 5


class SearchView:
    """The live table of a search; on anything but a terminal, a line per measured candidate."""

    def __init__(
        self, rivals: list[dict[str, Any]], *, budget: int | None, seconds: float | None
    ) -> None:
        self._rivals = rivals
        self._budget = budget
        self._seconds = seconds
        self._begin = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._generation = 0
        self._best: list[Candidate] = []
        self._perplexities: list[float] = []
        self._note = ""
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._picture)

    def __enter__(self) -> SearchView:
        if console.is_terminal:
            self._live.start()
        else:
            for row in self._rivals:
                perplexity = cell("perplexity", row["search_perplexity"])
                say(f"{row['recipe']:<12} {perplexity}  {row['formula']}")
        return self

    def __exit__(self, *error: object) -> None:
        if console.is_terminal:
            self._live.stop()
        say(self._counted())

    def say(self, note: str) -> None:
        """Show a line of text under the table."""
        self._note = note
        if not console.is_terminal:
            say(note)

    def show(self, candidate: Candidate) -> None:
        """Take in one candidate, as `search` yields it."""
        self._generation = candidate.generation
        if candidate.search_perplexity is None:
            self._counts[candidate.status] += 1
            return
        self._counts["measured"] += 1
        self._perplexities.append(candidate.search_perplexity)
        best = [*self._best, candidate]
        best.sort(key=lambda one: one.search_perplexity or 0.0)
        is_new_best = best[0] is candidate
        self._best = best[:_SHOWN]
        if not console.is_terminal:
            mark = "best so far" if is_new_best else ""
            perplexity = cell("perplexity", candidate.search_perplexity)
            say(
                f"generation {candidate.generation:2d}  {self._counted()}  "
                f"{perplexity}  {candidate.criterion.text}  {mark}".rstrip(),
            )

    @property
    def measured(self) -> int:
        """How many candidates were measured."""
        return self._counts["measured"]

    def progress(self) -> dict[str, float]:
        """The points of the curves that are logged once a candidate was measured, by name."""
        counts = self._counts
        proposed = counts["new"] + counts["known"] + counts["invalid"]
        elapsed = time.monotonic() - self._begin
        return {
            "best_perplexity": min(self._perplexities),
            "median_perplexity": median(self._perplexities),
            "valid_rate": 1 - counts["invalid"] / max(1, proposed),
            "unique_rate": counts["new"] / max(1, proposed),
            "seconds_per_candidate": elapsed / max(1, counts["new"]),
            "screened": float(counts["new"]),
        }

    def _picture(self) -> Group:
        table = Table(title="perplexity on search text", title_justify="left")
        for column, justify in (("", "left"), ("perplexity", "right"), ("words", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("formula", overflow="fold")
        for row in self._rivals:
            table.add_row(
                row["recipe"], cell("perplexity", row["search_perplexity"]), "", row["formula"]
            )
        table.add_section()
        for place, candidate in enumerate(self._best):
            table.add_row(
                "best so far" if place == 0 else "",
                cell("perplexity", candidate.search_perplexity),
                str(candidate.criterion.complexity),
                candidate.criterion.text,
                style="bold" if place == 0 else "",
            )
        lines = [Text(f"generation {self._generation}: {self._counted()}, {self._left()}")]
        if self._note:
            lines.append(Text(self._note, style="yellow"))
        return Group(table, *lines)

    def _counted(self) -> str:
        counts = self._counts
        proposed = counts["new"] + counts["known"] + counts["invalid"]
        return (
            f"{proposed} proposed, {counts['known']} already known, {counts['invalid']} invalid, "
            f"{counts['new']} screened, {counts['measured']} measured"
        )

    def _left(self) -> str:
        elapsed = time.monotonic() - self._begin
        left = []
        if self._seconds is not None:
            left.append(self._seconds - elapsed)
        if self._budget is not None and self._counts["new"]:
            rate = elapsed / self._counts["new"]
            left.append(rate * (self._budget - self._counts["new"]))
        if not left:
            return f"{elapsed:.0f} s so far"
        return f"about {max(0.0, min(left)):.0f} s left"
