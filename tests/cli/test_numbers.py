"""Every number that a command takes has two ends, and nonsense is refused before any work."""

from __future__ import annotations

import time
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from typer.models import OptionInfo

from prunezero.cli import app, search_setup
from prunezero.cli.quantities import bytes_of, seconds_of
from prunezero.errors import PruneZeroError, RecipeError
from prunezero.models.loading import load as loading
from tests.cli.conftest import Run

# Amounts with a unit, which are text to typer.
AMOUNTS = ("--time", "--memory-limit")
HUGE = "9" * 25
NONSENSE = ["-1", HUGE, "9" * 5000, "nan", "1e400", "٣", ""]
# What each command needs beside; it must never come to that.
NEEDED = {
    "search": "--sparsity 0.5 --budget 5 --name x --model nowhere",
    "compare": "--sparsity 0.5 --model nowhere",
    "prune": "--sparsity 0.5 --model nowhere --output out",
    "plan": "--config nowhere",
    "transfer": "wanda --sparsity 0.5 --models nowhere",
    "show": "nothing",
    "verify": "nothing",
    "ui": "",
}


def numbers() -> list[tuple[str, str, type, OptionInfo]]:
    """Command, option, type and description of every number."""
    found: list[tuple[str, str, type, OptionInfo]] = []
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        for key, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *extras = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            info = next((one for one in extras if isinstance(one, OptionInfo)), None)
            if info is None:
                continue
            # typer takes the first spelling for a default until it sees the annotation.
            words = [info.default, *(info.param_decls or ())]
            spelled = [one for one in words if isinstance(one, str) and one.startswith("--")]
            option = (spelled or [f"--{key.replace('_', '-')}"])[0]
            if _is_a(kind, int) or _is_a(kind, float) or option in AMOUNTS:
                found.append((name, option, int if _is_a(kind, int) else float, info))
    return found


def _is_a(kind: Any, wanted: type) -> bool:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return wanted in parts


NUMBERS = numbers()


def test_the_list_of_numbers_is_whole() -> None:
    assert {command for command, *_ in NUMBERS} == set(NEEDED)
    options = {option for _, option, *_ in NUMBERS}
    assert {"--threads", "--workers", "--seed", "--port", "--draws", *AMOUNTS} <= options


def test_every_whole_number_has_two_ends() -> None:
    for command, option, kind, info in NUMBERS:
        if kind is int:
            assert info.min is not None and info.max is not None, (command, option)


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: value[:8])
def test_nonsense_is_refused_at_once_and_leaves_nothing(
    value: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr(loading, "load_model", never)
    monkeypatch.setattr(loading, "local_folder", never)
    for command, option, *_ in NUMBERS:
        begin = time.monotonic()
        result = run(f"{command} {NEEDED[command]} {option}={value}")
        assert time.monotonic() - begin < 5
        error = result.exception
        assert result.exit_code in (1, 2), (command, option, result.output)
        assert isinstance(error, SystemExit | PruneZeroError), (command, option, error)
        said = str(error) if isinstance(error, PruneZeroError) else result.output
        assert option in said or option == "--sparsity", (command, option, said)
        assert "Traceback" not in said and len(said) < 1000, (command, option, said)
    assert not list(Path().iterdir())


def test_threads_and_workers_are_told_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    search_setup.check_workers(16, 64, None)
    search_setup.check_workers(17, 65, "local")
    with pytest.raises(RecipeError, match="--threads must be 1 to 64 on this machine of 2 cores"):
        search_setup.check_workers(1, 65, None)
    with pytest.raises(RecipeError, match="--workers must be 1 to 16 .* but is 17"):
        search_setup.check_workers(17, None, None)


AMOUNTS_READ = [
    (bytes_of, "1KiB", 1024),
    (bytes_of, "1024TiB", 2**50),
    (bytes_of, "1.5 GB", 1_500_000_000),
    (seconds_of, "90", 90),
    (seconds_of, "0.01s", 0.01),
    (seconds_of, "8760h", 8760 * 3600),
]


@pytest.mark.parametrize(("read", "text", "value"), AMOUNTS_READ)
def test_amounts_between_the_ends_are_read(read: Any, text: str, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    "text", ["1B", "1000B", "1025TiB", "9" * 40 + "GiB", "1e3GiB", "GiB", "5m"]
)
def test_sizes_beyond_the_ends_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a size from 1KiB to 1024TiB"):
        bytes_of(text)


@pytest.mark.parametrize("text", ["0", "0.001s", "8761h", "9" * 40, "1KiB", "٣s"])
def test_durations_beyond_the_ends_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a duration from 0.01s to 8760h"):
        seconds_of(text)
