"""A place is tried before the work by the very deed, and the trial leaves nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prunezero.errors import OutputError
from prunezero.files import places
from prunezero.files.atomic import write_text
from prunezero.files.places import check_apart, check_room, try_file, try_folder, try_inside
from tests.searching.test_disks import no_file_longer_than


def contents(folder: Path) -> set[tuple[str, bytes | None]]:
    return {
        (str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder at hand, with something of every kind in it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "full", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "lost").symlink_to("no/where")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("full/file")
    (tmp_path / "to_empty").symlink_to("empty")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


LONG = "x" * 250
FOLDERS = ["new", "empty", "some/new/folder", "~/saved", "dangling", "to_empty", "x" * 240]
FILES = ["new.json", "full/file", "dangling", "link", LONG]
INSIDE = ["new", "empty", "full", "some/new/runs", "to_empty"]
NO_FOLDERS = {
    "full": "is not empty",
    "full/file": "is a file",
    "full/file/below": "Not a directory",
    ".": "is not empty",
    "loop": "cannot be written",
    "~nobody-of-that-name/x": "home directory",
    "x" * 300: "File name too long",
    LONG: "File name too long",
    "a\0b": "null",
    "/proc/none": "No such file",
}
NO_FILES = {
    "full": "is a folder; name a file such as full/result.json",
    "no/where.json": "No such file or directory",
    "lost": "No such file or directory",
    "full/file/below": "Not a directory",
    "loop": "cannot be written",
    "x" * 300: "File name too long",
    "a\0b": "null",
    "/proc/none": "cannot be written",
}
NO_RUNS = {
    "full/file": "is a file",
    "dangling": "is a file",
    "full/file/below": "Not a directory",
    "x" * 300: "File name too long",
    "a\0b": "null",
    "/proc/runs": "cannot be written",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_takes_a_model_is_found_good_and_left_as_it_was(
    name: str, here: Path
) -> None:
    before = contents(here)
    path = try_folder(name)
    assert contents(here) == before
    path.parent.mkdir(parents=True, exist_ok=True)
    made = here / "made"
    made.mkdir()
    os.replace(made, path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_can_be_written_is_left_as_it_was_until_then(name: str, here: Path) -> None:
    before = contents(here)
    try_file(Path(name), "--json")
    assert contents(here) == before
    write_text("new", Path(name))
    assert Path(name).read_text() == "new"
    assert Path(name).is_symlink() == (here / name in {here / "dangling", here / "link"})


@pytest.mark.parametrize("name", INSIDE)
def test_a_runs_folder_is_left_as_it_was(name: str, here: Path) -> None:
    before = contents(here)
    try_inside(Path(name), "--runs-dir")
    assert contents(here) == before


def refused(deed: Callable[[], object], here: Path) -> str:
    before = contents(here)
    with pytest.raises(OutputError) as caught:
        deed()
    assert contents(here) == before
    told = str(caught.value)
    assert "\n" not in told and "None" not in told
    return told


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_folder_that_takes_no_model_is_refused_by_its_cause(name: str, here: Path) -> None:
    told = refused(lambda: try_folder(name), here)
    assert NO_FOLDERS[name] in told


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_cannot_be_written_is_refused_by_its_cause(name: str, here: Path) -> None:
    assert NO_FILES[name] in refused(lambda: try_file(Path(name), "--json"), here)


@pytest.mark.parametrize("name", NO_RUNS)
def test_a_runs_folder_that_cannot_be_written_is_refused(name: str, here: Path) -> None:
    assert NO_RUNS[name] in refused(lambda: try_inside(Path(name), "--runs-dir"), here)


def test_the_folder_one_is_in_is_not_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "empty")
    told = refused(lambda: try_folder("."), here)
    assert "the folder you are in" in told


@pytest.mark.parametrize(
    "trial",
    [
        lambda: try_folder("some/new"),
        lambda: try_folder("empty"),
        lambda: try_file(Path("new.json"), "--json"),
        lambda: try_inside(Path("some/runs"), "--runs-dir"),
    ],
)
def test_a_full_disk_is_noticed_before_the_work(trial: Callable[[], object], here: Path) -> None:
    with no_file_longer_than(5000):
        assert "File too large" in refused(trial, here)


def test_a_folder_that_cannot_be_renamed_is_refused_and_keeps_its_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, target: Path) -> Path:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(Path, "rename", busy)
    assert "busy" in refused(lambda: try_folder("empty"), here)


def test_a_folder_that_another_process_takes_away_meanwhile_is_made_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = places._try_file, []

    def taken_away_once(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)
        whole(folder)

    monkeypatch.setattr(places, "_try_file", taken_away_once)
    try_inside(Path("some/runs"), "--runs-dir")
    assert len(calls) == 2 and not Path("some").exists()


def test_room_is_compared_with_what_will_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(100, 60, 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(tmp_path / "not/there", 40, "saving")
    with pytest.raises(OutputError, match=r"saving takes about 0.0 MiB but the disk of"):
        check_room(tmp_path / "not/there", 41, "saving")


def test_two_options_do_not_name_one_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_apart({"--json": tmp_path / "a", "--output": tmp_path / "b", "--kernel": None})
    check_apart({"--json": Path(os.devnull), "--output": Path(os.devnull)})
    with pytest.raises(OutputError, match="--json and --output both name .*link"):
        check_apart({"--json": tmp_path / "a", "--output": tmp_path / "link"})


def test_a_device_and_a_pipe_are_written_to_and_stay_what_they_are(tmp_path: Path) -> None:
    write_text("text", Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    try_file(pipe, "--json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text("text", pipe)
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)


def test_a_file_that_may_only_be_filled_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mounted(path: Path, target: Path) -> Path:
        raise OSError(16, "Device or resource busy", str(path))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(Path, "replace", mounted)
    write_text("new", tmp_path / "file")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "new")]
