"""What `prunezero prune --output` leaves of the files of the source, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prunezero.errors import ModelError
from tests.cli.conftest import SMALL, Run

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Theirs\n"


@pytest.fixture
def source(tiny_files: tuple[Path, Path], run: Run) -> Path:
    """A model with a card and terms of its own, in the folder at hand."""
    folder = Path(shutil.copytree(tiny_files[0], "source"))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Be nice.")
    return folder


@pytest.mark.parametrize("limit", ["", "--memory-limit 900MiB"])
def test_card_and_terms_of_the_source_are_kept_and_ours_names_them(
    limit: str, source: Path, tiny_files: tuple[Path, Path], run: Run
) -> None:
    result = run(
        f"prune --model source --text {tiny_files[1]} {SMALL} --sparsity 0.5 --output out {limit}"
    )
    assert result.exit_code == 0, result.output
    kept = {path.name: path.read_bytes() for path in source.iterdir()}
    made = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    weights, card = "model.safetensors", kept.pop("README.md")
    assert made["README.source.md"] == card == CARD.encode()
    assert kept.pop(weights) != made[weights]
    assert {name: made[name] for name in kept} == kept
    ours = made["README.md"].decode()
    assert "license: apache-2.0" in ours.split("---")[1]
    assert "`README.source.md`" in ours
    assert made.keys() - kept.keys() == {
        weights,
        "README.md",
        "README.source.md",
        "recipe.yaml",
        "report.json",
    }
    assert len(json.loads(made["report.json"])["rows"]) == 2


def test_channels_are_not_moved_in_a_dtype_that_loses_numbers_of_the_files(run: Run) -> None:
    command = "prune MODEL --recipe ria_permuted --pattern 2:4 --dtype bfloat16"
    assert run(command).exit_code == 0
    result = run(f"{command} --output out")
    assert isinstance(result.exception, ModelError)
    assert "load the model with dtype float32" in str(result.exception)
    assert "layers pruned" not in result.output and not Path("out").exists()
