"""`prunezero prune --recipe two_ssp`: a recipe of several stages, from model to folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunezero.pruning.recipes.staged import load_recipe
from tests.cli.conftest import Run, flat


def test_units_of_two_kinds_leave_one_folder(run: Run) -> None:
    result = run("prune MODEL --recipe two_ssp --sparsity 0.5 --output out --json o.json")
    assert result.exit_code == 0, result.output
    row = json.loads(Path("o.json").read_text())
    told = json.loads(Path("out/config.json").read_text())
    # One attention of two, and a share of the neurons of each MLP.
    assert [one["skip"] for one in told["per_layer_config"].values()] == [["attention"]]
    assert told["intermediate_size"] == 64 - (row["units_removed"] - 1) // 2
    total = 2 * (3 * 64 + 2 * 32 + 2 * 16) * 32
    gone = (row["units_removed"] - 1) * 3 * 32 + (2 * 32 + 2 * 16) * 32
    assert row["removed"] == pytest.approx(gone / total)
    said = f"{row['units_removed']} of {2 * 64 + 2} neurons and attentions are gone"
    assert said in flat(result.output)
    assert load_recipe("out/recipe.yaml") == load_recipe("two_ssp")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("export --recipe two_ssp", "has stages (neuron, then attention), which one file of plain"),
        ("prune MODEL --recipe two_ssp --sparsity 0.2 --unit head", "so --unit head says nothing"),
        (
            "prune MODEL --recipe two_ssp --sparsity 0.2 --memory-limit 1GiB --output out",
            "which look at the whole model as pruned so far; leave --memory-limit out",
        ),
        (
            "prune MODEL --recipe minitron_width --sparsity 0.2 --padded --output out",
            "no zeros stand for neurons, heads and channels that are gone; leave --padded out",
        ),
        ("prune MODEL --recipe two_ssp", "say how much to remove"),
    ],
)
def test_what_stages_cannot_do_is_refused_in_a_sentence(
    run: Run, command: str, sentence: str
) -> None:
    refused = run(command)
    assert refused.exit_code != 0
    assert sentence in str(refused.exception)
    assert not Path("out").exists()


def test_the_lists_tell_stages_and_their_shares(run: Run) -> None:
    assert run("list recipes --json l.json").exit_code == 0
    rows = {row["name"]: row for row in json.loads(Path("l.json").read_text())["recipes"]}
    assert rows["two_ssp"]["formula"] == "neuron: A1; then attention: NLL"
    assert "attention by share power" in rows["two_ssp"]["around it"]
    assert run("list choices --json c.json").exit_code == 0
    choices = json.loads(Path("c.json").read_text())["choices"]
    assert [row["word"] for row in choices if row["key"] == "share"] == ["rest", "part", "power"]
