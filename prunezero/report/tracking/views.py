"""The web page's ready-made views of an experiment: Leaderboard, Pareto, Transfer and others.

MLflow (3.16 and later) keeps a saved view as an experiment tag of JSON. The format is not
documented: it was read from MLflow 3.17.2's web page and is pinned by a test, and when MLflow
changes it, publishing warns and nothing else fails.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Mapping
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."
# A fixed moment, so that publishing the same view again changes nothing (ms since 1970).
CREATED_AT = 1_793_491_200_000
PERPLEXITY = "eval/search_perplexity"
NOTE = """Each row is one pruned model, or one search that holds its candidates.

- **role**: `candidate` (a formula that was measured), `baseline` (a published method), `dense`
  (the model before pruning), `winner` (the exported winner), `search`.
- **eval/search_perplexity** decides the search, unless it has another objective, such as
  **eval/search_acceptance**; **eval/validation_perplexity** was never searched
  on, and **eval/test_perplexity** is only read at the end. Lower is better.
- Saved views: Leaderboard, Pareto, Evolution, Transfer, Baselines (the list's view menu).
"""

# Pixels: formulas are long, and the headings name their section.
WIDTHS = {
    "metrics.`eval/search_perplexity`": 190,
    "metrics.`eval/validation_perplexity`": 210,
    "metrics.`eval/test_perplexity`": 190,
    "metrics.`formula/complexity`": 160,
    "params.`formula`": 360,
}

# How a view opens, where not as charts.
MODES = {"Leaderboard": "TABLE"}

log = logging.getLogger(__name__)


def publish(client: Any, experiment_id: str) -> None:
    """Set the experiment's tags where they differ; a failure only warns."""
    try:
        stored = client.get_experiment(experiment_id).tags
        for name, value in experiment_tags().items():
            if stored.get(name) != value:
                client.set_experiment_tag(experiment_id, name, value)
    except Exception as error:
        log.warning("MLflow's saved views could not be written (%s)", error)


def experiment_tags() -> dict[str, str]:
    """Every tag of the experiment: its kind, its primary metric, its note, its saved views."""
    return {
        # Without its kind the web page guesses, and may open the pages for chat applications.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": PERPLEXITY,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
        "mlflow.note.content": NOTE,
        **{VIEW_TAG + key: encode_view(name, state) for key, (name, state) in VIEWS.items()},
    }


def encode_view(name: str, state: Mapping[str, Any]) -> str:
    """A tag's value: an envelope around the compressed state, far below MLflow's 20,000 letters."""
    text = json.dumps(state, separators=(",", ":"), sort_keys=True)
    packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    envelope = {"name": name, "createdAt": CREATED_AT, "updatedAt": CREATED_AT, "state": packed}
    return json.dumps(envelope, separators=(",", ":"))


def _view(
    *,
    filter_text: str,
    columns: tuple[str, ...],
    charts: dict[str, list[dict[str, Any]]],
    order: str = f"metrics.`{PERPLEXITY}`",
    ascending: bool = True,
) -> dict[str, Any]:
    """The state of one view: which runs, which columns, which chart sections."""
    sections = []
    cards = []
    for title, members in charts.items():
        section = f"prunezero-{title.lower().replace(' ', '-')}"
        sections.append(
            {
                "uuid": section,
                "name": title,
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": min(len(members), 2),
                "cardHeight": 360 if len(members) > 1 else 520,
            }
        )
        for index, card in enumerate(members):
            place = {"uuid": f"{section}-{index}", "metricSectionId": section}
            cards.append({**card, **place, "deleted": False, "isGenerated": False})
    return {
        "searchFilter": filter_text,
        "orderByKey": order,
        "orderByAsc": ascending,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": list(columns),
        # The page reads the widths of the columns that it has an order for.
        "columnOrder": list(columns),
        "columnWidths": {column: width for column, width in WIDTHS.items() if column in columns},
        "compareRunCharts": cards,
        "compareRunSections": sections,
        "isAccordionReordered": True,
    }


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "metricKey": metric, "runsCountToCompare": 100}


def _line(*metrics: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metrics[0],
        "selectedMetricKeys": list(metrics),
        "xAxisKey": "step",
        "useGlobalXaxisKey": False,
        # Without this the page smooths, and a best-so-far curve shows values that never were.
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
    }


def _scatter(horizontal: str, vertical: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "xaxis": {"key": horizontal, "type": "METRIC"},
        "yaxis": {"key": vertical, "type": "METRIC"},
        "runsCountToCompare": 1000,
    }


def _parallel(params: tuple[str, ...], metrics: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": "PARALLEL",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
        "runsCountToCompare": 1000,
    }


# MLflow's filter language has no IN for tags, and no OR.
_PRUNED = "tags.role != 'search' AND tags.role != 'dense'"
_COMPARED = "tags.role != 'search' AND tags.role != 'candidate'"
_COLUMNS = (
    f"metrics.`{PERPLEXITY}`",
    "metrics.`eval/validation_perplexity`",
    "metrics.`formula/complexity`",
    "params.`formula`",
    "params.`signal`",
)

# Fixed ids: publishing again replaces a view instead of adding one.
VIEWS: dict[str, tuple[str, dict[str, Any]]] = {
    "prunezero-leaderboard": (
        "Leaderboard",
        _view(
            filter_text=_PRUNED,
            columns=_COLUMNS,
            charts={"Best of all": [_bar(PERPLEXITY)]},
        ),
    ),
    "prunezero-pareto": (
        "Pareto",
        _view(
            filter_text=_PRUNED,
            columns=_COLUMNS,
            charts={
                "Trade-offs": [
                    _scatter("formula/complexity", PERPLEXITY),
                    _scatter("eval/layer_error", PERPLEXITY),
                ],
                "All axes": [
                    _parallel(("generation", "complexity"), ("eval/layer_error", PERPLEXITY))
                ],
            },
        ),
    ),
    "prunezero-evolution": (
        "Evolution",
        _view(
            filter_text="tags.role = 'search'",
            columns=("attributes.`Source`",),
            order="attributes.start_time",
            ascending=False,
            charts={
                "Search": [
                    _line("search/best_perplexity", "search/median_perplexity"),
                    _line("search/valid_rate", "search/unique_rate"),
                    _line("search/seconds_per_candidate"),
                    _line("search/screened"),
                ]
            },
        ),
    ),
    "prunezero-transfer": (
        "Transfer",
        _view(
            filter_text="params.origin LIKE 'transfer of %'",
            columns=(
                "metrics.`eval/test_perplexity`",
                "metrics.`eval/validation_perplexity`",
                "params.`model`",
                "params.`text`",
                "params.`formula`",
            ),
            order="params.model",
            charts={"On other models and texts": [_bar("eval/test_perplexity"), _bar("eval/kl")]},
        ),
    ),
    "prunezero-baselines": (
        "Baselines",
        _view(
            filter_text=_COMPARED,
            columns=("metrics.`eval/test_perplexity`", *_COLUMNS),
            charts={
                "Published methods": [
                    _bar("eval/test_perplexity"),
                    _bar("eval/validation_perplexity"),
                    _bar(PERPLEXITY),
                    _bar("eval/kl"),
                    _bar("eval/acceptance"),
                    _bar("mask/sparsity"),
                    _bar("cost/seconds"),
                ]
            },
        ),
    ),
}
