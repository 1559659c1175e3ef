"""The command line on a tiny model and a text file, in a folder of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prunezero.cli import app
from tests.tiny_models import save_tiny_model

# What makes any command quick on a tiny model.
SMALL = "--sequence-length 16 --calibration-tokens 64 --evaluation-tokens 64 --test-tokens 64"

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved tiny model and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices("abcdefgh ,.", k=200)) for _ in range(60)]
    text = folder / "letters.txt"
    text.write_text("\n\n".join(paragraphs))
    return save_tiny_model("llama", folder / "model"), text


@pytest.fixture
def run(tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as a user would type it; `MODEL` stands for the tiny model and its sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model, text = tiny_files

    def typed(command: str) -> Result:
        words = command.replace("MODEL", f"--model {model} --text {text} {SMALL}").split()
        return CliRunner().invoke(app, words)

    return typed
