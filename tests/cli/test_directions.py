"""`prunezero prune` takes directions out of the residual stream, or says why it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError
from tests.cli.conftest import Run, flat
from tests.tiny_models import tiny_batches


def test_prune_saves_a_model_with_several_bases_and_measures_what_it_saved(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    result = run("prune MODEL --recipe slice_gpt --sparsity 0.25 --output out --json o.json")
    assert result.exit_code == 0, result.output
    assert "32 of 128 directions are gone" in flat(result.output)
    assert "its residual stream has several bases, so load it by" in flat(result.output)
    assert "read anew, its logits differ by at most 0 from those in memory" in flat(result.output)
    row = json.loads(Path("o.json").read_text())
    assert (row["removed"], row["units_removed"], row["unit"]) == (0.25, 32, "direction")
    assert "read the residual stream in bases of their own" in Path("out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert model(tiny_batches(1, 8)).logits.shape == (1, 8, 97)
    report = json.loads(Path("out/report.json").read_text())
    assert sum(one.numel() for one in model.parameters()) == report["costs"]["parameters"]
    assert report["saved"]["kind"] == "own_bases"
    again = run("prune MODEL --model out --recipe magnitude --sparsity 0 --json again.json")
    assert again.exit_code == 0, again.output
    told = json.loads(Path("again.json").read_text())
    assert told["test_perplexity"] == pytest.approx(row["test_perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--output out --padded", "no zeros stand for directions that are gone"),
        ("--output out --gguf it.gguf", "no architecture of llama.cpp reads the residual stream"),
        ("--targets q_proj", "is not among the layers that are pruned, but a channel of stream"),
        ("--output out --memory-limit 900MiB", "unit direction turns the residual stream of the"),
    ],
)
def test_what_cannot_be_done_to_directions_is_said_in_one_sentence(
    command: str, said: str, run: Run
) -> None:
    result = run(f"prune MODEL --recipe slice_gpt --sparsity 0.25 {command}")
    assert isinstance(result.exception, PruneZeroError), result.output
    assert said in str(result.exception)
    assert set(os.listdir()) <= {"cache"}


def test_compare_measures_each_recipe_on_the_dense_model(run: Run) -> None:
    names = "slice_gpt,random_units,minitron_channels,slice_gpt"
    result = run(f"compare MODEL --recipes {names} --sparsity 0.25 --json o.json")
    assert result.exit_code == 0, result.output
    _, first, *_, last = json.loads(Path("o.json").read_text())["rows"]
    assert first["test_perplexity"] == last["test_perplexity"]
    assert first["parameters"] == last["parameters"]
