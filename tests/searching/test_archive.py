"""What one search measured, the next one finds."""

from __future__ import annotations

import shutil
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

import prunezero
from prunezero.errors import OutputError, SearchError
from prunezero.files.checked_lines import line_of, record_of
from prunezero.formula import OPERATORS, Criterion
from prunezero.models.text.splits import SPLITS
from prunezero.pruning.testbed import Testbed
from prunezero.searching.evaluation.archive import Archive
from prunezero.searching.experiment import provenance as conditions_file
from prunezero.searching.experiment.provenance import LIBRARIES, conditions, machine
from prunezero.searching.session import open_session
from prunezero.searching.spaces.space import SearchSpace
from tests.searching.testbed import make_task, tiny_space, tiny_testbed

CONDITIONS: dict[str, Any] = {"model": "a", "sparsity": 0.5}


def unweighted() -> SearchSpace:
    """A space whose layer errors are not weighted by gradients."""
    return SearchSpace.load("tiny")


def test_an_answer_is_found_by_a_search_that_differs_in_seed_space_and_strategy_alone(
    tmp_path: Path,
) -> None:
    testbed, path = tiny_testbed(), tmp_path / "archive.jsonl"
    first = make_task(tiny_space(), 0.5)
    space = unweighted().model_copy(update={"weighted_by_gradient": True})
    other = make_task(space, 0.5, seed=1, strategy="random")
    Archive(path, conditions(first.config, [testbed])).write(
        "layer error", "W", {"layer_error": 0.1}
    )
    archive = Archive(path, conditions(other.config, [testbed]))
    assert archive.known("layer error", "W") == {"layer_error": 0.1}
    assert archive.known("measurement", "W") is None


def test_an_error_with_other_weights_of_rows_is_another_answer(tmp_path: Path) -> None:
    testbed, path = tiny_testbed(), tmp_path / "archive.jsonl"
    first, other = (make_task(space, 0.5) for space in (tiny_space(), unweighted()))
    Archive(path, conditions(first.config, [testbed])).write(
        "layer error", "W", {"layer_error": 0.1}
    )
    assert Archive(path, conditions(other.config, [testbed])).known("layer error", "W") is None
    # The feature D brings the weights with it, whatever the space says.
    with_d = unweighted().model_copy(update={"terminals": (Criterion.parse("abs(W)*D"),)})
    assert conditions(make_task(with_d, 0.5).config, [testbed])["weighted_rows"]


def test_what_one_search_measured_another_one_is_given(tmp_path: Path) -> None:
    archive = tmp_path / "archive.jsonl"
    rows = []
    for seed in (0, 1):
        task = make_task(tiny_space(), 0.5, seed=seed)
        session = open_session([tiny_testbed()], task, tmp_path / str(seed), archive=archive)
        rows.append(session.rungs.measure_dense(("search",)))
        session.rungs.close()
    assert rows[0] == rows[1]
    within = conditions(task.config, [tiny_testbed()]) | machine(
        tiny_testbed(), torch.get_num_threads()
    )
    assert len(Archive(archive, within)) == 1
    # Sums on another number of threads have other last bits.
    assert len(Archive(archive, within | machine(tiny_testbed(), 64))) == 0


def normalized_testbed() -> Testbed:
    """The tiny testbed; its tokenizer has the same vocabulary, and reads another letter for one."""
    testbed = tiny_testbed()
    testbed.language_model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    return testbed


def test_another_normalizer_of_the_same_vocabulary_is_another_condition(tmp_path: Path) -> None:
    testbed, other, task = tiny_testbed(), normalized_testbed(), make_task(tiny_space(), 0.5)
    assert other.language_model.fingerprint == testbed.language_model.fingerprint
    before, after = conditions(task.config, [testbed]), conditions(task.config, [other])
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {f"{split} token ids" for split in SPLITS}
    open_session([testbed], task, tmp_path / "run").rungs.close()
    with pytest.raises(SearchError, match="other settings .*calibration token ids: .*, now "):
        open_session([other], task, tmp_path / "run", resume=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_another_version_of_a_library_that_decides_answers_is_another_condition(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    testbed, task = tiny_testbed(), make_task(tiny_space(), 0.5)
    before = conditions(task.config, [testbed])
    monkeypatch.setattr(
        conditions_file, "version", lambda name: "9" if name == library else version(name)
    )
    assert conditions(task.config, [testbed]) == before | {library: "9"}


def test_the_code_of_every_floor_that_answers_come_from_is_digested(tmp_path: Path) -> None:
    found = []
    for floor in ("formula", "scoring", "models", "pruning", "searching"):
        copy = Path(shutil.copytree(Path(prunezero.__file__).parent, tmp_path / floor))
        found.append(conditions_file.digest_of_code(copy))
        with next((copy / floor).rglob("[a-z]*.py")).open("a") as file:
            file.write("# changed")
        found.append(conditions_file.digest_of_code(copy))
    assert len(set(found)) == 6 and found[0] == found[2]


@pytest.mark.parametrize("content", [b"my notes\n", b"{}\n"])
def test_a_file_that_is_no_archive_is_refused_and_left_alone(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "archive.jsonl").write_bytes(content)
    with pytest.raises(OutputError, match="is no archive of searches.*move it away"):
        Archive(tmp_path / "archive.jsonl", CONDITIONS)
    assert (tmp_path / "archive.jsonl").read_bytes() == content


def test_a_flipped_bit_of_an_archive_costs_that_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, CONDITIONS)
    for key in "WXG":
        archive.write("layer error", key, {"layer_error": 0.1})
    whole = path.read_bytes()
    for place in range(len(whole) // 3 + 2, 2 * len(whole) // 3 - 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = Archive(path, CONDITIONS)
        assert found.known("layer error", "W") and found.known("layer error", "G")
        assert not found.known("layer error", "X")


@pytest.mark.parametrize("record", [{}, {"context": 1}, {"kind": [1]}, {"answer": [1]}])
def test_a_sound_line_that_is_no_answer_is_stepped_over(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "archive.jsonl"
    Archive(path, CONDITIONS).write("layer error", "W", {"layer_error": 0.1})
    known = record_of(path.read_bytes().strip()) or {}
    with path.open("ab") as file:
        file.write(line_of(known | record if record else {}))
    assert Archive(path, CONDITIONS).known("layer error", "W")


@pytest.mark.parametrize(("key", "value"), [("model", "b"), ("sparsity", 0.7), ("torch", "9")])
def test_an_answer_under_other_conditions_is_not_found(
    key: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "archive.jsonl"
    Archive(path, CONDITIONS).write("layer error", "W", {"layer_error": 0.1})
    assert len(Archive(path, {**CONDITIONS, key: value})) == 0
    assert len(Archive(path, CONDITIONS)) == 1


def test_a_torn_line_costs_that_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, CONDITIONS)
    archive.write("layer error", "W", {"layer_error": 0.1})
    archive.write("layer error", "X", {"layer_error": 0.2})
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        again = Archive(path, CONDITIONS)
        again.write("layer error", "Y", {"layer_error": 0.3})
        found = Archive(path, CONDITIONS)
        assert found.known("layer error", "W") == {"layer_error": 0.1}
        assert found.known("layer error", "Y") == {"layer_error": 0.3}


def test_searches_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"

    def write(name: str) -> None:
        archive = Archive(path, CONDITIONS)
        for place in range(40):
            archive.write("layer error", f"{name}{place}", {"layer_error": 0.5})

    threads = [threading.Thread(target=write, args=(name,)) for name in "WXYZ"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Archive(path, CONDITIONS)) == 160


def test_an_archive_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written or read"):
        Archive(tmp_path, CONDITIONS)


def test_an_operator_of_another_package_is_a_condition_only_where_the_space_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OPERATORS, "plugged", lambda: {"sigmoid": "torch.sigmoid({0})"})
    task = make_task(tiny_space(), 0.5)
    before = conditions(task.config, [tiny_testbed()])
    assert not [key for key in before if key.startswith("operator")]
    words = (*task.space.operators, "sigmoid")
    with_it = task.space.model_copy(update={"operators": words})
    after = conditions(make_task(with_it, 0.5).config, [tiny_testbed()])
    assert after == before | {"operator sigmoid": "torch.sigmoid({0})"}
