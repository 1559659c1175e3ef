"""A search remembers its options: it goes on without them, and refuses others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunezero.errors import PruneZeroError, SearchError
from tests.cli.conftest import Run, interrupted_at, small_space


def test_an_interrupted_search_goes_on_by_its_name_alone(run: Run) -> None:
    begun = "search MODEL --pattern 2:4 --space tiny --budget 6 --seed 5 --strategy random"
    with interrupted_at(3):
        result = run(f"{begun} --name parts")
    assert "prunezero search --name parts --resume --budget 6\n" in result.output
    assert not Path("runs/parts/recipe.yaml").exists()
    result = run("search --name parts --resume --budget 6")
    assert result.exit_code == 0, result.exception
    assert run(f"{begun} --name whole").exit_code == 0
    for kind in ("criterion: ", "perplexity: "):
        parts, alone = (
            [
                line
                for line in Path(f"runs/{name}/recipe.yaml").read_text().split("\n")
                if kind in line
            ]
            for name in ("parts", "whole")
        )
        assert parts and parts == alone
    assert Path("runs/parts/search.json").read_text() == Path("runs/whole/search.json").read_text()


def test_what_a_search_was_asked_to_do_stands_in_its_folder(
    mine: Path, tiny_files: tuple[Path, Path]
) -> None:
    told = json.loads((mine / "search.json").read_text())
    assert (told["model"], told["text"]) == tuple(map(str, tiny_files))
    assert (told["sparsity"], told["pattern"], told["seed"]) == (0.5, "free", 3)
    assert (told["strategy"], told["from_scratch"]) == ("evolution", False)
    assert (told["sequence_length"], told["calibration_tokens"]) == (16, 64)
    assert (told["space"], told["space_content"]["name"]) == ("small.yaml", "small")
    # What was left to the machine is settled, so that another machine cannot choose otherwise.
    assert told["dtype"] in ("float32", "bfloat16") and told["device"] == "cpu"
    assert told["prunezero"]
    assert sorted(path.name for path in mine.iterdir() if path.name.startswith(".")) == []


REFUSED = [
    ("--seed 4", "--seed 3, now 4"),
    ("--sparsity 0.6", "--sparsity 0.5, now 0.6"),
    ("--pattern 2:4", "--pattern free, now 2:4"),
    ("--space tiny", "--space small.yaml, now tiny"),
    ("--strategy random", "--strategy evolution, now random"),
    ("--from-scratch", "--from-scratch False, now True"),
    ("--calibration-tokens 128", "--calibration-tokens 64, now 128"),
    ("--text demo", "letters.txt, now demo"),
    ("--device cuda", "--device cpu, now cuda"),
    ("--seed 0", "--seed 3, now 0"),
]


@pytest.mark.parametrize(("typed", "sentence"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_an_option_that_says_otherwise_is_refused_with_both_values(
    typed: str, sentence: str, run: Run, mine: Path
) -> None:
    before = (mine / "search.json").read_text()
    result = run(f"search --name mine --resume --budget 12 {typed}")
    assert isinstance(result.exception, SearchError), result.exception
    assert sentence in str(result.exception)
    assert (mine / "search.json").read_text() == before


def test_options_that_say_the_same_are_no_contradiction(run: Run, mine: Path) -> None:
    small_space(Path("other.yaml"))
    same = "--sparsity 0.5 --seed 3 --dtype auto --device auto --space other.yaml"
    result = run(f"search MODEL {same} --name mine --resume --budget 12")
    assert result.exit_code == 0, result.exception


def test_a_changed_space_of_the_same_name_is_refused_with_what_changed(
    run: Run, mine: Path
) -> None:
    small_space(Path("small.yaml"), tournament=7)
    result = run("search --name mine --resume --budget 12 --space small.yaml")
    assert "tournament: 5, now 7" in str(result.exception)


def test_a_search_without_its_file_goes_on_by_its_journal_and_then_has_one(
    run: Run, mine: Path
) -> None:
    (mine / "search.json").unlink()
    refused = run("search --name mine --resume --budget 12 --seed 0")
    assert isinstance(refused.exception, PruneZeroError)
    assert "--seed 3, now 0" in str(refused.exception)
    assert not (mine / "search.json").exists()
    result = run("search --name mine --resume --budget 12")
    assert result.exit_code == 0, result.exception
    assert json.loads((mine / "search.json").read_text())["seed"] == 3


def test_a_taken_name_leaves_the_options_of_its_search_alone(run: Run, mine: Path) -> None:
    before = (mine / "search.json").read_text()
    result = run("search MODEL --sparsity 0.6 --name mine --budget 3")
    assert isinstance(result.exception, SearchError) and "--resume" in str(result.exception)
    assert (mine / "search.json").read_text() == before
