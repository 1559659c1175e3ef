"""How recipes of keys in a cache look on a terminal: measures of several texts, and a front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunezero.cli.fitting import Table
from prunezero.cli.search_setup import way_on
from prunezero.cli.tables import console, say

if TYPE_CHECKING:
    from prunezero.report.runs.attention_run import AttentionRun

Row = Mapping[str, Any]
# Columns by the key of a row: heading, and digits behind the point; without them a share.
_COLUMNS: dict[str, tuple[str, int | None]] = {
    "text_kl": ("KL text", 4),
    "recall_kl": ("KL recall", 4),
    "text_kl_late": ("KL late", 4),
    "text_perplexity": ("text", 2),
    "recall_perplexity": ("recall", 2),
    "needle_answered": ("needle", None),
    "needles_answered": ("needles", None),
    "cloze_answered": ("cloze", None),
}
_WORDS = {"signal": "needs", "formula": "formula"}


def key_table(rows: Sequence[Row], title: str) -> Table:
    """Rows of recipes of run time; those that a search found are bold.

    KL is in nats per token to the model that keeps all keys, text and recall are perplexities, and
    needle, needles and cloze shares of windows that are answered word for word.
    """
    table = Table(title=title)
    shown = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    ranked = any("rank" in row for row in rows)
    headings = ["recipe", *(_COLUMNS[key][0] for key in shown), *(["rank"] if ranked else [])]
    for heading in [*headings, "KV bytes"]:
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for heading in _WORDS.values():
        table.add_column(heading, justify="left", overflow="fold")
    for row in rows:
        cells = [row["recipe"], *(_cell(row.get(key), _COLUMNS[key][1]) for key in shown)]
        cells += [str(row.get("rank", "-"))] if ranked else []
        words = [str(row.get("refused") or row.get(key) or "-") for key in _WORDS]
        table.add_row(*cells, _held(row), *words, style="bold" if row.get("is_found") else None)
    return table


def _cell(value: float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if digits is None else f"{value:.{digits}f}"


def _held(row: Row) -> str:
    """Bytes of keys and values; what only masks leave out saves none."""
    if row.get("simulated"):
        return "simulated"
    held = row.get("kv_bytes")
    return "-" if held is None else f"{held:,.0f}"


def print_front(rows: Sequence[Row]) -> None:
    """The front of a search beside its published rivals, on validation text."""
    console.print(key_table(rows, "front and published recipes on validation text"))
    say("rank 0 is dominated by none in both KL; what the search found is bold")


def show_keys(run: AttentionRun) -> None:
    """What the folder of a search for recipes of keys tells."""
    config = run.config
    about = {
        "search": str(run.folder),
        "model": config.model,
        "text": config.text,
        "sparsity": f"{config.sparsity:g} of a prompt's keys",
        "space": f"{config.space_content.name}, seed {config.seed}"
        + (", from scratch" if config.from_scratch else ""),
        "signals": f"{config.signals}, the costliest that a rule can look at",
        "windows": f"{config.sequence_length} tokens each, three quarters of them a prompt",
    }
    for name, value in about.items():
        say(f"{name:<9} {value}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(run.answers.items()))
    say(f"results: {counts or 'none so far'}")
    if run.rows:
        print_front(run.rows)
    for recipe in run.front:
        say(f"{Path('front', recipe.name + '.yaml')}: {recipe.criterion.text}")
    if not run.rows:
        say(f"not finished; go on with: {way_on(run.folder)} and a --budget or --time")


def keys_data(run: AttentionRun) -> dict[str, Any]:
    """Everything that is shown, for machines."""
    return {
        "folder": str(run.folder),
        "finished": bool(run.rows),
        "config": run.config.model_dump(mode="json"),
        "answers": dict(run.answers),
        "rows": list(run.rows),
        "front": [recipe.model_dump(mode="json", by_alias=True) for recipe in run.front],
    }
