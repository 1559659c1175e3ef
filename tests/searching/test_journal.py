"""The journal outlives full disks and failed starts, and refuses every changed setting."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prunezero.errors import SearchError, TextError
from prunezero.pruning.bench import Bench, Settings
from prunezero.searching.judging.journal import Journal
from prunezero.searching.session import _header, make_task, open_session
from prunezero.searching.task import Rule
from tests.searching.bench import SETTINGS, tiny_bench, tiny_space


def test_a_full_disk_is_one_sentence_and_the_journal_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from prunezero.errors import OutputError
        from prunezero.searching.judging.journal import Journal
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


HEADER = _header(tiny_bench(), make_task(tiny_space(), 0.5))


def test_the_header_holds_whatever_results_depend_on() -> None:
    assert {"model", "text", "settings", "space", "sparsity", "pattern", "seed"} <= set(HEADER)
    assert {"prunezero", "torch", "sympy", "optuna", "dtype", "device"} <= set(HEADER)


@pytest.mark.parametrize("key", sorted(HEADER))
def test_resuming_is_refused_whichever_setting_changed(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    Journal(path, HEADER, resume=False).close()
    Journal(path, HEADER, resume=True).close()
    before = path.read_bytes()
    with pytest.raises(SearchError, match=f"{key}: .*, now another.*another --name"):
        Journal(path, {**HEADER, key: "another"}, resume=True)
    assert path.read_bytes() == before


def test_a_search_that_could_not_begin_does_not_stand_in_its_own_way(tmp_path: Path) -> None:
    bench, task = tiny_bench(), make_task(tiny_space(), 0.5)
    greedy = Settings(**{**vars(SETTINGS), "test_tokens": 10**6})
    with pytest.raises(TextError, match="test split"):
        open_session(Bench(bench.language_model, bench.text, greedy), task, tmp_path / "run")
    open_session(bench, task, tmp_path / "run").journal.close()


def test_a_failed_start_keeps_results_that_were_there(tmp_path: Path) -> None:
    bench, task = tiny_bench(), make_task(tiny_space(), 0.5)
    session = open_session(bench, task, tmp_path / "run")
    list(session.ladder.errors([Rule(task.space.terminals[0])]))
    session.journal.close()
    before = session.journal.path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunezero.searching.session.Judge", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_session(bench, task, tmp_path / "run", resume=True)
    assert session.journal.path.read_bytes() == before


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt
