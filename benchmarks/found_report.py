"""The tables of `found.py`, from the lines that it wrote: what of a gain is the formula's own?"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from found_rivals import AROUND, FOUND, PUBLISHED

from prunezero.searching.evaluation.rung_correlation import chance_of_no_gain

# So many draws of calibration text stand in one table.
DRAWS = 3
# Rows stand in one table only where these are the same; what was not recorded is None.
CONDITIONS = (
    *("model", "text", "dtype", "sequence_length", "calibration_tokens", "evaluation_tokens"),
    *("test_tokens", "threads", "cpu"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """One recipe over the draws of a table."""

    name: str
    """as its file says it"""
    role: str
    """as published, with the choices of the found recipe, or the found recipe itself"""
    rows: list[Row]
    """one for each draw"""

    @property
    def validation(self) -> float:
        """Mean perplexity on validation text; infinite where a draw has none."""
        return self._mean("validation")

    @property
    def test(self) -> float:
        """Mean perplexity on test text; infinite where a draw has none."""
        return self._mean("test")

    @property
    def losses(self) -> list[float]:
        """Nats per token of every test window, the mean over draws."""
        draws = [row["window_losses"]["test"] for row in self.rows]
        return [statistics.fmean(window) for window in zip(*draws, strict=True)]

    @property
    def told(self) -> str:
        """Its name, and whether it is as published."""
        return f"{self.name} {'as published' if self.role == PUBLISHED else 'with these choices'}"

    def _mean(self, split: str) -> float:
        values = [row[f"{split}_perplexity"] for row in self.rows]
        return statistics.fmean(float("inf") if value is None else value for value in values)

    def shown(self, split: str) -> str:
        """The mean over draws, and where there are several the largest minus the smallest."""
        values = [row[f"{split}_perplexity"] or float("nan") for row in self.rows]
        digits = 0 if statistics.fmean(values) >= 1000 else 1
        spread = f" ({max(values) - min(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"


@dataclass(frozen=True)
class Found:
    """A found recipe beside its rivals, all under the same conditions and on the same draws."""

    recipe: Standing
    """the found one"""
    rivals: dict[str, dict[str, Standing]]
    """by name, then by role; what was not measured on these draws is left out"""
    refused: dict[str, str]
    """why a rival cannot take the choices of the found one, by name"""

    @property
    def one(self) -> Row:
        """Any of its rows, for what all have in common."""
        return self.recipe.rows[0]

    @property
    def seeds(self) -> list[int]:
        """The draws."""
        return sorted(row["seed"] for row in self.recipe.rows)

    @property
    def is_fair(self) -> bool:
        """Whether every rival was measured with the choices of the found one, or refused."""
        return all(AROUND in roles or name in self.refused for name, roles in self.rivals.items())

    @property
    def has_rivals_around(self) -> bool:
        """Whether any rival was measured with the choices of the found one."""
        return any(AROUND in roles for roles in self.rivals.values())

    def best(self, *roles: str) -> Standing:
        """The best rival on validation text, of those in these roles."""
        standings = [
            roles_of[role]
            for roles_of in self.rivals.values()
            for role in roles
            if role in roles_of
        ]
        return min(standings, key=lambda standing: standing.validation)


def report(rows: list[Row]) -> list[str]:
    """All tables as Markdown, first what each found recipe gains and its formula's share of it."""
    found = gathered(rows)
    lines = [
        "# What searches found, beside published recipes",
        "",
        "Every rival stands twice: as published (formulas by dense statistics, as the found ones; "
        "recipes that mend weights by their own), and with all choices of the found recipe around "
        "the rival's formula. Made by `python benchmarks/found.py`; its help and the files of "
        "`docs/results/found/` say how.",
        "",
        "## What of a gain is the formula's own",
        "",
        *summary(found),
        "",
    ]
    for one in found:
        lines += section(one)
    return lines[:-1]


def summary(found: list[Found]) -> list[str]:
    """One line for each found recipe; its own share only where all rivals were measured twice."""
    lines = [
        "Test perplexity, means over draws; the best rivals are those on validation text. The "
        "whole gain is over the best rival as published, the formula's own over the best one with "
        "the same choices, at most so much where some rivals were not measured with those.",
        "",
        "| recipe | formula | target | model, draws, statistics from | found | best as published "
        "| best with the same choices | whole gain | the formula's own | share |",
        "|---" * 10 + "|",
    ]
    for one in found:
        best, whole = one.best(PUBLISHED), whole_gain(one)
        cells = [
            one.recipe.name,
            shortened(one.one["formula"]),
            target(one.one),
            f"{one.one['model']}, {drawn(one.seeds)}, {one.one['calibration_tokens']:,} tokens",
            one.recipe.shown("test"),
            f"{best.name} {best.shown('test')}",
            *own_cells(one),
        ]
        cells.insert(-2, f"{whole:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shortened(formula: str) -> str:
    """The formula, without those that some layers have instead."""
    first, _, others = formula.partition("; ")
    return f"`{first}` and others" if others else f"`{first}`"


def own_cells(found: Found) -> list[str]:
    """The best rival with the same choices, the gain over it, and its share of the whole gain."""
    if not found.has_rivals_around:
        return ["-"] * 3
    best = found.best(AROUND)
    cells = [f"{best.name} {best.shown('test')}", f"{own_gain(found):.1f}", share(found)]
    # A rival that was not measured so may be better than the best of those that were.
    bounds = [cell if cell == "none" else f"at most {cell}" for cell in cells[1:]]
    return cells if found.is_fair else [cells[0], *bounds]


def whole_gain(found: Found) -> float:
    """By how much test perplexity is lower than that of the best rival as published."""
    return found.best(PUBLISHED).test - found.recipe.test


def own_gain(found: Found) -> float:
    """By how much it is lower than that of the best rival with the same choices."""
    return found.best(AROUND).test - found.recipe.test


def share(found: Found) -> str:
    """The share of the whole gain that is the formula's own."""
    whole, own = whole_gain(found), own_gain(found)
    if whole <= 0 or own <= 0:
        return "none"
    return f"{100 * own / whole:.0f} %" if own < whole else "all"


def gathered(rows: list[Row]) -> list[Found]:
    """Every found recipe under every conditions and draws, with the rivals measured there."""
    tables: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        shared = (*CONDITIONS, "sparsity", "pattern")
        tables[(*(row[key] for key in shared), row["seed"] // DRAWS)].append(row)
    return [
        beside(mine, table)
        for key in sorted(tables, key=str)
        for table in [tables[key]]
        for mine in by(table, FOUND, ("recipe", "formula", "choices")).values()
    ]


def beside(mine: list[Row], table: list[Row]) -> Found:
    """A found recipe, and the rivals of its table on the same draws."""
    one = mine[0]
    seeds = {row["seed"] for row in mine}
    rivals: dict[str, dict[str, Standing]] = defaultdict(dict)
    refused = {}
    mends = "update" in one["choices"]
    for role in (PUBLISHED, AROUND):
        for (name, choices), found in by(table, role, ("recipe", "choices")).items():
            if role == AROUND and choices != one["choices"]:
                continue
            if role == PUBLISHED and "update" in choices and not mends:
                continue
            there = [row for row in found if row["seed"] in seeds]
            faults = [row["refused"] for row in there if "refused" in row]
            if faults:
                refused[name] = faults[0]
            elif {row["seed"] for row in there} == seeds:
                rivals[name][role] = Standing(name, role, there)
    return Found(Standing(one["recipe"], FOUND, mine), rivals, refused)


def by(table: list[Row], role: str, keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of a role that agree in these keys."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in table:
        if row["role"] == role:
            found[tuple(row[key] for key in keys)].append(row)
    return found


def section(found: Found) -> list[str]:
    """One found recipe: what it is, its table, and what of the gain is the formula's own."""
    one = found.one
    machine = f"{one['cpu']}, {one['threads']} thread{'s' * (one['threads'] != 1)}"
    return [
        f"## {found.recipe.name} on {one['model']}, {target(one)}, {drawn(found.seeds)}, "
        f"{one['calibration_tokens']:,} tokens of calibration text",
        "",
        f"`{one['formula']}`; {one['choices']}.",
        "",
        f"{one['dtype']} ({machine if one['cpu'] else 'processor not recorded'}); windows of "
        f"{one['sequence_length']} tokens, {len(one['window_losses']['test'])} of test text. Mean "
        "perplexity over draws and in brackets the largest minus the smallest. The chance of no "
        "gain is that of a one-sided Wilcoxon test over test windows, their losses averaged over "
        "draws, against the stronger of the two on validation text.",
        "",
        "| rival | formula | as published | validation | test | with these choices: validation "
        "| test | gain over the stronger | chance of no gain |",
        "|---" * 9 + "|",
        *(line(found, name) for name in found.rivals),
        f"| **{found.recipe.name}** | | | | | {found.recipe.shown('validation')} "
        f"| {found.recipe.shown('test')} | | |",
        "",
        *verdict(found),
        "",
    ]


def line(found: Found, name: str) -> str:
    """One rival."""
    roles = found.rivals[name]
    any_row = next(iter(roles.values())).rows[0]
    stronger = min(roles.values(), key=lambda standing: standing.validation)
    as_published = roles.get(PUBLISHED)
    cells = [
        name,
        f"`{any_row['formula']}`",
        as_published.rows[0]["choices"] if as_published else "",
        *cells_of(as_published),
        *cells_of(roles.get(AROUND), found.refused.get(name, "")),
        f"{found.recipe.test / stronger.test - 1:+.1%}",
        f"{chance_of_no_gain(found.recipe.losses, stronger.losses):.1g}",
    ]
    return f"| {' | '.join(cells)} |"


def cells_of(standing: Standing | None, refused: str = "") -> list[str]:
    """Validation and test perplexity of a standing."""
    if standing is None:
        return ["refused" if refused else "-"] * 2
    return [standing.shown("validation"), standing.shown("test")]


def verdict(found: Found) -> Iterator[str]:
    """Sentences: against the strongest rival, and what of the gain is the formula's own."""
    best = found.best(PUBLISHED, AROUND)
    change = found.recipe.test / best.test - 1
    chance = chance_of_no_gain(found.recipe.losses, best.losses)
    better = "Better than" if change < 0 else "No better than"
    yield (
        f"{better} {best.told}, the strongest rival on validation text: test perplexity "
        f"{found.recipe.test:.1f} against {best.test:.1f} ({change:+.1%}; chance of no gain "
        f"{chance:.1g})."
    )
    yield (
        f"The whole gain over the best as published ({found.best(PUBLISHED).name}) is "
        f"{whole_gain(found):.1f}."
    )
    if found.has_rivals_around:
        _, own, part = own_cells(found)
        yield (
            f"Over the best with the same choices ({found.best(AROUND).name}) it is {own}, the "
            f"formula's own share: {part}."
        )
    missing = [
        name
        for name, roles in found.rivals.items()
        if AROUND not in roles and name not in found.refused
    ]
    if missing:
        yield f"Not measured with these choices: {', '.join(missing)}."
    for name, reason in found.refused.items():
        yield f"{name} cannot take these choices: {reason}."


def target(row: Row) -> str:
    """The sparsity or pattern, as people write it."""
    return f"{100 * row['sparsity']:g} %" if row["pattern"] == "free" else str(row["pattern"])


def drawn(seeds: list[int]) -> str:
    """The draws in words."""
    return f"draw {seeds[0]}" if len(seeds) == 1 else f"draws {seeds[0]} to {seeds[-1]}"
