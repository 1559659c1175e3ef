"""The tables, the picture and the MLflow runs of `scoring.py`, from the lines that it wrote."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from published_selection import FORMULAS, REQUESTS
from tracking import log

from prunezero.report.plots.axes import INK, plain_log_ticks

PLACE = ("device", "machine", "threads")
WORK = ("part", *PLACE, "dtype", "shape", "formula", "request")
KEYS = (*WORK, "contender")
# Okabe and Ito's colours, which colour-blind people tell apart, and a sign of its own for print.
STYLES = {
    "topk": ("torch.topk", "#e69f00", "s"),
    "compiled": ("torch.compile", "#009e73", "^"),
    "kernels": ("prunezero's kernels alone", "#cc79a7", "D"),
    "prunezero": ("prunezero", "#0072b2", "o"),
}

Row = dict[str, Any]


def latest(rows: list[Row]) -> list[Row]:
    """The last row of every measurement."""
    return list({tuple(row[key] for key in KEYS): row for row in rows}.values())


def by(rows: list[Row], keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that agree in these keys."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def speed_up(row: Row, rows: list[Row]) -> float | None:
    """How many times as fast as published code; None where that was not measured."""
    work = [row[key] for key in WORK]
    for other in rows:
        if other["contender"] == "published" and [other[key] for key in WORK] == work:
            return median(other["seconds"]) / median(row["seconds"])
    return None


def bandwidth(row: Row, rows: list[Row]) -> float | None:
    """The share of the copy's bandwidth, as a fraction; None where either is not known."""
    place = [row[key] for key in PLACE]
    for other in rows:
        if other["part"] == "copy" and [other[key] for key in PLACE] == place and "bytes" in row:
            return rate(row) / rate(other)
    return None


def rate(row: Row) -> float:
    """Bytes that have to be moved, per second."""
    return row["bytes"] / median(row["seconds"])


def time_of_one(row: Row, rows: list[Row]) -> float:
    """How many times the seconds of one formula this many take."""
    until = row["contender"].split(" ", 1)[1]
    one = next(
        other
        for other in rows
        if [other[key] for key in WORK] == [row[key] for key in WORK]
        and other["contender"] == f"1 {until}"
    )
    return median(row["seconds"]) / median(one["seconds"])


def candidates(row: Row) -> float:
    """Formulas per second."""
    return row["formulas"] / median(row["seconds"])


def told(row: Row) -> str:
    """One row for reading."""
    words = (row[key] for key in ("part", "shape", "dtype", "formula", "request", "contender"))
    differs = f", {row['differing']} weights differ" if row["differing"] else ""
    return f"{' '.join(filter(None, words))}: {milliseconds(row)} ms{differs}"


def milliseconds(row: Row) -> str:
    """Median, smallest and largest."""
    seconds = sorted(row["seconds"])
    shown = short(1000 * median(seconds))
    if len(seconds) == 1:
        return shown
    return f"{shown} ({short(1000 * seconds[0])} to {short(1000 * seconds[-1])})"


def short(number: float) -> str:
    """Three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def times(number: float | None) -> str:
    """A ratio."""
    return "-" if number is None else f"{number:.2f}"


def share(number: float | None) -> str:
    """A fraction in per cent."""
    return "-" if number is None else f"{100 * number:.1f} %"


def report(rows: list[Row]) -> list[str]:
    """The picture and the tables as Markdown, by device."""
    spelled = ", ".join(f"`{name}` is `{formula.text}`" for name, formula in FORMULAS.items())
    lines = [
        "# Scores and masks beside published code and the hardware's limit",
        "",
        "![how many times as fast as published code](scoring.png)",
        "",
        "Made by `python benchmarks/scoring.py` from random weights. Medians over repeats, with "
        "the smallest and largest in brackets; contenders of one measurement took turns, and "
        "every call reads other memory. `published` is torch as published code uses it: a score "
        "operation by operation, then a stable sort of all scores, or for 2:4 a loop over groups "
        "of columns. `topk` replaces sort or loop by one `torch.topk`, which may choose others of "
        "equal scores, and `compiled` the score by one from `torch.compile`. `prunezero` is the "
        "whole call, with a check for NaN and infinity; `kernels`, on a GPU, is what its device "
        "does of it, replayed as a CUDA graph. "
        f"{spelled}.",
        "",
    ]
    for place, group in by(rows, PLACE).items():
        versions = ", ".join(sorted({row["torch"] for row in group}))
        lines += [f"## {named(place)}, torch {versions}", ""]
        for part, table in TABLES.items():
            chosen = [row for row in group if row["part"] == part]
            lines += [*table(chosen, group), ""] if chosen else []
    return lines[:-1]


def named(place: tuple[Any, ...]) -> str:
    """A device for reading."""
    device, machine, threads = place
    if device != "cpu":
        return str(machine)
    return f"{machine}, {threads} thread" + "s" * (threads != 1)


def copy_table(rows: list[Row], group: list[Row]) -> list[str]:
    """The bandwidth in words."""
    return [
        f"A copy of {row['shape']} into memory that is there already moves "
        f"{short(rate(row) / 1e9)} GB a second, read and written."
        for row in rows
    ]


def matrix_table(rows: list[Row], group: list[Row]) -> list[str]:
    """One line per contender."""
    lines = [
        "Bandwidth is what has to be moved at least (weights, gradients and the mask, a byte for "
        "each weight), by seconds, as a share of the copy's. Masks differ on so many weights from "
        "published code's: where scores are equal, or end in another last bit.",
        "",
        "| shape | dtype | formula | request | contender | milliseconds | times as fast "
        "| bandwidth | masks differ | first call, seconds |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cells = [row["shape"], row["dtype"], f"`{row['formula']}`", REQUESTS[row["request"]][1]]
        cells += [row["contender"], milliseconds(row), times(speed_up(row, group))]
        cells += [share(bandwidth(row, group)), f"{row['differing']:,}"]
        # A graph is compiled before it is replayed.
        first = "-" if row["contender"] == "kernels" else f"{row['first_seconds']:.3g}"
        lines.append("| " + " | ".join([*cells, first]) + " |")
    return lines


def population_table(rows: list[Row], group: list[Row]) -> list[str]:
    """One line per count of formulas and end."""
    lines = [
        "Random formulas of W, X and G on 4 % of the rows of all linear layers of a model, masks "
        "by rows at 50 %; errors are the share of the layers' outputs that a mask loses, by Gram "
        "matrices of the dtype. One formula is the mean of eight.",
        "",
        "| shapes of | dtype | formulas | until | milliseconds | candidates a second "
        "| times as long as one |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [row["shape"], row["dtype"], str(row["formulas"])]
        cells += [row["contender"].split(" to ")[1], milliseconds(row), short(candidates(row))]
        lines.append("| " + " | ".join([*cells, times(time_of_one(row, group))]) + " |")
    return lines


def model_table(rows: list[Row], group: list[Row]) -> list[str]:
    """One line per contender."""
    lines = [
        "All linear layers of a model, one after the other, with all checks of a pruning.",
        "",
        "| shapes of | dtype | formula | request | contender | seconds | times as fast |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = [row["shape"], row["dtype"], f"`{row['formula']}`", REQUESTS[row["request"]][1]]
        cells += [row["contender"], f"{median(row['seconds']):.3g}", times(speed_up(row, group))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


TABLES = {
    "copy": copy_table,
    "matrix": matrix_table,
    "population": population_table,
    "model": model_table,
}


def draw(rows: list[Row], path: Path) -> None:
    """How many times as fast as published code each contender is, by device and work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    raced = [row for row in rows if row["contender"] in STYLES and speed_up(row, rows) is not None]
    places = by(raced, (*PLACE, "dtype", "request"))
    heights = [1 + len(by(group, WORK)) for group in places.values()] or [1]
    figure = Figure(figsize=(10, 1.9 + 0.32 * sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (place, group) in zip(panels, places.items(), strict=False):
        panel(axes, group, rows)
        *device, dtype, request = place
        title = f"{named(tuple(device))}, {dtype}: {REQUESTS[request][1]}"
        axes.set_title(title, loc="left", fontsize=12, color=INK)
    figure.suptitle(
        "Scores and masks: how many times as fast as published code",
        x=0.01,
        ha="left",
        fontsize=15,
        weight="bold",
        color=INK,
    )
    drawn: dict[str, Any] = {}
    for axes in panels:
        drawn |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncol=3, frameon=False)
    figure.savefig(path)


def panel(axes: Any, group: list[Row], rows: list[Row]) -> None:
    """The dots of one device; each line is one work."""
    works = by(group, WORK)
    found = [1.0]
    for place, members in enumerate(works.values()):
        for row in members:
            label, colour, sign = STYLES[row["contender"]]
            ratio = speed_up(row, rows) or 1.0
            found.append(ratio)
            axes.plot(ratio, place, sign, color=colour, ms=8, label=label, ls="none")
            if row["contender"] == "prunezero":
                beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center"}
                beside |= {"xytext": (6, 0), "textcoords": "offset points", "fontsize": 10}
                axes.annotate(f"{short(ratio)} times", (1.0, place), **beside, color=colour)
    firsts = [members[0] for members in works.values()]
    names = [
        ("all layers of " if row["part"] == "model" else "") + f"{row['shape']} {row['formula']}"
        for row in firsts
    ]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = min(found) / 1.2, max(found) * 1.5
    axes.set_xlim(low, high)
    plain_log_ticks(axes.xaxis, low, high)
    axes.axvline(1, color=INK, lw=1)
    axes.set_xlabel("times as fast as published code (log scale)", fontsize=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(axis="both", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)


def to_mlflow(rows: list[Row], runs: Path, artifacts: tuple[Path, ...]) -> None:
    """For each device one run with tables and picture, and below it one for every row."""
    for place, group in by(rows, PLACE).items():
        children = []
        for row in group:
            asked = {key: row[key] for key in KEYS}
            words = (asked[key] for key in ("part", "shape", "formula", "request", "contender"))
            children.append((" ".join(filter(None, words)), asked, metrics(row, group)))
        conditions = {"benchmark": "scoring", **dict(zip(PLACE, place, strict=True))}
        log("scoring", conditions, children, runs=runs, artifacts=artifacts)


def metrics(row: Row, group: list[Row]) -> dict[str, float]:
    """What is known of one row, by name in MLflow."""
    found = {
        "seconds": median(row["seconds"]),
        "first_seconds": row["first_seconds"],
        "speed_up": speed_up(row, group),
        "bandwidth_share": bandwidth(row, group),
        "masks_differ": row["differing"],
        "candidates_per_second": candidates(row) if "formulas" in row else None,
        "times_as_long_as_one": time_of_one(row, group) if "formulas" in row else None,
        "bytes_per_second": rate(row) if "bytes" in row else None,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
