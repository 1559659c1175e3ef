"""The command line on a tiny model and a text file, in a folder of its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prunezero.cli import app
from prunezero.pruning.recipes.documents import write_document
from prunezero.report.tracking import database
from prunezero.searching import search as searching
from prunezero.searching.spaces.space import SearchSpace
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


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which MLflow has made its tables, which takes it seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client, _ = database.open_client(f"sqlite:///{path}", path.parent)
    client.search_experiments(max_results=1)
    # What is still beside it would not be copied.
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def run(
    tiny_files: tuple[Path, Path],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run a command as a user would type it; `MODEL` stands for the tiny model and its sizes.

    Databases begin as copies; `finished_search` and tests of processes let MLflow make its own.
    """
    prepare = database.prepare_database

    def copied(path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(empty_database, path)
        prepare(path)

    monkeypatch.setattr(database, "prepare_database", copied)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return typing(tiny_files)


def typing(tiny_files: tuple[Path, Path]) -> Run:
    """What `run` does, in the folder at hand."""
    model, text = tiny_files

    def typed(command: str) -> Result:
        words = command.replace("MODEL", f"--model {model} --text {text} {SMALL}").split()
        return CliRunner().invoke(app, words)

    return typed


def flat(text: str) -> str:
    """Text without the ends of lines: names of folders are long."""
    return " ".join(text.split())


def small_space(path: Path, **changes: object) -> None:
    """A search space in generations of four, of which three are measured."""
    fields = SearchSpace.load("formulas").model_dump(mode="json")
    small = {"name": "small", "generation": 4, "measured": 3, "tuned": 0, "max_complexity": 9}
    write_document({**fields, **small, **changes}, path)


@pytest.fixture(scope="session")
def finished_search(
    tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a search that ended; to look at, not to change.

    What it printed stands beside its runs folder, in `output`.
    """
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # The file of the space is not where the copies are: a search has to remember it.
        small_space(Path("small.yaml"))
        command = "search MODEL --sparsity 0.5 --space small.yaml --budget 12 --name mine --seed 3"
        result = typing(tiny_files)(command)
    assert result.exit_code == 0, result.output
    (folder / "output").write_text(result.output)
    return folder / "runs" / "mine"


@pytest.fixture
def mine(finished_search: Path, run: Run) -> Path:
    """A copy of it, as `runs/mine` of the folder at hand."""
    return Path(shutil.copytree(finished_search, Path("runs/mine")))


@contextmanager
def interrupted_at(place: int) -> Iterator[None]:
    """Within it, a search is told to end when it hands over its candidate of this number."""
    whole = searching.search

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, candidate in enumerate(whole(*args, **kwargs)):
            if number == place:
                os.kill(os.getpid(), signal.SIGINT)
            yield candidate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "search", interrupted)
        yield
