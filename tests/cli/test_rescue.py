"""A pruned model that the disk does not take at the end is kept elsewhere, or tried once more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prunezero.cli import rescue
from prunezero.cli.rescue import saved_or_kept
from prunezero.errors import OutputError
from prunezero.models.saving import save as saving
from tests.cli.conftest import Run, flat

FULL = OSError(28, "No space left on device")


def saving_where(has_room: Callable[[Path], bool]) -> Callable[[Path], str]:
    """Writes a folder as `save_model` does, where there is room."""

    def save(folder: Path) -> str:
        if not has_room(folder):
            raise OutputError(f"folder '{folder}' cannot be written; choose another") from FULL
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return "saved"

    return save


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files on what counts as another disk; the only other one."""
    there = tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(there))
    monkeypatch.setattr(rescue, "_disk_of", lambda folder: int(folder == there))
    monkeypatch.setattr(rescue, "SECONDS_OF_PATIENCE", 0)
    return there


def test_a_disk_with_room_is_written_to_and_nothing_else(tmp_path: Path, elsewhere: Path) -> None:
    assert saved_or_kept(saving_where(lambda folder: True), tmp_path / "out", 1) == "saved"
    assert not list(elsewhere.iterdir())


def test_a_full_disk_keeps_the_model_on_another_and_says_how_to_move_it(
    tmp_path: Path, elsewhere: Path
) -> None:
    output = tmp_path / "out put"
    with pytest.raises(OutputError) as caught:
        saved_or_kept(saving_where(lambda folder: folder != output), output, 1)
    (kept,) = elsewhere.glob("prunezero-*/out put/config.json")
    told = str(caught.value)
    assert "(No space left on device); the pruned model is kept in" in told
    assert told.endswith(f"mv '{kept.parent}' '{output}'")


def test_an_empty_folder_that_was_named_is_not_in_the_way_of_the_move(
    tmp_path: Path, elsewhere: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(OutputError) as caught:
        saved_or_kept(saving_where(lambda folder: folder != output), output, 1)
    (kept,) = elsewhere.glob("prunezero-*/out/config.json")
    assert str(caught.value).endswith(f"rmdir {output} && mv {kept.parent} {output}")


def test_where_no_disk_has_room_it_is_tried_once_more(tmp_path: Path, elsewhere: Path) -> None:
    output, tries = tmp_path / "out", []

    def room_is_made(folder: Path) -> bool:
        tries.append(folder)
        return folder == output and tries.count(output) == 2

    assert saved_or_kept(saving_where(room_is_made), output, 1) == "saved"
    with pytest.raises(OutputError, match="so it is lost: free some space"):
        saved_or_kept(saving_where(lambda folder: False), tmp_path / "other", 1)
    assert not list(elsewhere.iterdir())


def test_a_disk_without_room_is_not_tried(tmp_path: Path, elsewhere: Path) -> None:
    tries: list[Path] = []

    def never(folder: Path) -> bool:
        tries.append(folder)
        return False

    with pytest.raises(OutputError):
        saved_or_kept(saving_where(never), tmp_path / "out", 2**60)
    assert tries == [tmp_path / "out"] * 2


def test_another_fault_than_the_disk_is_raised_as_it_is(tmp_path: Path, elsewhere: Path) -> None:
    def wrong(folder: Path) -> None:
        raise OutputError("holds 1 zeros but the model has 2")

    with pytest.raises(OutputError, match="^holds 1 zeros"):
        saved_or_kept(wrong, tmp_path / "out", 1)


def test_prune_prints_its_table_keeps_the_model_and_writes_the_json(
    run: Run, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saving._save_as_source

    def full_at_the_end(model: object, source: object, folder: Path, *more: object) -> None:
        whole(model, source, folder, *more)  # type: ignore[arg-type]
        if elsewhere not in folder.parents:
            raise FULL

    monkeypatch.setattr(saving, "_save_as_source", full_at_the_end)
    result = run("prune MODEL --recipe magnitude --sparsity 0.5 --output out --json x.json")
    assert isinstance(result.exception, OutputError)
    assert "the pruned model is kept in" in str(result.exception)
    assert "50.00 %" in result.output and "magnitude on" in flat(result.output)
    assert json.loads(Path("x.json").read_text())["sparsity_reached"] == 0.5
    (kept,) = elsewhere.glob("prunezero-*/out")
    assert (kept / "model.safetensors").is_file() and (kept / "recipe.yaml").is_file()
    assert not Path("out").exists()


def test_a_disk_without_room_is_refused_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    for more in ("", " --memory-limit 1GiB"):
        result = run(f"prune MODEL --recipe magnitude --sparsity 0.5 --output new/out{more}")
        assert isinstance(result.exception, OutputError), result.output
        assert "the pruned model takes about" in str(result.exception)
        assert "validation" not in result.output and not list(tmp_path.glob("new"))


def test_results_are_printed_before_a_file_that_the_disk_does_not_take(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("list strategies --json /dev/full")
    assert "evolution" in result.output
    assert str(result.exception) == "/dev/full cannot be written: No space left on device"
