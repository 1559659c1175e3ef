"""The saved views keep the format that MLflow 3.17.2's web page reads."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from typing import Any

import pytest

from prunezero.report.tracking import views
from prunezero.report.tracking.records import METRIC_NAMES, PARAM_NAMES


def state_of(key: str) -> dict[str, Any]:
    envelope = json.loads(views.experiment_tags()[views.VIEW_TAG + key])
    assert isinstance(envelope["name"], str) and isinstance(envelope["createdAt"], int)
    kind, packed = envelope["state"].split(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_views_have_fixed_ids() -> None:
    assert {key: name for key, (name, _) in views.VIEWS.items()} == {
        "prunezero-leaderboard": "Leaderboard",
        "prunezero-pareto": "Pareto",
        "prunezero-evolution": "Evolution",
        "prunezero-transfer": "Transfer",
        "prunezero-baselines": "Baselines",
    }


@pytest.mark.parametrize("key", views.VIEWS)
def test_every_view_has_the_keys_that_the_page_reads(key: str) -> None:
    state = state_of(key)
    assert set(state) == {
        "searchFilter",
        "orderByKey",
        "orderByAsc",
        "runsHiddenMode",
        "selectedColumns",
        "columnOrder",
        "columnWidths",
        "compareRunCharts",
        "compareRunSections",
        "isAccordionReordered",
    }
    assert state["runsHiddenMode"] == "SHOW_ALL"
    # The page's filter language knows no IN for tags and no OR.
    assert " IN " not in state["searchFilter"] and " OR " not in state["searchFilter"]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    for card in state["compareRunCharts"]:
        assert card["type"] in ("BAR", "LINE", "SCATTER", "PARALLEL")
        assert card["metricSectionId"] in sections
        assert card["deleted"] is False and card["isGenerated"] is False


@pytest.mark.parametrize("key", views.VIEWS)
def test_every_view_shows_names_that_runs_have(key: str) -> None:
    known = {*METRIC_NAMES.values(), *PARAM_NAMES}
    for card in state_of(key)["compareRunCharts"]:
        shown = [card.get("metricKey"), *card.get("selectedMetricKeys", ())]
        shown += [card[axis]["key"] for axis in ("xaxis", "yaxis") if axis in card]
        shown += [*card.get("selectedParams", ()), *card.get("selectedMetrics", ())]
        for name in filter(None, shown):
            assert name in known or name.startswith("search/")


def test_every_tag_is_below_mlflows_limit() -> None:
    assert all(len(value) < 5000 for value in views.experiment_tags().values())


def test_a_failure_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def get_experiment(self, experiment_id: str) -> None:
            raise ConnectionError("away")

    with caplog.at_level(logging.WARNING):
        views.publish(Broken(), "1")
    assert "saved views could not be written" in caplog.text
