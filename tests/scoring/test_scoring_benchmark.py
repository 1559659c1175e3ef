"""What benchmarks/scoring.py compares makes one mask, and what it says is what it measured."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.scoring import population, score
from prunezero.scoring.kernels.machine import can_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HEAD = {"device": "cpu", "dtype": "float32", "formula": "wanda", "request": "rows"}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything so small that it takes no time."""
    parts, formulas = script("scoring_parts"), script("scoring_population")
    for name, size in (("COLD", 1 << 12), ("COPIED", 1 << 12)):
        monkeypatch.setattr(parts, name, size)
    models = parts.MODELS
    monkeypatch.setitem(models, "demo", (2, {(12, 8): 2, (8, 12): 1}))
    monkeypatch.setitem(models, "7b", (1, {(16, 8): 1}))
    for module in (formulas, script("scoring")):
        monkeypatch.setattr(module, "TOGETHER", (1, 2, 3))
    monkeypatch.setattr(formulas, "SINGLE", 2)
    monkeypatch.setattr(script("turns"), "LONG_ENOUGH", 1e-9)


def lowest(scores: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """True for the lower half of every group of so many columns, ties to the lower index."""
    groups = scores.reshape(-1, width)
    removed = np.zeros(groups.shape, dtype=bool)
    order = np.argsort(groups, axis=1, kind="stable")[:, : width // 2]
    np.put_along_axis(removed, order, True, axis=1)
    return removed.reshape(scores.shape)


@pytest.mark.parametrize(("pattern", "width"), [("free", 24), ("2:4", 4)])
@pytest.mark.parametrize("way", ["removed_by_published", "removed_by_topk"])
def test_torch_marks_the_lower_half_of_every_group(way: str, pattern: str, width: int) -> None:
    scores = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    removed = getattr(script("published_selection"), way)(scores, pattern)
    assert np.array_equal(removed.numpy(), lowest(scores.numpy(), width))


def test_published_code_gives_ties_of_a_row_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 2.0]])
    removed = script("published_selection").removed_by_published(scores, "free")
    assert removed.tolist() == [[True, True, False, False, True, False]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_scores_are_those_of_the_formulas(dtype: str) -> None:
    published = script("published_selection")
    values = script("scoring_parts").random_values(5, 8, ("W", "G"), HEAD | {"dtype": dtype})
    weight, gradient, inputs = (values[name].float().numpy() for name in ("W", "G", "X"))
    left = abs(weight) * np.sqrt(inputs) * np.log(gradient + 1)
    mixed = left + weight**2 * np.tanh(gradient * inputs)
    product = abs(weight) * gradient
    every = {"wanda": abs(weight) * inputs, "product": product, "mixed": mixed}
    assert set(every) == set(published.FORMULAS)
    for name, expected in every.items():
        scores = published.FORMULAS[name].eager(values)
        assert scores.dtype == torch.float32
        assert scores.numpy() == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("way", ["torch", "kernels"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("request_word", ["rows", "2:4"])
@pytest.mark.usefixtures("tiny")
def test_all_contenders_make_one_mask(
    way: str, dtype: str, request_word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernels":
        pytest.importorskip("triton")
    parts, scoring = script("scoring_parts"), script("scoring")
    monkeypatch.setattr(score, "has_kernels", lambda tensor: way == "kernels")
    monkeypatch.setattr(parts, "compiled", lambda eager, device: eager)
    for formula in script("published_selection").FORMULAS:
        asked = {"dtype": dtype, "shape": "8x24", "formula": formula, "request": request_word}
        works = parts.matrix_work(HEAD | asked, with_compile=True)
        assert list(works) == ["published", "topk", "compiled", "prunezero"]
        times = script("turns").in_turn(
            {name: work.call for name, work in works.items()}, torch.device("cpu"), 1
        )
        assert [scoring.differing(works, times, name) for name in works] == [0, 0, 0, 0]
        # One mask of a byte for each weight, and every matrix once.
        sizes = len(script("published_selection").FORMULAS[formula].matrices)
        bytes_each = 4 if dtype == "float32" else 2
        assert works["prunezero"].facts["bytes"] == 192 * (sizes * bytes_each + 1)


def test_weights_on_which_masks_differ_are_counted() -> None:
    scoring, times = script("scoring"), script("turns").Times
    work = script("scoring_parts").Work
    works = {
        "published": work(lambda number: None),
        "other": work(lambda number: None, says_kept=True),
    }
    reference, kept = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    found = {"published": times(0.0, reference), "other": times(0.0, kept)}
    assert scoring.differing(works, found, "other") == 2
    assert scoring.differing(works, {"other": times(0.0, kept)}, "other") is None


@pytest.mark.usefixtures("tiny")
def test_calls_read_other_copies_of_equal_values() -> None:
    parts = script("scoring_parts")
    values = parts.random_values(8, 8, ("W",), HEAD)
    pool = parts.copies(values, ("W",))
    assert len(pool) == 4096 // (8 * 8 * 4)
    assert len({one["W"].data_ptr() for one in pool}) == len(pool)
    assert all(torch.equal(one["W"], values["W"]) for one in pool)


def test_contenders_take_turns_and_number_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = script("turns")
    said: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[int], str]:
        def call(number: int) -> str:
            said.append((name, number))
            return name

        return call

    # A clock on which every look costs a quarter of a measurement that is long enough.
    clock = iter(np.arange(0.0, 10.0, 0.25))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(turns, "LONG_ENOUGH", 0.5)
    found = turns.in_turn({name: contender(name) for name in "abc"}, torch.device("cpu"), 2)
    assert said[:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert said[6:] == [(name, number) for name in "abc" for number in (2, 3)] + [
        (name, number) for name in "bca" for number in (4, 5)
    ]
    assert found["b"].result == "b" and found["b"].calls == 2
    assert found["b"].first_seconds == 0.25 and found["b"].seconds == [0.125, 0.125]


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("idle"))
    seconds = script("turns").seconds_of(lambda: said.append("run"), torch.device("cuda"))
    assert seconds == 1.5
    assert said == ["idle", "record", "run", "record", "wait"]


@pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
def test_the_population_is_always_the_same_and_fit_for_any_rows() -> None:
    module = script("scoring_population")
    found = module.formulas()
    assert len(set(found)) == 64
    assert [one.text for one in module.formulas.__wrapped__()] == [one.text for one in found]
    assert all(one.shape == "element" and can_run(one) for one in found)
    too_large = {"W": torch.full((2, 2), 1e7), "X": torch.ones(1, 2), "G": torch.ones(2, 2)}
    too_large["W"][0, 0] = 1.0
    assert module._usable("W**4", too_large) is None
    assert module._usable("X", too_large) is None
    assert module._usable("W", too_large) == Criterion.parse("W")


@pytest.mark.parametrize("way", ["torch", "kernels"])
@pytest.mark.usefixtures("tiny")
def test_errors_are_shares_of_the_outputs_of_every_layer(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(population, "has_kernels", lambda tensor: way == "kernels")
    module = script("scoring_population")
    criteria = [Criterion.parse(text) for text in ("abs(W)*X", "W**2*G", "abs(W)")]
    monkeypatch.setattr(module, "formulas", lambda: criteria)
    head = HEAD | {"shape": "demo"}
    works = module.population_work(head, with_compile=False)
    assert list(works) == [f"{n} to {what}" for n in (1, 2, 3) for what in ("masks", "errors")]
    assert works["1 to errors"].facts == {"formulas": 1, "rounds": 2}
    expected = []
    for text in ("abs(W)*X", "W**2*G", "abs(W)"):
        shares = []
        for stack in module.stacks(head):
            grams = [matrices[0].numpy() for matrices, _ in stack.grams.batches]
            values = {name: value.numpy() for name, value in stack.features.items()}
            scores = eval(text, {"abs": abs}, values) * np.ones_like(values["W"])
            for place, weight in enumerate(values["W"]):
                lost = np.where(lowest(scores[place], weight.shape[1]), weight, 0)
                gram, importance = grams[place], stack.row_weights[place].numpy()
                energies = [((rows @ gram) * rows).sum(1) @ importance for rows in (lost, weight)]
                shares.append(energies[0] / energies[1])
        expected.append(np.mean(shares))
    assert works["3 to errors"].call(0) == pytest.approx(expected, rel=1e-4)
    assert works["1 to errors"].call(0) == pytest.approx(expected[:2], rel=1e-4)
    assert works["3 to masks"].call(0) is None


def test_shapes_are_those_of_the_models() -> None:
    parts, module = script("scoring_parts"), script("scoring_population")
    weights = {
        name: sum(blocks * count * rows * columns for (rows, columns), count in shapes.items())
        for name, (blocks, shapes) in parts.MODELS.items()
    }
    assert weights == {"demo": 106_168_320, "7b": 6_476_005_376}
    assert module.sampled("demo") == [
        (60, 23, 576),
        (60, 8, 576),
        (60, 61, 576),
        (30, 23, 1536),
    ]


def words_for(tmp_path: Path, *more: str) -> list[str]:
    words = "--device cpu --threads 1 --repeats 2 --shapes 8x8 8x12 --no-compile".split()
    return [*words, "--results", str(tmp_path), "--runs", str(tmp_path), *more]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scoring.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("tiny")
def test_a_run_writes_all_parts_and_a_second_start_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = script("scoring")
    # Its tables take seconds to make; another test makes them.
    monkeypatch.setattr(scoring, "to_mlflow", lambda *arguments: None)
    scoring.main(words_for(tmp_path, "--formulas", "wanda"))
    rows = rows_in(tmp_path)
    counts = {part: sum(row["part"] == part for row in rows) for part in scoring.PARTS}
    assert counts == {"copy": 1, "matrix": 2 * 2 * 3, "population": 6, "model": 2}
    assert all(len(row["seconds"]) == 2 and row["threads"] == 1 for row in rows)
    assert [row["differing"] for row in rows if row["part"] == "matrix"] == [0] * 12
    table = (tmp_path / "scoring.md").read_text()
    assert table.count("| 8x12 | float32 | `wanda` | 2:4 | prunezero |") == 1
    assert (tmp_path / "scoring.png").read_bytes().startswith(b"\x89PNG")
    scoring.main(words_for(tmp_path, "--formulas", "wanda"))
    scoring.main(words_for(tmp_path, "--report"))
    assert rows_in(tmp_path) == rows
    # Ratios are of contenders that took turns: a lost row costs the group, and no other.
    lines = (tmp_path / "scoring.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scoring.jsonl").write_text("".join(lines[:4] + lines[5:]))
    scoring.main(words_for(tmp_path, "--formulas", "wanda"))
    assert [row["contender"] for row in rows_in(tmp_path)[len(rows) - 1 :]] == [
        *("published", "topk", "prunezero")
    ]
    scoring.main(words_for(tmp_path, "--parts", "copy", "--repeats", "3"))
    assert [len(row["seconds"]) for row in scoring.latest(rows_in(tmp_path))][0] == 3


@pytest.mark.usefixtures("tiny")
def test_medians_go_to_mlflow_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    words = words_for(tmp_path, "--parts", "copy", "matrix", "--formulas", "wanda")
    for _ in range(2):
        script("scoring").main([*words, "--requests", "rows"])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("benchmarks")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == len(runs) == 1 + 1 + 2 * 3
    ours = runs["matrix 8x8 wanda rows prunezero"]
    assert ours.data.params["machine"] and ours.data.params["dtype"] == "float32"
    names = {"seconds", "first_seconds", "speed_up", "bandwidth_share", "masks_differ"}
    assert ours.data.metrics.keys() == names | {"bytes_per_second"}
    assert ours.data.tags["mlflow.parentRunId"] == runs["scoring"].info.run_id
    files = client.list_artifacts(runs["scoring"].info.run_id)
    assert [file.path for file in files] == ["scoring.md", "scoring.png"]


def row_of(contender: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    place = {"part": "matrix", "device": "cpu", "machine": "a machine", "threads": 2}
    facts = {"repeats": len(seconds), "torch": "2", "first_seconds": 9.0, "differing": 0}
    names = {"contender": contender, "seconds": seconds, "shape": "8x8"}
    return HEAD | place | facts | names | more


def test_ratios_and_shares_follow_from_medians() -> None:
    report = script("scoring_report")
    copy = {"part": "copy", "formula": "", "request": "", "bytes": 800, "shape": "1 GiB"}
    of_many: dict[str, Any] = {"part": "population", "shape": "demo", "differing": None}
    rows = [
        row_of("copy", [1.0], **copy),
        row_of("published", [8.0, 2.0, 4.0], bytes=400),
        row_of("prunezero", [1.0, 1.0, 7.0], bytes=400, differing=1234),
        row_of("1 to errors", [0.5], formulas=1, **of_many),
        row_of("64 to errors", [16.0], formulas=64, **of_many),
    ]
    elsewhere = [row | {"machine": "another", "seconds": [1e9]} for row in rows]
    text = "\n".join(report.report([*elsewhere, *rows]))
    head = "| 8x8 | float32 | `wanda` | 50 % by rows |"
    assert f"{head} prunezero | 1,000 (1,000 to 7,000) | 4.00 | 50.0 % | 1,234 | 9 |" in text
    assert f"{head} published | 4,000 (2,000 to 8,000) | 1.00 | 12.5 % | 0 | 9 |" in text
    assert "| demo | float32 | 64 | errors | 16,000 | 4 | 32.00 |" in text
    assert "## a machine, 2 threads, torch 2" in text
    found = report.metrics(rows[-1], rows)
    assert found["candidates_per_second"] == 4.0 and found["times_as_long_as_one"] == 32.0
    assert report.latest([rows[1], rows[1] | {"seconds": [3.0]}])[0]["seconds"] == [3.0]


def test_what_does_not_fit_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    scoring = script("scoring")
    head = HEAD | {"part": "population", "shape": "7b"}
    size = scoring.population_bytes(head)
    # Gram matrices alone: 192 of 4096 and 32 of 11008 columns, in float32.
    assert size > 4 * (192 * 4096**2 + 32 * 11008**2)
    assert not scoring.fits(size, head)
    assert capsys.readouterr().out == (
        "population of 7b in float32 is left out: it needs about "
        f"{size / 2**30:.1f} GiB, and 6.0 are allowed on a CPU\n"
    )
    assert scoring.fits(scoring.population_bytes(head | {"shape": "demo"}), head)
    for shape in scoring.SHAPES + scoring.WIDE_SHAPES:
        asked = {"shape": shape, "formula": "mixed"}
        assert scoring.fits(scoring.matrix_bytes(HEAD | asked), head | asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4096"], "'4096' is no shape; say rows and columns, as in 4096x11008"),
        (["--shapes", "4x0"], "'4x0' is no shape"),
        (["--shapes", "4x6"], "shape '4x6' has 6 columns, but 2:4 needs a multiple of 4"),
        (["--repeats", "0"], "--repeats and --threads must be at least 1"),
        (["--device", "cuda"], "torch sees no CUDA device here; say --device cpu"),
    ],
)
def test_bad_words_are_refused(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("scoring").parsed(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_gpu_is_measured_in_bfloat16_on_wide_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = script("scoring").parsed([])
    assert (found.device, found.machine, found.dtypes) == ("cuda", "a GPU", ["bfloat16"])
    assert "4096x11008" in found.shapes and found.models == ["demo", "7b"]


def test_nothing_measured_and_no_compiler_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="has no row; run without --report first"):
        script("scoring").main(words_for(tmp_path, "--report"))

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    published = script("published_selection")
    published._load_compiler.cache_clear()
    with pytest.raises(SystemExit, match=r"\(no C\+\+ compiler\); leave it out by --no-compile"):
        published.compiled(published.FORMULAS["wanda"].eager, torch.device("cpu"))
