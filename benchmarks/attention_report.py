"""The table of `attention.py`, from the lines that it wrote."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

from rows import under_equal

# Rows stand in one table only where these are the same.
CONDITIONS = (
    *("model", "text", "windows", "prompt", "following", "repeated", "skipped"),
    "calibration_windows",
)
TEXTS = ("text", "recall")

Row = dict[str, Any]


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown: means over draws, and in brackets the largest minus the smallest."""
    title = "# Recipes that keep a share of a prompt's keys"
    if not rows:
        return [title, "", "Nothing was measured yet."]
    lines = [
        title,
        "",
        "Made by `python benchmarks/attention.py`. Prompts are read densely, then keys leave the "
        "cache, and what follows is predicted from the rest: *text* goes on as it was written, in "
        "*recall* the prompt's own beginning comes again behind other text. A cell is the mean "
        "over draws of windows, and in brackets the largest minus the smallest; without brackets "
        "there is one draw. KL is to the dense model. Bytes are those of the cache behind the "
        "prompt, counted on its tensors, and links those between what follows and all tokens "
        "before it, both beside the dense ones. *Simulated* are recipes that look at attention "
        "between all tokens, or at tokens yet to come, or whose heads keep unequal "
        "numbers of keys: they save less than they look, or nothing.",
        "",
    ]
    for found in under_equal(rows, CONDITIONS):
        lines += _under_equal_conditions(found)
    return lines


def _under_equal_conditions(rows: list[Row]) -> list[str]:
    one, dense = rows[0], [row for row in rows if row["recipe"] == "dense"]
    machines = sorted({f"{row['threads']} threads of {row['cpu']}" for row in rows})
    lines = [
        f"## {one['model']}, float32, prompts of {one['prompt']:,} tokens",
        "",
        f"{one['windows']} windows a draw of {one['text']} text; behind the prompt "
        f"{one['following']} tokens, or {one['repeated']} that come again and are measured behind "
        f"the first {one['skipped']}; dense: text {_perplexity(dense, 'text')}, recall "
        f"{_perplexity(dense, 'recall')}; {' and '.join(machines)}.",
        "",
    ]
    for kept in sorted({row["kept"] for row in rows if row["recipe"] != "dense"}, reverse=True):
        chosen = [row for row in rows if row["kept"] == kept and row["recipe"] != "dense"]
        lines += [f"### {100 * kept:g} % of the keys", "", *_table(chosen, dense), ""]
    return lines


def _table(rows: list[Row], dense: list[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["form"]].append(row)
    measured = {
        key: found for key, found in groups.items() if not any("refused" in row for row in found)
    }
    ranked = sorted(measured, key=lambda key: _mean(measured[key], "text_kl"))
    lines = [
        "| recipe | form | windows | text | KL | recall | KL | bytes | links | simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in ranked:
        found = measured[key]
        cells = [
            cell
            for name in TEXTS
            for cell in (_perplexity(found, name), _spread(found, f"{name}_kl", 3))
        ]
        part = _mean(found, "kv_bytes") / _mean(dense, "kv_bytes") if dense else math.nan
        computed = f"{100 * _mean(found, 'links'):.0f} %"
        is_simulated = "yes" if found[0]["simulated"] else "no"
        lines.append(
            f"| `{key[0]}` | {key[1]} | {len(found)} | "
            + " | ".join([*cells, f"{100 * part:.0f} %", computed, is_simulated])
            + " |"
        )
    refused = sorted(
        {
            (*key, row["refused"])
            for key, found in groups.items()
            for row in found
            if "refused" in row
        }
    )
    return [*lines, *(f"\n`{name}`, {form}, was refused: {why}" for name, form, why in refused)]


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _by_draw(rows: list[Row], key: str) -> list[float]:
    draws: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        draws[row["draw"]].append(row[key])
    return [statistics.fmean(values) for values in draws.values()]


def _perplexity(rows: list[Row], name: str) -> str:
    """Windows are equally long, so the mean of their losses is that of all tokens."""
    return _cell([math.exp(loss) for loss in _by_draw(rows, f"{name}_loss")], 2)


def _spread(rows: list[Row], key: str, digits: int) -> str:
    return _cell(_by_draw(rows, key), digits)


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ({max(values) - min(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
