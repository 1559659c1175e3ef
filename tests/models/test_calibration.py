from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunezero.errors import StatisticsError, TextError
from prunezero.models.anatomy.linears import Linear, find_linears
from prunezero.models.observing import calibration
from prunezero.models.observing.calibration import calibrate
from prunezero.scoring.statistics import SUMS, Statistics
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

SOME = ["input_square_sum", "gradient_square_sum"]


def sum_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("statistics/*/*"))


def assert_equal(left: dict[str, Statistics], right: dict[str, Statistics]) -> None:
    assert left.keys() == right.keys()
    for name, statistics in left.items():
        other = right[name]
        assert (statistics.tokens, statistics.sequences) == (other.tokens, other.sequences)
        assert statistics.sums.keys() == other.sums.keys()
        for sum_name, value in statistics.sums.items():
            assert torch.equal(value, other.sums[sum_name])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_has_the_shape_and_dtype_of_its_row(family: str) -> None:
    model = tiny_model(family)
    layers = find_linears(model.model)
    collected = calibrate(model, tiny_batches(), layers, SUMS)
    for layer in layers:
        size = dict(zip(("out", "in"), layer.weight.shape, strict=True))
        size["sequence"] = len(tiny_batches())
        for name, row in SUMS.items():
            value = collected[layer.name].sums[name]
            assert list(value.shape) == [size[axis] for axis in row.shape]
            assert value.dtype == row.dtype


def test_no_sums_need_no_work() -> None:
    model = tiny_model()
    collected = calibrate(model, tiny_batches(), find_linears(model.model), [])
    assert all(not statistics.sums for statistics in collected.values())


def test_progress_is_told_for_blocks_and_sequences() -> None:
    told: list[tuple[str, int, int]] = []
    model = tiny_model()

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    calibrate(model, tiny_batches(2), find_linears(model.model), SOME, progress=progress)
    blocks, sequences = "activations of block", "gradients of sequence"
    assert told == [(blocks, 1, 2), (blocks, 2, 2), (sequences, 1, 2), (sequences, 2, 2)]


def test_text_that_the_model_cannot_take_is_refused_before_any_work() -> None:
    model = tiny_model()
    with pytest.raises(TextError, match="0 windows"):
        calibrate(model, torch.zeros((0, 4), dtype=torch.int64), find_linears(model.model), SOME)


def test_an_unknown_sum_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(StatisticsError, match="did you mean 'gram'"):
        calibrate(model, tiny_batches(), find_linears(model.model), ["gramm"])


def test_a_second_run_reads_the_first_ones_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    first = calibrate(model, ids, layers, SOME, cache=tmp_path)
    monkeypatch.setattr(calibration, "BlockWalk", None)
    monkeypatch.setattr(calibration, "gradient_statistics", None)
    assert_equal(calibrate(model, ids, layers, SOME, cache=tmp_path), first)
    assert [file.name for file in sum_files(tmp_path)] == [
        f"{name}.{block}.safetensors" for name in sorted(SOME) for block in (0, 1)
    ]


def test_only_the_missing_sums_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    calibrate(model, ids, layers, SOME, cache=tmp_path)
    monkeypatch.setattr(calibration, "gradient_statistics", None)
    both = calibrate(model, ids, layers, [*SOME, "gram"], cache=tmp_path)
    assert set(both[layers[0].name].sums) == {*SOME, "gram"}
    assert len(sum_files(tmp_path)) == 2 * 3


@pytest.mark.parametrize("change", ["model", "ids", "text", "layers"])
def test_another_model_text_or_choice_of_layers_has_its_own_files(
    tmp_path: Path, change: str
) -> None:
    model, ids = tiny_model(), tiny_batches()
    calibrate(model, ids, find_linears(model.model), ["gram"], cache=tmp_path)
    model = tiny_model(seed=int(change == "model"))
    layers: list[Linear] = find_linears(
        model.model, targets=["q_proj"] if change == "layers" else []
    )
    text = "other" if change == "text" else ""
    other: Tensor = tiny_batches(seed=int(change == "ids"))
    calibrate(model, other, layers, ["gram"], cache=tmp_path, text_fingerprint=text)
    assert len({file.parent for file in sum_files(tmp_path)}) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path: Path, damage: bytes | None) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    first = calibrate(model, ids, layers, ["gram"], cache=tmp_path)
    file, _ = sum_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    with pytest.warns(UserWarning, match="gram.0.safetensors is damaged and is made anew"):
        assert_equal(calibrate(model, ids, layers, ["gram"], cache=tmp_path), first)
    assert_equal(calibrate(model, ids, layers, ["gram"], cache=tmp_path), first)


def test_no_flipped_bit_of_a_file_of_sums_changes_what_is_read(tmp_path: Path) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    first = calibrate(model, ids, layers, ["input_sum"], cache=tmp_path)
    file, _ = sum_files(tmp_path)
    written = file.read_bytes()
    # A few of each part: the length of the header, the header, and numbers.
    for place in (0, 9, 60, len(written) // 2, len(written) - 1, *range(100, len(written), 501)):
        damaged = bytearray(written)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="input_sum.0.safetensors is damaged and is made anew"):
            assert_equal(calibrate(model, ids, layers, ["input_sum"], cache=tmp_path), first)
        assert file.read_bytes() == written


@pytest.mark.parametrize("fault", ["shape", "dtype", "missing", "nan", "unsigned", "other text"])
def test_a_file_that_was_not_written_for_its_place_is_made_anew(tmp_path: Path, fault: str) -> None:
    model, ids = tiny_model(), tiny_batches()
    layers = find_linears(model.model)
    first = calibrate(model, ids, layers, ["gram"], cache=tmp_path)
    file, _ = sum_files(tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors, name = load_file(file), layers[2].name
    changed = {
        "shape": {name: tensors[name][1:].clone()},
        "dtype": {name: tensors[name].double()},
        "missing": {},
        "nan": {name: torch.full_like(tensors[name], float("nan"))},
    }.get(fault, {name: tensors[name]})
    del tensors[name]
    save_file({**tensors, **changed}, file, metadata={} if fault == "unsigned" else metadata)
    if fault == "other text":
        calibrate(model, tiny_batches(seed=1), layers, ["gram"], cache=tmp_path)
        (other,) = (
            one
            for one in sum_files(tmp_path)
            if one.parent != file.parent and one.name == file.name
        )
        shutil.copy(other, file)
    with pytest.warns(UserWarning, match="gram.0.safetensors is damaged and is made anew"):
        assert_equal(calibrate(model, ids, layers, ["gram"], cache=tmp_path), first)


def test_the_files_used_longest_ago_go_when_the_cache_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    for seed in range(3):
        calibrate(model, tiny_batches(seed=seed), layers, ["gram"], cache=tmp_path)
        for age, folder in enumerate(sorted(tmp_path.glob("statistics/*"), key=os.path.getmtime)):
            moment = time.time() - 1000 + 10 * age
            os.utime(folder, (moment, moment))
    folder = sum_files(tmp_path)[0].parent
    size = sum(file.stat().st_size for file in folder.iterdir())
    calibrate(model, tiny_batches(seed=0), layers, ["gram"], cache=tmp_path)
    monkeypatch.setenv("PRUNEZERO_CACHE_GIB", str(2.5 * size / 2**30))
    calibrate(model, tiny_batches(seed=3), layers, ["gram"], cache=tmp_path)
    assert len({file.parent for file in sum_files(tmp_path)}) == 2
    monkeypatch.setattr(calibration, "BlockWalk", None)
    calibrate(model, tiny_batches(seed=0), layers, ["gram"], cache=tmp_path)


def test_a_cache_limit_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setenv("PRUNEZERO_CACHE_GIB", "plenty")
    with pytest.raises(StatisticsError, match="must be a number of GiB but is 'plenty'"):
        calibrate(model, tiny_batches(), find_linears(model.model), ["gram"], cache=tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_model()
    layers = find_linears(model.model)
    (tmp_path / "statistics").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="not kept"):
        found = calibrate(model, tiny_batches(), layers, ["input_sum"], cache=tmp_path)
    assert found[layers[0].name].sequences == 4


def test_what_others_keep_beside_the_sums_is_never_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, hashed, elsewhere = (
        tmp_path / "statistics" / name for name in ("survey", "0" * 32, "1" * 32)
    )
    for folder in (own, hashed, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "answers.csv").write_text("1")
    elsewhere.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("PRUNEZERO_CACHE_GIB", "1e-9")
    model = tiny_model()
    for seed in range(2):
        calibrate(
            model, tiny_batches(seed=seed), find_linears(model.model), ["gram"], cache=tmp_path
        )
    assert all((folder / "answers.csv").is_file() for folder in (own, hashed, elsewhere))
    # Three of others, and those of the last text: one for each block.
    assert len(sum_files(tmp_path)) == 3 + 2
