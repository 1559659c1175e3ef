"""The journal outlives full disks and failed starts, and refuses every changed setting."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunezero.errors import PruneZeroError, SearchError, TextError
from prunezero.files.checked_lines import line_of
from prunezero.report.runs.summary import read_run
from prunezero.searching.evaluation.journal import Journal, read_journal
from prunezero.searching.experiment.provenance import comparable, header
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.session import open_session
from tests.searching.testbed import SETTINGS, make_task, tiny_space, tiny_testbed


def test_a_full_disk_is_one_sentence_and_the_journal_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from prunezero.errors import OutputError
        from prunezero.searching.evaluation.journal import Journal, read_journal
        path = Path(sys.argv[1])
        journal = Journal(path, {"model": "a"}, resume=False)
        journal.write("layer error", "W", {"layer_error": 0.1})
        limit = path.stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            journal.write("layer error", "X", {"layer_error": 0.2})
        except OutputError as error:
            print(error)
        journal.close()
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written: File too large" in ended.stdout
    journal = Journal(path, {"model": "a"}, resume=True)
    assert journal.known("layer error", "W") == {"layer_error": 0.1}
    assert journal.known("layer error", "X") is None
    journal.write("layer error", "X", {"layer_error": 0.3})
    journal.close()
    Journal(path, {"model": "a"}, resume=True).close()


HEADER = header(make_task(tiny_space(), 0.5), [tiny_testbed()])


# Another value of each field of an experiment that results depend on.
CHANGED: dict[str, Any] = {
    "sparsity": 0.6,
    "pattern": "1:2",
    "also": ["0.7"],
    "draws": 2,
    "targets": ["q_proj"],
    "ignore": ["q_proj"],
    "seed": 1,
    "calibration_seed": 1,
    "strategy": "random",
    "sequence_length": 8,
    "calibration_tokens": 32,
    "evaluation_tokens": 32,
    "test_tokens": 32,
    "space_content": tiny_space(generation=7).model_dump(mode="json"),
}
# Fields that fingerprints beside the experiment, or its search space, tell of.
TOLD = {"model", "also_model", "text", "dtype", "device", "space", "signals"}
TOLD |= {"start_from", "start", "from_scratch"}


def test_the_header_holds_whatever_results_depend_on() -> None:
    held = set(comparable(HEADER))
    assert {"model", "text", "settings", "space", "sparsity", "pattern", "seed"} <= held
    assert {"prunezero", "torch", "sympy", "optuna", "dtype", "device"} <= held
    assert {"seeds", "strategy", "format", "weighted_rows"} <= held
    assert set(HEADER) == {"config", "fingerprints"}
    assert set(HEADER["config"]) == {*CHANGED, *TOLD}


def written(folder: Path) -> Path:
    """A journal that holds nothing but its header, and can be gone on with."""
    path = folder / "run" / "journal.jsonl"
    Journal(path, HEADER, resume=False).close()
    Journal(path, HEADER, resume=True).close()
    return path


@pytest.mark.parametrize("key", sorted(HEADER["fingerprints"]))
def test_resuming_is_refused_whichever_fingerprint_changed(key: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    changed = {**HEADER, "fingerprints": {**HEADER["fingerprints"], key: "another"}}
    with pytest.raises(SearchError, match=f"{key}: .*, now another.*another --name"):
        Journal(path, changed, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_resuming_is_refused_whichever_setting_changed(key: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    changed = {**HEADER, "config": {**HEADER["config"], key: CHANGED[key]}}
    with pytest.raises(SearchError, match="under other settings .*, now .*another --name"):
        Journal(path, changed, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["model", "text", "space"])
def test_what_is_only_called_otherwise_is_no_other_setting(key: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    Journal(path, {**HEADER, "config": {**HEADER["config"], key: "elsewhere"}}, resume=True).close()
    assert path.read_bytes() == before


def test_a_search_that_could_not_begin_does_not_stand_in_its_own_way(tmp_path: Path) -> None:
    testbed, task = tiny_testbed(), make_task(tiny_space(), 0.5)
    greedy = replace(testbed, settings=replace(SETTINGS, test_tokens=10**6))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TextError, match="test split"):
        patch.setattr("prunezero.searching.session.Evaluator", _interrupted)  # no long work before
        wanted = make_task(tiny_space(), 0.5, testbeds=[greedy])
        open_session([greedy], wanted, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    open_session([testbed], task, tmp_path / "run").journal.close()


def test_a_task_for_other_sizes_of_text_is_refused(tmp_path: Path) -> None:
    other = replace(tiny_testbed(), settings=replace(SETTINGS, test_tokens=32))
    with pytest.raises(SearchError, match="test_tokens=64.*, its testbed has .*test_tokens=32"):
        open_session([other], make_task(tiny_space(), 0.5), tmp_path / "run")


def test_a_failed_start_keeps_results_that_were_there(tmp_path: Path) -> None:
    testbed, task = tiny_testbed(), make_task(tiny_space(), 0.5)
    session = open_session([testbed], task, tmp_path / "run")
    list(session.rungs.errors([Rule(task.space.terminals[0])]))
    session.journal.close()
    before = session.journal.path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunezero.searching.session.Evaluator", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_session([testbed], task, tmp_path / "run", resume=True)
    assert session.journal.path.read_bytes() == before


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


SMALL: dict[str, object] = {"model": "a", "format": 1}


def three_results(path: Path) -> list[bytes]:
    """Write a journal of three results; returns its lines, the header first."""
    journal = Journal(path, SMALL, resume=False)
    for place, key in enumerate("WXG"):
        journal.write("layer error", key, {"layer_error": place / 8})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def flipped(line: bytes, place: int) -> bytes:
    return line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]


def test_a_flipped_bit_costs_the_result_of_its_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    header, first, second, third = three_results(path)
    for place in range(len(second) - 1):
        path.write_bytes(header + first + flipped(second, place) + third)
        with pytest.warns(UserWarning, match="line 3: damaged; what stood there is computed again"):
            journal = Journal(path, SMALL, resume=True)
        assert journal.known("layer error", "W") == {"layer_error": 0.0}
        assert journal.known("layer error", "X") is None
        assert journal.known("layer error", "G") == {"layer_error": 0.25}
        journal.close()
    with pytest.warns(UserWarning, match="line 3: damaged"):
        journal = Journal(path, SMALL, resume=True)
    journal.write("layer error", "X", {"layer_error": 0.125})
    journal.close()
    assert [one.get("key") for one in read_journal(path)] == [None, "W", "G", "X"]


def test_a_flipped_line_end_costs_the_results_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    lines = three_results(path)
    path.write_bytes(b"".join(lines[:2])[:-1] + b"\x0b" + b"".join(lines[2:]))
    with pytest.warns(UserWarning, match="line 2: damaged"):
        journal = Journal(path, SMALL, resume=True)
    assert len(journal) == 1 and journal.known("layer error", "G")
    journal.close()


def test_a_flipped_bit_in_the_header_is_mended_under_the_settings_that_it_was_written_under(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    header, *results = three_results(path)
    for place in range(len(header)):
        path.write_bytes(b"".join([flipped(header, place), *results]))
        if place < len(header) - 1:
            with pytest.raises(SearchError, match="line 1 is missing or damaged.*another --name"):
                Journal(path, {**SMALL, "model": "b"}, resume=True)
        with pytest.warns(UserWarning, match="line 1 was damaged and is written anew"):
            journal = Journal(path, SMALL, resume=True)
        assert len(journal) == 3
        journal.close()
        assert path.read_bytes() == b"".join([header, *results])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "content", [b"my notes\n", b"my notes", b'{"a": 1}\n', b"\0\xff", b"0badc0de", b"\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    content: bytes, resume: bool, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(SearchError, match="is no journal of a search.*move it away"):
        Journal(path, SMALL, resume=resume)
    assert path.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(SearchError, match="is no file; move it away"):
        Journal(tmp_path / "journal.jsonl", SMALL, resume=False)


def test_a_journal_of_which_a_crash_left_half_a_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    header = three_results(path)[0]
    for length in (len(header) - 1, len(header) // 2):
        path.write_bytes(header[:length])
        Journal(path, SMALL, resume=False).close()
        assert path.read_bytes() == header


def test_two_journals_in_one_file_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = three_results(path)
    path.write_bytes(b"".join(lines + lines))
    for read in (lambda: read_journal(path), lambda: Journal(path, SMALL, resume=True)):
        with pytest.raises(SearchError, match="line 5 begins another search.*two journals"):
            read()


def test_a_journal_of_an_older_format_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    three_results(path)
    with pytest.raises(SearchError, match="another version.*format: 1, now 2.*--start-from"):
        Journal(path, {**SMALL, "format": 2}, resume=True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["header", "kind", "key", "result", "format"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(KEYS, JSON) | st.binary(max_size=9), max_size=5), st.booleans())
def test_whatever_a_journal_holds_is_read_or_refused_in_a_sentence(
    records: list[dict[str, object] | bytes], with_header: bool
) -> None:
    lines = [one if isinstance(one, bytes) else line_of(one) for one in records]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "run" / "journal.jsonl"
        path.parent.mkdir()
        path.write_bytes(b"".join([line_of({"header": SMALL})] * with_header + lines))
        for read in (
            lambda: read_journal(path),
            lambda: read_run(path.parent),
            lambda: Journal(path, SMALL, resume=True).close(),
        ):
            with contextlib.suppress(PruneZeroError):
                read()
