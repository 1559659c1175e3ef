"""`prunezero ui` looks before it starts a server, and passes on how that ended."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from prunezero.errors import OutputError
from prunezero.report.tracking import tracker as track
from tests.cli.conftest import Run


def command_that_ends_with(code: int) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-c", f"raise SystemExit({code})"], dict(os.environ)


@pytest.fixture
def quiet_store(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A runs folder with a database that nobody opens."""
    Path("runs").mkdir()
    Path("runs/mlflow.db").write_text("")
    monkeypatch.setattr(track, "view_links", lambda runs_dir, port: {"Pareto": "http://x"})
    return run


@pytest.mark.parametrize("code", [0, 3])
def test_the_end_of_the_server_is_passed_on(
    code: int, quiet_store: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "ui_command", lambda runs_dir, port: command_that_ends_with(code))
    result = quiet_store("ui --port 5173")
    assert "MLflow on http://127.0.0.1:5173" in result.output
    if code:
        assert isinstance(result.exception, OutputError)
        assert "MLflow ended with exit code 3" in str(result.exception)
    else:
        assert result.exit_code == 0


def test_a_port_that_is_taken_is_told_before_a_server_starts(quiet_store: Run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = quiet_store(f"ui --port {port}")
    assert isinstance(result.exception, OutputError)
    assert f"--port {port} cannot be had (Address already in use)" in str(result.exception)


def test_a_store_that_cannot_be_read_is_one_sentence(
    quiet_store: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(runs_dir: Path, port: int) -> dict[str, str]:
        raise ModuleNotFoundError("No module named 'psycopg'\n(Background on this error)")

    monkeypatch.setattr(track, "view_links", unreadable)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://127.0.0.1:9/x")
    result = quiet_store("ui --port 5174")
    assert isinstance(result.exception, OutputError)
    told = str(result.exception)
    assert told.startswith("the runs at postgresql://127.0.0.1:9/x cannot be read (No module named")
    assert "\n" not in told
