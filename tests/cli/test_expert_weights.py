"""Every command that works on single weights works on a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prunezero.errors import ModelError
from tests.cli.conftest import SMALL, Run, flat, small_space
from tests.tiny_moe import save_stacked


@pytest.fixture
def mixture(run: Run, tiny_files: tuple[Path, Path]) -> str:
    """Options that name a mixture in the folder at hand, and text enough for its experts."""
    save_stacked("mixtral", Path("mixture"))
    more = SMALL.replace("--calibration-tokens 64", "--calibration-tokens 1024")
    return f"--model mixture --text {tiny_files[1]} {more}"


def zeros(folder: str) -> float:
    weights = load_file(Path(folder) / "model.safetensors")
    inside = [weight for name, weight in weights.items() if ".experts." in name]
    assert len(inside) == 2 * 4 * 3
    return float(sum((one == 0).sum() for one in inside)) / sum(one.numel() for one in inside)


def test_a_mixture_is_pruned_in_memory_and_block_by_block(run: Run, mixture: str) -> None:
    told = f"prune {mixture} --sparsity 0.5 --recipe wanda"
    result = run(f"{told} --output whole --json whole.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "24 prunable layers" in result.output
    result = run(f"{told} --output streamed --memory-limit 2GiB")
    assert result.exit_code == 0, (result.output, result.exception)
    assert zeros("whole") == zeros("streamed") == 0.5
    whole, streamed = (load_file(f"{name}/model.safetensors") for name in ("whole", "streamed"))
    assert all(whole[name].equal(weight) for name, weight in streamed.items())


def test_recipes_are_compared_on_a_mixture(run: Run, mixture: str) -> None:
    told = "--recipes wanda,sparsegpt,gblm --statistics dense --json rows.json"
    result = run(f"compare {mixture} --sparsity 0.5 {told}")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.5, 0.5, 0.5]
    assert len({row["validation_perplexity"] for row in rows}) == 4


def test_a_search_on_a_mixture_finds_a_criterion_that_verifies(run: Run, mixture: str) -> None:
    small_space(Path("small.yaml"))
    told = "--space small.yaml --budget 8 --name mine --seed 3"
    result = run(f"search {mixture} --sparsity 0.5 {told}")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "found: " in result.output
    result = run("verify runs/mine")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "perplexities agree" in result.output


def test_heads_of_a_mixture_go_and_its_experts_stay(run: Run, mixture: str) -> None:
    result = run(f"prune {mixture} --sparsity 0.5 --recipe minitron_heads --output smaller")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "4 of 8 heads are gone" in flat(result.output)
    before, after = (load_file(f"{name}/model.safetensors") for name in ("mixture", "smaller"))
    assert all(after[name].equal(before[name]) for name in before if ".experts." in name)


@pytest.mark.parametrize(
    "recipe", ["minitron_neurons", "shortgpt", "minitron_channels", "slice_gpt"]
)
def test_units_that_experts_are_a_part_of_are_refused_by_name(
    recipe: str, run: Run, mixture: str
) -> None:
    result = run(f"prune {mixture} --sparsity 0.5 --recipe {recipe}")
    assert isinstance(result.exception, ModelError)
    assert "experts.0.gate_up_proj' belongs to an expert" in str(result.exception)
