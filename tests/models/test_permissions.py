"""What is written may be read by those whom the user's umask lets read new files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prunezero.files.atomic import follow_umask
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.shards import write_shard
from prunezero.models.observing.calibration import calibrate
from prunezero.models.saving.save import save_model
from tests.tiny_models import tiny_batches, tiny_model


def write_model(folder: Path) -> None:
    save_model(tiny_model(), folder / "saved", files={"README.md": "ours"})


def write_one_shard(folder: Path) -> None:
    write_shard(folder / "shard.safetensors", {"a": torch.ones(2)})


def write_statistics(folder: Path) -> None:
    model = tiny_model()
    calibrate(model, tiny_batches(), find_linears(model.model), ["input_sum"], cache=folder)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", [write_model, write_one_shard, write_statistics])
def test_every_file_and_folder_follows_the_umask(
    write: Callable[[Path], None], umask: int, tmp_path: Path
) -> None:
    write(tmp_path)
    written = list(tmp_path.rglob("*"))
    assert any(path.suffix == ".safetensors" for path in written)
    for path in written:
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == allowed, path


def test_a_folder_follows_the_umask_with_all_that_is_in_it(tmp_path: Path) -> None:
    inner = tmp_path / "private" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    (inner / "file").touch(mode=0o600)
    before = os.umask(0o022)
    try:
        follow_umask(tmp_path / "private")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (inner.parent, inner, inner / "file")]
    assert modes == [0o755, 0o755, 0o644]
