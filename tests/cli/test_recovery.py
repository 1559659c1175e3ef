"""Recipes that train what is left, from the command line: folder, report and curves in MLflow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from prunezero.errors import ModelError, RecipeError
from prunezero.report.tracking import database
from tests.cli.conftest import Run, flat

UNITS = """
name: mine
criterion: row_norm(W)
compare: model
unit: width
recover:
  lora: {steps: 4, batch: 2, patience: 5, every: 2, held_out: 1, learning_rate: 0.01}
"""
IN_TRAINING = """
name: mine
criterion: row_sum(abs(G_lora*W_lora))
compare: group
unit: {neuron: {members: all}}
schedule: {while_training: {every: 2}}
recover: {lora: {steps: 6, batch: 2, learning_rate: 0.01}}
"""
IN_PERIODS = """
name: mine
criterion: T_norm + T_first
compare: group
unit: neuron
schedule: {periods: {periods: 2}}
recover: {tune: {sequences: 12, batch: 2, learning_rate: 0.01}}
"""
SHEARED = """
name: mine
criterion: T_norm + T_first
compare: group
unit: neuron
schedule: {periods: {periods: 2, direction: change, shrink: half_space, transfer: true}}
recover: {lora: {steps: 6, batch: 2, learning_rate: 0.01}}
"""
OF_SOURCES = """
name: mine
criterion: abs(W)
recover:
  lora:
    {steps: 4, batch: 2, sampling: degradation, measure_every: 2, held_out: 2, learning_rate: 0.01}
"""
WEIGHTS = """
name: mine
criterion: abs(W)
recover: {distil: {steps: 3, batch: 2}}
"""


def test_units_are_trained_around_and_leave_the_saved_model(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    Path("mine.yaml").write_text(UNITS)
    result = run("prune MODEL --recipe mine.yaml --sparsity 0.3 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "neurons and key-value groups are gone" in flat(result.output)
    row = json.loads(Path("o.json").read_text())
    assert [at for at, _ in row["training_losses"]] == [1, 2, 3, 4]
    assert [at for at, _ in row["held_out_losses"]] == [0, 2, 4]
    assert row["steps_skipped"] == 0
    assert json.loads(Path("out/report.json").read_text())["rows"][1]["recover"] == row["recover"]
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # What a training left behind for the case that it was stopped.
    assert not Path("out.partial").exists()


@pytest.mark.parametrize("rules", [IN_TRAINING, IN_PERIODS, SHEARED])
def test_units_that_go_in_a_training_are_sliced_once_at_the_end(rules: str, run: Run) -> None:
    from transformers import AutoModelForCausalLM

    Path("mine.yaml").write_text(rules)
    result = run("prune MODEL --recipe mine.yaml --sparsity 0.5 --output out --json o.json")
    assert result.exit_code == 0, result.output
    row = json.loads(Path("o.json").read_text())
    assert row["removed"] == 0.5 and len(row["training_losses"]) == 6
    # Of 64.
    assert AutoModelForCausalLM.from_pretrained("out").config.intermediate_size == 32
    assert not Path("out.partial").exists()
    word = "while_training" if rules == IN_TRAINING else "periods"
    assert word in Path("out/recipe.yaml").read_text()


def test_the_loss_curve_stands_in_mlflow(run: Run) -> None:
    Path("mine.yaml").write_text(WEIGHTS)
    result = run("compare MODEL --recipes mine.yaml,magnitude --sparsity 0.5 --json o.json")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("o.json").read_text())["rows"]
    assert "training_losses" not in rows[0] and "training_losses" not in rows[2]
    folder = Path("runs").absolute()
    client, _ = database.open_client(f"sqlite:///{folder / 'mlflow.db'}", folder)
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments)
    (trained,) = [one for one in runs if "recovery/loss" in one.data.metrics]
    assert trained.data.params["recover"] == "distil (batch 2, steps 3)"
    points = client.get_metric_history(trained.info.run_id, "recovery/loss")
    assert [[point.step, point.value] for point in points] == rows[1]["training_losses"]


def test_sources_are_sampled_by_what_they_lost_and_stand_in_report_and_mlflow(
    run: Run, tiny_files: tuple[Path, Path]
) -> None:
    letters = tiny_files[1].read_text()
    Path("a.txt").write_text(letters)
    Path("b.txt").write_text(letters.translate(str.maketrans("abcdefgh", "stuvwxyz")))
    Path("mine.yaml").write_text(OF_SOURCES)
    asked = "compare MODEL --recipes mine.yaml --sparsity 0.5 --json o.json"
    result = run(f"{asked} --text a.txt,b.txt")
    assert result.exit_code == 0, result.output
    assert "is one source" not in flat(result.output)
    row = json.loads(Path("o.json").read_text())["rows"][1]
    names = ["a.txt", "b.txt"]
    assert row["sources"] == ", ".join(names)
    assert row["steps_skipped_by_source"] == dict.fromkeys(names, 0)
    assert sum(row["trained_tokens_by_source"].values()) == 4 * 2 * 16
    assert [at for at, _ in row["source_growth"]["a.txt"]] == [0, 2]
    losses = row["window_losses"]["validation"]
    expected = {name: math.exp(sum(losses[at::2]) / 2) for at, name in enumerate(names)}
    assert row["validation_perplexity_by_source"] == pytest.approx(expected)
    folder = Path("runs").absolute()
    client, _ = database.open_client(f"sqlite:///{folder / 'mlflow.db'}", folder)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    (trained,) = [one for one in runs if "recovery/loss" in one.data.metrics]
    assert trained.data.params["sources"] == "a.txt, b.txt"
    for place, name in enumerate(names, start=1):
        points = client.get_metric_history(trained.info.run_id, f"recovery/share/{place} {name}")
        assert [[one.step, one.value] for one in points] == row["source_shares"][name]
        points = client.get_metric_history(trained.info.run_id, f"recovery/growth/{place} {name}")
        assert [[one.step, one.value] for one in points] == row["source_growth"][name]
    single = run(asked)
    told = "letters.txt is one source, so mine trains on all of its windows equally often"
    assert single.exit_code == 0 and told in flat(single.output)
    assert "sources" not in json.loads(Path("o.json").read_text())["rows"][1]


def test_what_cannot_be_trained_is_said_before_the_work(run: Run) -> None:
    Path("mine.yaml").write_text(WEIGHTS.replace("steps: 3", "targets: [qq_proj]"))
    wrong = run("prune MODEL --recipe mine.yaml --sparsity 0.5")
    assert isinstance(wrong.exception, ModelError) and "matches no layer" in str(wrong.exception)
    Path("mine.yaml").write_text(WEIGHTS.replace("abs(W)", "abs(W)\nunit: channel"))
    wrong = run("prune MODEL --recipe mine.yaml --sparsity 0.5")
    assert isinstance(wrong.exception, RecipeError)
    Path("mine.yaml").write_text(WEIGHTS)
    wrong = run("prune MODEL --recipe mine.yaml --sparsity 0.5 --memory-limit 1GiB --output out")
    assert "recover distil trains all blocks together" in str(wrong.exception)
