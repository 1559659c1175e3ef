"""Generated code runs only from a private folder, and only if it is what we wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunezero.errors import OutputError
from prunezero.scoring.kernels import files
from prunezero.scoring.kernels.files import import_kernels, kernel_folder

SOURCE = "VALUE = 6 * 7\n"


def fresh(folder: Path, source: str = SOURCE) -> int:
    """The value in the module, as a new process would get it."""
    files._import_once.cache_clear()
    value: int = import_kernels(source, folder).VALUE
    return value


def test_a_kernel_file_is_private_and_named_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "private" / "kernels"
    assert fresh(folder) == 42
    (path,) = folder.iterdir()
    assert len(path.stem) == 64 and path.read_text() == SOURCE
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def test_another_triton_version_gets_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(tmp_path / "kernels")
    monkeypatch.setattr(files, "_triton_version", lambda: "0.0")
    fresh(tmp_path / "kernels")
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "extended"])
def test_a_changed_file_is_rebuilt_and_not_run(tmp_path: Path, damage: str) -> None:
    folder, canary = tmp_path / "kernels", tmp_path / "canary"
    fresh(folder)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    damaged = {
        "flipped": bytes([data[0] ^ 1]) + data[1:],
        "truncated": data[:-4],
        "emptied": b"",
        "extended": data + f"open({str(canary)!r}, 'w')\n".encode(),
    }
    path.write_bytes(damaged[damage])
    assert fresh(folder) == 42
    assert path.read_bytes() == data and not canary.exists()


def test_compiled_python_beside_the_file_is_never_used(tmp_path: Path) -> None:
    fresh(tmp_path / "kernels")
    fresh(tmp_path / "kernels")
    assert not (tmp_path / "kernels" / "__pycache__").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(OutputError, match="can be written by others"):
        fresh(folder)
    assert not list(folder.iterdir())


def test_a_parent_that_others_can_write_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "prunezero"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(OutputError, match=f"{parent} can be written by others"):
        fresh(parent / "kernels")


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is not a folder of yours"):
        fresh(tmp_path / "kernels")


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(OutputError, match="is not a folder of yours"):
        fresh(tmp_path / "kernels")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        fresh(tmp_path / "kernels")


def test_the_folder_follows_the_cache_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_folder() == tmp_path / "prunezero" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/places/are/ignored")
    assert kernel_folder() == Path.home() / ".cache" / "prunezero" / "kernels"


def test_without_a_home_no_folder_at_hand_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(OutputError, match="your home folder is '~'; set XDG_CACHE_HOME"):
        kernel_folder()


def test_eight_processes_make_one_whole_file(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from prunezero.scoring.kernels.files import import_kernels\n"
        f"assert import_kernels({SOURCE!r}, Path(sys.argv[1])).VALUE == 42\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "kernels")]
    processes = [subprocess.Popen(command) for _ in range(8)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 8
    (path,) = (tmp_path / "kernels").iterdir()
    assert path.read_text() == SOURCE


def test_a_thousand_formulas_leave_a_bounded_folder_with_the_last_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MOST_FILES", 20)
    folder = tmp_path / "kernels"
    fresh(folder)
    (often,) = folder.iterdir()
    before = often.stat().st_ino
    for number in range(1000):
        fresh(folder, f"VALUE = {number}\n")
        assert fresh(folder) == 42
    assert len(list(folder.iterdir())) == 20
    assert often.stat().st_ino == before  # never removed, so never written anew
    assert files._import_once.cache_info().maxsize == 512
