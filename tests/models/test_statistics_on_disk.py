"""Sums that stay on disk are those in memory, to the last bit, and one block of them is held."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import PruneZeroWarning, StatisticsError
from prunezero.models.anatomy.linears import by_block, find_linears
from prunezero.models.observing import calibration
from prunezero.models.observing.calibration import calibrate, calibrate_on_disk, groups_within
from prunezero.scoring.statistics import SUMS, Statistics, sums_bytes
from tests.tiny_models import LAYOUTS, tiny_batches, tiny_model
from tests.tiny_moe import stacked_model


def assert_same(left: Statistics, right: Statistics) -> None:
    assert (left.tokens, left.sequences) == (right.tokens, right.sequences)
    assert left.sums.keys() == right.sums.keys()
    for name, value in left.sums.items():
        assert torch.equal(value, right.sums[name]), name


@pytest.mark.filterwarnings("ignore:.*matrices of experts saw fewer than")
@pytest.mark.parametrize("gradient_bytes", [0, 10**9])
@pytest.mark.parametrize("family", [*LAYOUTS, "mixtral"])
def test_sums_on_disk_are_those_in_memory_to_the_last_bit(
    family: str, gradient_bytes: int, tmp_path: Path
) -> None:
    model = stacked_model(family) if family == "mixtral" else tiny_model(family)
    ids = tiny_batches(3)
    layers = find_linears(model.model)
    wanted = calibrate(model, ids, layers, SUMS)
    found = calibrate_on_disk(
        model, ids, layers, SUMS, cache=tmp_path, gradient_bytes=gradient_bytes
    )
    assert list(found) == list(wanted) and len(found) == len(layers)
    for name, statistics in wanted.items():
        assert_same(found[name], statistics)


def test_a_run_in_memory_and_one_on_disk_read_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    wanted = calibrate(model, ids, layers, SUMS, cache=tmp_path)
    for collect in ("BlockWalk", "gradient_statistics"):
        monkeypatch.setattr(calibration, collect, None)
    found = calibrate_on_disk(model, ids, layers, SUMS, cache=tmp_path, gradient_bytes=0)
    assert_same(found[layers[-1].name], wanted[layers[-1].name])
    with pytest.raises(KeyError):
        found["another"]
    assert found.get("another") is None


def test_the_text_goes_through_the_model_once_for_each_part_of_its_blocks(tmp_path: Path) -> None:
    model, ids = tiny_model(num_hidden_layers=3), tiny_batches(2)
    layers = find_linears(model.model)
    names = frozenset({"gradient_square_sum"})
    block = sum(sums_bytes(names, layer.weight.shape, 2) for layer in layers if not layer.block)
    assert block == 4 * sum(layer.weight.numel() for layer in layers if not layer.block)
    told: list[tuple[str, int, int]] = []

    def progress(*now: Any) -> None:
        told.append(now)

    for room, parts in ((0, [[0], [1], [2]]), (2 * block, [[0, 1], [2]]), (3 * block, [[0, 1, 2]])):
        groups = groups_within(layers, names, 2, room)
        assert [list(by_block(group)) for group in groups] == parts
        assert sum(groups, []) == layers
        told.clear()
        calibrate_on_disk(
            model,
            ids,
            layers,
            names,
            cache=tmp_path / str(room),
            gradient_bytes=room,
            progress=progress,
        )
        total = 2 * len(parts)
        assert told == [("gradients of sequence", at, total) for at in range(1, total + 1)]


def test_sums_of_one_block_are_in_memory(tmp_path: Path) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    found = calibrate_on_disk(model, ids, layers, ["gram"], cache=tmp_path, gradient_bytes=0)
    first = weakref.ref(found[layers[0].name])
    assert first() is found[layers[0].name]
    assert found[layers[-1].name].tokens == ids.numel()
    gc.collect()
    assert first() is None


def test_a_file_that_is_damaged_while_in_use_is_told_and_then_made_anew(tmp_path: Path) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    wanted = calibrate(model, ids, layers, ["gram"])
    found = calibrate_on_disk(model, ids, layers, ["gram"], cache=tmp_path, gradient_bytes=0)
    (file,) = tmp_path.glob("statistics/*/gram.0.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StatisticsError, match="was damaged or deleted while it was in use"):
        found[layers[0].name]
    with pytest.warns(PruneZeroWarning, match=r"gram\.0\.safetensors is damaged"):
        again = calibrate_on_disk(model, ids, layers, ["gram"], cache=tmp_path, gradient_bytes=0)
    assert_same(again[layers[0].name], wanted[layers[0].name])


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "statistics").write_text("a file where a folder should be")
    with pytest.raises(StatisticsError, match="which a memory limit needs; free some space"):
        calibrate_on_disk(
            model,
            tiny_batches(),
            find_linears(model.model),
            ["input_sum"],
            cache=tmp_path,
            gradient_bytes=0,
        )
