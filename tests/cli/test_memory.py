"""`--memory-limit` of compare and search finds the same, and `plan` says what is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prunezero.cli.plan import SET_ASIDE_BYTES, smallest_device
from prunezero.errors import ModelError, RecipeError
from prunezero.report.runs.summary import read_candidates
from tests.cli.conftest import Run, flat, small_space
from tests.tiny_models import save_tiny_model

COMPARE = "compare MODEL --recipes wanda,gblm,sparsegpt --sparsity 0.5"
SEARCH = "search MODEL --sparsity 0.5 --space small.yaml --budget 6"


def rows_of(path: str) -> list[dict[str, Any]]:
    rows = json.loads(Path(path).read_text())["rows"]
    times = ("seconds", "elapsed")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def test_compare_within_a_limit_prints_and_writes_what_it_takes_and_the_same_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"{COMPARE} --json whole.json").exit_code == 0
    monkeypatch.setenv("PRUNEZERO_CACHE", "another")
    limited = run(f"{COMPARE} --json limited.json --memory-limit 900MiB")
    assert limited.exit_code == 0, limited.output
    assert rows_of("limited.json") == rows_of("whole.json")
    memory = json.loads(Path("limited.json").read_text())["memory"]
    assert memory["limit_bytes"] == 900 * 2**20 >= memory["planned_bytes"] > 0
    assert 0 < memory["peak_bytes"] and memory["gradient_passes"] == 1
    assert "memory" not in json.loads(Path("whole.json").read_text())
    assert re.search(
        r"this takes about .* MiB of memory while .*; the limit is 900", limited.output
    )
    assert re.search(r"peak memory: .* \(planned .*\); the limit is 900\.0 MiB", limited.output)


def test_a_search_within_a_limit_finds_the_same_candidates_and_winner(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_space(Path("small.yaml"))
    for name, limit in (("whole", ""), ("limited", "--memory-limit 900MiB")):
        monkeypatch.setenv("PRUNEZERO_CACHE", name)
        result = run(f"{SEARCH} --name {name} --runs-dir {name} --json {name}.json {limit}")
        assert result.exit_code == 0, (result.output, result.exception)
    found = [
        [
            (row["formula"], row["layer_error"], row["search_perplexity"])
            for row in read_candidates(Path(name, name)) or []
        ]
        for name in ("whole", "limited")
    ]
    assert found[0] == found[1] and len(found[0]) >= 6
    winners = [rows_of(f"{name}.json")[-1] for name in ("whole", "limited")]
    assert winners[0] | {"recipe": ""} == winners[1] | {"recipe": ""}
    written = json.loads(Path("limited", "limited", "memory.json").read_text())
    assert written["memory"] == json.loads(Path("limited.json").read_text())["memory"]
    assert not Path("whole", "whole", "memory.json").exists()


@pytest.mark.parametrize(
    ("command", "error", "fault"),
    [
        (f"{COMPARE} --memory-limit 100K", ModelError, "this takes at least"),
        (f"{SEARCH} --name a --memory-limit 100K", ModelError, "MiB will do"),
        (f"{COMPARE} --memory-limit much", RecipeError, "must be a size"),
        (f"{SEARCH} --workers 2 --memory-limit 1GiB", RecipeError, "kept by one process"),
        (
            "compare MODEL --recipes two_ssp --sparsity 0.3 --memory-limit 1GiB",
            RecipeError,
            "has several stages",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_work(
    command: str, error: type[Exception], fault: str, run: Run
) -> None:
    small_space(Path("small.yaml"))
    result = run(command)
    assert isinstance(result.exception, error)
    assert fault in flat(str(result.exception))
    assert not Path("runs/a/journal.jsonl").exists()


def test_the_least_limit_that_a_refusal_names_is_enough(run: Run) -> None:
    recipes = "compare MODEL --recipes gblm --sparsity 0.5"
    refused = run(f"{recipes} --memory-limit 100K")
    (least,) = re.findall(r"; ([\d.]+) MiB will do", str(refused.exception))
    assert run(f"{recipes} --memory-limit {float(least) + 0.1:.1f}MiB").exit_code == 0


def test_plan_tells_each_work_and_signal_and_which_device_holds_it(
    run: Run, tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    result = run(f"plan --config {folder} --json plan.json --sequence-length 16")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("plan.json").read_text())
    kinds = {(row["work"], row["signal"]) for row in found["rows"]}
    signals = ("none", "activations", "gradients", "second order")
    assert kinds >= {("compare", one) for one in signals}
    assert {work for work, _ in kinds} == {"prune --memory-limit", "compare", "search"}
    for row in found["rows"]:
        if row["work"] == "prune --memory-limit":
            assert (row["least_limit_bytes"] is None) == (row["signal"] == "gradients")
            continue
        assert row["least_limit_bytes"] < row["in_memory_bytes"]
        assert row["in_memory_on_gb"] == row["least_limit_on_gb"] == 24
    assert "devices of 24, 80, 141 GB, 2 GiB of which are set aside" in flat(result.output)


def test_the_smallest_device_is_told_or_none() -> None:
    spare = SET_ASIDE_BYTES
    assert smallest_device(24 * 10**9 - spare) == 24
    assert smallest_device(24 * 10**9 - spare + 1) == 80
    assert smallest_device(141 * 10**9) is None


@pytest.mark.parametrize(
    ("command", "error", "fault"),
    [
        ("plan --config ./nowhere", ModelError, "cannot be loaded"),
        ("plan --config . --device tpu", RecipeError, "must be cuda or cpu"),
        ("plan --config . --recipes nothing", RecipeError, "not a known recipe"),
        ("plan --config MODEL --recipes snapkv", RecipeError, "is left out while a model runs"),
        ("plan --config MODEL --space neurons", RecipeError, "choose one of weights"),
    ],
)
def test_plan_refuses_in_one_sentence(
    command: str, error: type[Exception], fault: str, tiny_files: tuple[Path, Path], run: Run
) -> None:
    result = run(command.replace("MODEL", str(tiny_files[0])))
    assert isinstance(result.exception, error) and fault in str(result.exception)


@pytest.mark.slow
def test_plan_takes_the_names_that_other_commands_take(run: Run) -> None:
    result = run("plan --config demo --recipes wanda --json plan.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("plan.json").read_text())
    work = next(row for row in found["rows"] if row["work"] == "compare")
    # More than its 134.5 million weights of four bytes.
    assert found["config"] == "demo" and work["in_memory_bytes"] > 4 * 134_515_008
