"""What benchmarks/pruning.py compares is the same pruning, and what it says is what it measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.evaluation import evaluate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import with_choices
from tests.tiny_models import save_tiny_model, tiny_batches, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = ("wanda", "ria", "sparsegpt")
TARGETS = ((0.5, "free"), (0.5, "2:4"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sparsity", "pattern"), TARGETS)
def test_the_plain_loop_and_prunezero_leave_the_same_model(
    method: str, sparsity: float, pattern: str
) -> None:
    ours, plain = tiny_model(), tiny_model()
    windows = tiny_batches(8, 32)
    prune(ours, with_choices(Recipe.load(method), pattern=pattern), sparsity, windows=windows)
    kept = None if pattern == "free" else (2, 4)
    baselines = script("rivals_in_torch")
    baselines.prune_block_by_block(plain.model, windows, method, sparsity, kept)
    different = zeros = total = 0
    for mine, other in zip(find_linears(ours.model), find_linears(plain.model), strict=True):
        removed = mine.weight == 0, other.weight == 0
        assert int(removed[0].sum()) == int(removed[1].sum()), mine.name
        different += int((removed[0] != removed[1]).sum())
        zeros += int(removed[1].sum())
        total += mine.weight.numel()
    assert zeros == total // 2
    assert different < 0.001 * total
    text = tiny_batches(4, 32, seed=1)
    perplexities = [evaluate(model, text).perplexity for model in (ours, plain)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.005)


def test_scores_of_the_plain_loop_are_those_of_the_papers() -> None:
    baselines = script("rivals_in_torch")
    weight, inputs = np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([[2.0, 1.0], [0.0, 4.0]])
    linear = torch.nn.Linear(2, 2)
    collected = baselines.Squares(linear)
    for sequence in np.split(inputs, 2):
        collected.add(torch.tensor(sequence.T))
    norms = np.sqrt((inputs**2).sum(0) / 2)
    arguments = torch.tensor(weight), collected.mean
    wanda, ria = baselines.wanda_scores(*arguments), baselines.ria_scores(*arguments)
    assert wanda.numpy() == pytest.approx(abs(weight) * norms)
    shares = abs(weight) / abs(weight).sum(0) + abs(weight) / abs(weight).sum(1, keepdims=True)
    assert ria.numpy() == pytest.approx(shares * norms**0.5)


def test_a_gram_of_the_plain_loop_is_twice_the_mean_over_sequences() -> None:
    inputs = np.arange(12.0).reshape(3, 4)
    collected = script("rivals_in_torch").Gram(torch.nn.Linear(4, 1))
    for row in inputs:
        collected.add(torch.tensor(row[:, None]))
    assert collected.mean.numpy() == pytest.approx(2 / 3 * inputs.T @ inputs, rel=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_peak_memory_is_that_of_the_call_alone() -> None:
    memory = script("seconds_and_memory")
    size = 256 * memory.MIB
    # Written to: memory that is only asked for may take no room.
    before = b"x" * size
    del before
    found = memory.measured(lambda: b"x" * (size // 4))
    assert 60 < found["peak_mib"] - found["loaded_mib"] < 128


start_process = subprocess.run


def run_in_this_process(command: list[str], **options: Any) -> Any:
    if command[1:2] != [str(BENCHMARKS / "pruning_row.py")]:
        return start_process(command, **options)
    return script("pruning_row").main(Path(command[2]))


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a quick run on a tiny model, each row of which stays in this process."""
    monkeypatch.setattr(subprocess, "run", run_in_this_process)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {number} of a text for pruning." for number in range(200)))
    model = save_tiny_model("llama", tmp_path / "dense", max_position_embeddings=64)
    words = f"--model {model} --text {text} --threads 1 --calibration-tokens 128 --repeat 2 "
    words += f"--sequence-length 32 --test-tokens 64 --results {tmp_path} --runs {tmp_path}"
    return words.split()


def test_a_run_writes_rows_table_and_picture_in_the_order_of_turns(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = script("pruning")
    # Its tables take seconds to make; the next test makes them.
    monkeypatch.setattr(pruning, "to_mlflow", lambda *arguments: None)
    pruning.main([*tiny_run, "--methods", "wanda"])
    rows = [json.loads(line) for line in (tmp_path / "pruning.jsonl").read_text().splitlines()]
    order = [(row["contender"], row["pattern"], row["repeat"]) for row in rows]
    names = ["prunezero", "prunezero, dense", "straightforward"]
    assert order[0] == ("dense", "free", 0)
    assert order[1:] == [
        (name, pattern, repeat)
        for repeat, who in enumerate((names, names[1:] + names[:1]))
        for pattern in ("free", "2:4")
        for name in who
    ]
    for row in rows[1:]:
        assert row["sparsity_reached"] == 0.5
        assert row["seconds"] > 0 and row["peak_mib"] >= row["loaded_mib"] > 0
    table = (tmp_path / "pruning.md").read_text()
    assert table.count("| `wanda` | prunezero | 2 |") == 2
    assert "1 thread)" in table
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_start_measures_nothing_anew_and_logs_no_run_twice(
    tiny_run: list[str], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    words = [*tiny_run, "--methods", "ria", "--targets", "2:4"]
    script("pruning").main(words)
    before = (tmp_path / "pruning.jsonl").read_text()
    script("pruning").main(words)
    assert (tmp_path / "pruning.jsonl").read_text() == before
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("benchmarks")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    names = ["prunezero", "prunezero, dense", "straightforward"]
    assert sorted(runs) == ["pruning", *(f"ria 2:4 {name}" for name in names)]
    metrics = runs["ria 2:4 prunezero"].data.metrics
    assert {"seconds", "peak_mib", "perplexity"} <= metrics.keys()
    files = client.list_artifacts(runs["pruning"].info.run_id)
    assert [file.path for file in files] == ["pruning.md", "pruning.png"]


def test_what_fails_in_a_row_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("raise ValueError('the model is gone')")
    pruning = script("pruning")
    job = {"threads": 1, "step": "prune", "contender": "prunezero", "method": "wanda"}
    with pytest.raises(
        SystemExit, match=r"at prune prunezero wanda: ValueError: the model is gone"
    ):
        pruning.in_process(job, tmp_path, script=str(tmp_path / "failing.py"))
    with pytest.raises(SystemExit, match="cannot be run .*--llm-compressor"):
        pruning.in_process(job, tmp_path, python=str(tmp_path / "nowhere"))


def test_a_target_is_a_share_or_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    pruning = script("pruning")
    assert pruning.target("free:0.7") == {"sparsity": 0.7, "pattern": "free"}
    assert pruning.target("1:4") == {"sparsity": 0.75, "pattern": "1:4"}
    for wrong in ("0.5", "free", "free:1.5", "4:2"):
        with pytest.raises(SystemExit):
            pruning.parsed(["--targets", wrong])
        assert f"'{wrong}' is no target" in capsys.readouterr().err
