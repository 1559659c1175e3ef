"""`prunezero compare` says it where the dense model is not the one that papers pruned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunezero.pruning import testbed as testbeds
from prunezero.report.tracking import tracker as track
from tests.cli.conftest import Run
from tests.searching.testbed import tiny_testbed

HUB = "--model huggyllama/llama-7b --text Salesforce/wikitext:wikitext-2-raw-v1"


class Untracked:
    """A tracker that keeps nothing."""

    def __init__(self, runs_dir: Path) -> None:
        pass

    def record(self, record: Any) -> None:
        pass

    def close(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [(HUB, True), ("--model demo --text demo", False), ("--model huggyllama/llama-7b", False)],
)
def test_a_warning_stands_under_the_table(
    options: str, is_warned: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_up(model: str, text: str, *args: Any, **kwargs: Any) -> testbeds.Testbed:
        testbed = tiny_testbed()
        language_model = replace(testbed.language_model, name=model)
        return replace(
            testbed, language_model=language_model, text=replace(testbed.text, name=text)
        )

    monkeypatch.setattr(testbeds, "set_up", set_up)
    # Nothing is asked of MLflow here, which takes longer than all the rest.
    monkeypatch.setattr(track, "Tracker", Untracked)
    result = run(f"compare {options} --recipes magnitude --sparsity 0.5")
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    told = [place for place, line in enumerate(lines) if line.startswith("warning: published")]
    assert len(told) == is_warned
    for place in told:
        assert "windows of 128 and 2,048 tokens; those of 16 cannot be compared" in lines[place]
        assert lines[place - 1].startswith("perplexity of")
    # Its weights are random.
    assert "worse than the 14.54 of knowing only how frequent each token is" in result.output
