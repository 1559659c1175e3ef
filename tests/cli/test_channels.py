"""`prunezero prune` makes the residual stream narrower, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from prunezero.errors import PruneZeroError
from tests.cli.conftest import Run, flat
from tests.tiny_models import tiny_batches


def test_prune_saves_a_narrower_model_and_says_what_is_gone(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run(
        "prune MODEL --recipe minitron_channels --sparsity 0.125 --output out --json o.json"
    )
    assert result.exit_code == 0, result.output
    assert "4 of 32 channels are gone" in flat(result.output)
    assert "read anew, its logits differ by at most 0 from those in memory" in flat(result.output)
    row = json.loads(Path("o.json").read_text())
    assert (row["removed"], row["units_removed"], row["unit"]) == (0.125, 4, "channel")
    model = AutoModelForCausalLM.from_pretrained("out")
    assert (model.config.hidden_size, model.config.head_dim) == (28, 8)
    # What was measured is the model in the files, which no zeros stand for.
    again = run("prune MODEL --model out --recipe magnitude --sparsity 0 --json again.json")
    assert again.exit_code == 0, again.output
    told = json.loads(Path("again.json").read_text())
    assert told["test_perplexity"] == pytest.approx(row["test_perplexity"], rel=1e-5)


def test_a_width_that_the_usual_class_refuses_has_a_class_of_its_own(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe minitron_channels --sparsity 0.1 --output out")
    assert result.exit_code == 0, result.output
    assert "its width is unusual, so load it by" in flat(result.output)
    assert "3 of 32 channels are gone" in flat(result.output)
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert model.config.hidden_size == 29
    assert model(tiny_batches(1, 8)).logits.shape == (1, 8, 97)
    assert (
        "Its width is one that the usual configuration refuses" in Path("out/README.md").read_text()
    )
    again = run("prune MODEL --model out --recipe minitron_channels --sparsity 0.1 --output again")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("again/config.json").read_text())["hidden_size"] == 27


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--output out --padded", "no zeros stand for channels that are gone"),
        ("--statistics sequential", "a channel has a part in every block"),
        ("--targets q_proj", "is not among the layers that are pruned, but a channel of stream"),
        ("--allocate slopes", "allocate: slopes is for unit"),
        ("--output out --memory-limit 900MiB", "unit channel takes a part of every block along"),
    ],
)
def test_what_cannot_be_done_to_channels_is_said_in_one_sentence(
    command: str, said: str, run: Run
) -> None:
    result = run(f"prune MODEL --recipe minitron_channels --sparsity 0.125 {command}")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)
    assert set(os.listdir()) <= {"cache"}


def test_compare_measures_each_recipe_on_the_model_that_it_leaves(run: Run) -> None:
    names = "minitron_channels,minitron_neurons,magnitude,minitron_channels"
    result = run(f"compare MODEL --recipes {names} --sparsity 0.25 --json o.json")
    assert result.exit_code == 0, result.output
    _, first, *_, last = json.loads(Path("o.json").read_text())["rows"]
    assert first["test_perplexity"] == last["test_perplexity"]
    assert torch.isfinite(torch.tensor(first["kl"]))
