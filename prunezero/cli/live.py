"""A search as a person watches it: the best rules so far beside what they have to beat."""

from __future__ import annotations

import math
import time
from collections import Counter
from statistics import median
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from prunezero.cli.fitting import Table
from prunezero.cli.tables import cell, change, console, means_over, say
from prunezero.searching.evaluation.rung_correlation import rung_correlation
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.objectives import PERPLEXITY, Objective

# How many of the best candidates are shown.
_SHOWN = 5
_SPLITS = ("search", "validation")


class SearchView:
    """The live table of a search; on anything but a terminal, a line per measured candidate."""

    def __init__(
        self,
        baselines: list[dict[str, Any]],
        *,
        budget: int | None,
        seconds: float | None,
        objective: Objective = PERPLEXITY,
    ) -> None:
        self._baselines = baselines
        self._objective = objective
        # The rungs on which a lower one is put to the test, as a person calls them.
        quick, what = "KL" if objective.column != "kl" else "quick KL", objective.text
        self._rungs = (
            ("layer error", quick, "layer_error", "kl"),
            (quick, what, "kl", "search_rank"),
            (what, "validation", "search_fitness", "validation_fitness"),
        )
        means = means_over(baselines)
        kind = "mean" if objective.rises else "geometric mean"
        self._over = f", {kind} over {means}" if means else ""
        self._budget = budget
        self._seconds = seconds
        self._begin = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._generation = 0
        self._known: set[int] = set()
        # Candidates that reached a measurement on the model, by slot.
        self._raced: dict[int, Candidate] = {}
        self._note = ""
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._picture)

    def __enter__(self) -> SearchView:
        if console.is_terminal:
            self._live.start()
        else:
            if self._over or not self._objective.is_usual:
                say(f"{self._objective.text}{self._over}")
            say(f"{'recipe':<12} search  validation  formula")
            for row in self._baselines:
                values = "  ".join(self._cell(row.get(self._objective.key(one))) for one in _SPLITS)
                say(f"{row['recipe']:<12} {values}  {row['formula']}")
        return self

    def __exit__(self, *error: object) -> None:
        if console.is_terminal:
            self._live.stop()
        say(self._counted())
        say(self._trusted())

    def say(self, note: str) -> None:
        """Show a line of text under the table."""
        self._note = note
        if not console.is_terminal:
            say(note)

    def show(self, candidate: Candidate) -> None:
        """Take in one candidate, as `search` yields it."""
        self._generation = max(self._generation, candidate.generation)
        if candidate.slot not in self._known:
            self._known.add(candidate.slot)
            self._counts[candidate.status] += 1
        before = self._raced.get(candidate.slot)
        is_measured = candidate.kl is not None or candidate.search_fitness is not None
        if candidate.status == "known" or not is_measured:
            return
        self._raced[candidate.slot] = candidate
        if candidate.search_fitness is not None and candidate.validation_at_least is None:
            is_news = before is None or before.search_fitness is None
            self._counts["measured"] += is_news
            if not console.is_terminal:
                self._tell(candidate)

    def _tell(self, candidate: Candidate) -> None:
        if candidate.validation_fitness is None:
            say(
                f"generation {self._generation:2d}  {self._counted()}  "
                f"search {self._cell(self._value(candidate, 'search'))}  {candidate.rule.text}"
            )
        elif self._best()[0] is candidate:
            gains = ", ".join(f"{self._gain(candidate, split)}" for split in _SPLITS)
            validation = self._cell(self._value(candidate, "validation"))
            say(f"best so far  validation {validation}, {gains}  {candidate.rule.text}")

    @property
    def measured(self) -> int:
        """How many candidates were measured."""
        return self._counts["measured"]

    def progress(self) -> dict[str, float]:
        """The points of the curves that are logged once a candidate was measured, by name."""
        counts = self._counts
        proposed = counts["new"] + counts["known"] + counts["invalid"]
        elapsed = time.monotonic() - self._begin
        found = [self._value(one, "search") for one in self._raced.values()]
        values = [one for one in found if one is not None]
        column = self._objective.column
        points = {
            f"best_{column}": max(values) if self._objective.rises else min(values),
            f"median_{column}": median(values),
            "valid_rate": 1 - counts["invalid"] / max(1, proposed),
            "unique_rate": counts["new"] / max(1, proposed),
            "seconds_per_candidate": elapsed / max(1, counts["new"]),
            "screened": float(counts["new"]),
        }
        for low, high, lower, upper in self._rungs:
            seen = rung_correlation(self._by_slot(), lower, upper)
            if seen.says_much:
                rungs = f"{low}_{high}".replace(" ", "_").lower()
                points[f"tau_{rungs}"] = seen.tau
                points[f"recall_{rungs}"] = seen.recall
        return points

    def _by_slot(self) -> list[Candidate]:
        return [self._raced[slot] for slot in sorted(self._raced)]

    def _best(self) -> list[Candidate]:
        """Those on validation text first, which decides; then the others on search text."""
        measured = [one for one in self._raced.values() if one.search_fitness is not None]

        def place(one: Candidate) -> tuple[float, ...]:
            values = (one.validation_fitness, one.search_fitness)
            return (*(math.inf if value is None else value for value in values), one.slot)

        return sorted(measured, key=place)

    def _value(self, candidate: Candidate, split: str) -> float | None:
        """What was measured of it on one text."""
        value: float | None = candidate.row()[self._objective.key(split)]
        return value

    def _cell(self, value: float | None) -> str:
        return cell(self._objective.column, value)

    def _gain(self, candidate: Candidate, split: str) -> str:
        """How far it is from the best published recipe on one text, in words."""
        key = self._objective.key(split)
        known = [row for row in self._baselines if row["recipe"] != "dense"]
        known = [row for row in known if row.get(key) is not None]
        mine = self._value(candidate, split)
        if not known or mine is None:
            return ""
        best = min(known, key=lambda row: self._objective.turned(row[key]))
        return f"{change(self._objective, mine, best[key])} on {split}"

    def _picture(self) -> Group:
        title = f"{self._objective.text}{self._over}; validation text decides"
        table = Table(title=title)
        columns = ("", "search", "gain", "validation", "gain", "words")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        table.add_column("formula", overflow="fold")
        for row in self._baselines:
            search, validation = (
                self._cell(row.get(self._objective.key(split))) for split in _SPLITS
            )
            table.add_row(row["recipe"], search, "", validation, "", "", row["formula"])
        table.add_section()
        for place, candidate in enumerate(self._best()[:_SHOWN]):
            numbers = []
            for split in _SPLITS:
                numbers.append(self._cell(self._value(candidate, split)))
                numbers.append(self._gain(candidate, split).split(" ")[0])
            table.add_row(
                "best so far" if place == 0 else "",
                *numbers,
                str(candidate.complexity),
                candidate.rule.text,
                style="bold" if place == 0 else "",
            )
        lines = [Text(f"generation {self._generation}: {self._counted()}, {self._left()}")]
        lines.append(Text(self._trusted()))
        if self._note:
            lines.append(Text(self._note, style="yellow"))
        return Group(table, *lines)

    def _counted(self) -> str:
        counts = self._counts
        proposed = counts["new"] + counts["known"] + counts["invalid"]
        quick = sum(one.kl is not None for one in self._raced.values())
        return (
            f"{proposed} proposed, {counts['known']} already known, {counts['invalid']} invalid, "
            f"{counts['new']} screened, {quick} by quick KL, "
            f"{counts['measured']} measured"
        )

    def _trusted(self) -> str:
        """Whether each cheap rung foretells the next."""
        seen = [(pair, rung_correlation(self._by_slot(), *pair[2:])) for pair in self._rungs]
        told = [f"{low} foretells {high}: {one.text}" for (low, high, *_), one in seen if one.count]
        return "; ".join(told) or "no rung foretells another yet"

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
