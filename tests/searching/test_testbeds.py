"""Several models at once: a rule is worth the geometric mean of what it is worth on each."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import ModelError, PruneZeroError, ScoreError, SearchError
from prunezero.formula import Criterion
from prunezero.models.evaluation import evaluate
from prunezero.models.loading.language_model import wrap_model
from prunezero.models.text.splits import SPLITS as EVERY_SPLIT
from prunezero.models.text.windows import windows_fingerprint
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.testbed import Settings, Testbed, set_up
from prunezero.searching.evaluation.evaluator import Evaluator
from prunezero.searching.evaluation.journal import read_journal
from prunezero.searching.evaluation.request import Request
from prunezero.searching.experiment.candidate import Candidate
from prunezero.searching.experiment.provenance import comparable, conditions
from prunezero.searching.experiment.rule import Rule
from prunezero.searching.experiment.testbeds import beside, fitted
from prunezero.searching.search import search
from prunezero.searching.session import Session, find, found_recipe, measure_baselines, open_session
from prunezero.searching.workers.worker import EvaluatorPlan
from tests.searching.test_search import outcome
from tests.searching.test_workers import forked_pool
from tests.searching.testbed import (
    SETTINGS,
    config_of,
    make_task,
    tiny_space,
    tiny_testbed,
    tiny_text,
)
from tests.tiny_models import save_tiny_model, tiny_network, tiny_tokenizer

WANDA = Criterion.parse("abs(W)*X")
SPLITS = ("search", "validation", "test")


def other_testbed() -> Testbed:
    """Another family, with other names of layers and other sizes."""
    return tiny_testbed("opt", ffn_dim=48)


def opened(testbeds: Sequence[Testbed], folder: Path, **named: Any) -> Session:
    task = make_task(tiny_space(), 0.5, testbeds=testbeds, **named)
    return open_session(testbeds, task, folder)


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[list[Session]]:
    """One on each of two models, and one on both."""
    found = [
        opened([tiny_testbed()], tmp_path / "first"),
        opened([other_testbed()], tmp_path / "second"),
        opened([tiny_testbed(), other_testbed()], tmp_path / "both"),
    ]
    yield found
    for session in found:
        session.rungs.close()


def recipe_in(session: Session) -> Recipe:
    return session.task.recipe(WANDA, "wanda")


def test_the_layer_error_is_the_geometric_mean_over_models(sessions: list[Session]) -> None:
    first, second, both = (
        next(session.rungs.errors([Rule(WANDA)]))["layer_error"] for session in sessions
    )
    assert first != second
    assert both == pytest.approx(math.sqrt(first * second))


def test_numbers_are_tuned_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(criterion: Criterion, error: Callable[[Criterion], float], **kwargs: Any) -> Criterion:
        errors.append(error(criterion))
        return criterion

    errors: list[float] = []
    monkeypatch.setattr("prunezero.searching.evaluation.evaluator.tune", told)
    task, pair = make_task(tiny_space(), 0.5), [tiny_testbed(), other_testbed()]
    request = Request.of(task.recipe(WANDA, "it"), trials=3)
    for testbeds in (pair[:1], pair[1:], pair):
        Evaluator(task, testbeds).result(request)
    assert errors[2] == pytest.approx(math.sqrt(errors[0] * errors[1]))


def test_a_mask_is_known_only_if_it_is_on_every_model(sessions: list[Session]) -> None:
    first, second, both = (session.rungs.probe(WANDA) for session in sessions)
    assert first and second and both
    assert [*both.bits] == [*first.bits, *second.bits]
    assert len({first.digest, second.digest, both.digest}) == 3


def test_a_row_holds_geometric_means_and_each_model_by_itself(sessions: list[Session]) -> None:
    first, second, both = (
        session.rungs.measure(recipe_in(session), SPLITS) for session in sessions
    )
    for key in ("search_perplexity", "validation_perplexity", "test_perplexity", "kl"):
        assert both[key] == pytest.approx(math.sqrt(first[key] * second[key]))
        assert [part[key] for part in both["regimes"]] == [first[key], second[key]]
    assert [part["model"] for part in both["regimes"]] == ["llama", "opt"]
    assert (both["pattern"], both["sparsity"]) == ("free", 0.5)
    # Tests over windows are about the number that is shown.
    losses = both["window_losses"]["test"]
    assert len(losses) == len(first["window_losses"]["test"])
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(both["test_perplexity"])


def test_the_dense_models_and_baselines_are_measured_on_all_models(sessions: list[Session]) -> None:
    first, second, both = (list(measure_baselines(session, SPLITS)) for session in sessions)
    assert [row["recipe"] for row in both] == [row["recipe"] for row in first]
    for alone, other, row in zip(first, second, both, strict=True):
        mean = math.sqrt(alone["test_perplexity"] * other["test_perplexity"])
        assert row["test_perplexity"] == pytest.approx(mean)
    assert [part["model"] for part in both[0]["regimes"]] == ["llama", "opt"]
    assert [part["sparsity"] for part in both[0]["regimes"]] == [0.0, 0.0]


def test_every_model_is_measured_under_every_budget(
    sessions: list[Session], tmp_path: Path
) -> None:
    session = opened([tiny_testbed(), other_testbed()], tmp_path / "all", also="0.7,2:4")
    try:
        row = session.rungs.measure(recipe_in(session), ("test",))
    finally:
        session.rungs.close()
    parts = [(part["model"], part["sparsity"], part["pattern"]) for part in row["regimes"]]
    budgets = [(0.5, "free"), (0.7, "free"), (0.5, "2:4")]
    assert parts == [(model, *budget) for model in ("llama", "opt") for budget in budgets]
    values = [part["test_perplexity"] for part in row["regimes"]]
    alone = sessions[1].rungs.measure(recipe_in(sessions[1]), ("test",))["test_perplexity"]
    assert values[3] == alone
    assert row["test_perplexity"] == pytest.approx(math.prod(values) ** (1 / 6))
    assert row["pattern"] == "free, 0.7, 2:4"


def test_one_model_is_measured_under_the_conditions_of_before(tmp_path: Path) -> None:
    testbed, task = tiny_testbed(), make_task(tiny_space(), 0.5)
    alone = conditions(task.config, [testbed])
    assert not [key for key in alone if key.startswith("also")]
    told = conditions(task.config, [testbed, other_testbed()])
    assert told == alone | {
        "also_models": [other_testbed().language_model.fingerprint],
        "also_dtypes": ["torch.float32"],
        "also_token_ids": [
            [windows_fingerprint(other_testbed().windows(split)) for split in EVERY_SPLIT]
        ],
    }
    session = open_session([testbed], task, tmp_path / "one")
    rows = [
        session.rungs.measure(recipe_in(session), ("test",)),
        *measure_baselines(session, SPLITS),
    ]
    session.rungs.close()
    assert not any("regimes" in row for row in rows)
    first, *results = read_journal(tmp_path / "one" / "journal.jsonl")
    assert not [key for key in comparable(first["header"]) if key.startswith("also")]
    assert "also" not in json.dumps(results)


def candidates(folder: Path, also: Sequence[Testbed], *, resume: bool = False) -> list[Candidate]:
    options: dict[str, Any] = {"also_testbeds": also, "budget": 8, "resume": resume}
    return list(find(tiny_testbed(), tiny_space(), 0.5, folder=folder, **options))


def test_a_search_over_models_is_resumed_and_refuses_others(tmp_path: Path) -> None:
    found = candidates(tmp_path / "run", [other_testbed()])
    again = candidates(tmp_path / "run", [other_testbed()], resume=True)
    assert outcome(again) == outcome(found) and all(one.is_replayed for one in again if one.kl)
    for others in ([], [tiny_testbed("gpt2")], [other_testbed(), tiny_testbed("gpt2")]):
        with pytest.raises(SearchError, match="also_models: "):
            candidates(tmp_path / "run", others, resume=True)


def test_what_the_winner_is_good_on_stands_in_its_recipe(sessions: list[Session]) -> None:
    winner = Candidate(0, 0, WANDA, "random", (), "new")
    alone, _, told = (found_recipe(session, "mine", winner).provenance for session in sessions)
    model = other_testbed().language_model
    assert told["also_models"] == [{"name": "opt", "fingerprint": model.fingerprint}]
    assert told["model"] == "llama" and "also_models" not in alone
    assert sessions[2].models == "llama and opt"


def test_a_known_answer_is_told_under_the_names_that_this_search_has(tmp_path: Path) -> None:
    task, archive = make_task(tiny_space(), 0.5), tmp_path / "archive.jsonl"
    told = []
    for name in ("here", "there"):
        other = other_testbed()
        other = replace(other, language_model=replace(other.language_model, name=name))
        session = open_session([tiny_testbed(), other], task, tmp_path / name, archive=archive)
        told.append(session.rungs.measure(recipe_in(session), ("test",)))
        session.rungs.close()
    # The seconds are those of the first: it was not measured again.
    assert told[0]["elapsed"] == told[1]["elapsed"]
    names = [[part["model"] for part in row["regimes"]] for row in told]
    assert names == [["llama", "here"], ["llama", "there"]]


class Stingy:
    """A tokenizer that makes one token of a hundred letters."""

    eos_token_id = 1

    def __init__(self) -> None:
        self.get_vocab = tiny_tokenizer().get_vocab

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [5] * (len(text) // 100)}


def stingy() -> Testbed:
    model = wrap_model(tiny_network("opt"), Stingy(), name="opt")
    return Testbed(model, tiny_text(), SETTINGS)


UPDATES: dict[str, Any] = {"update": [["none"], ["bias"]]}
PERMUTED: dict[str, Any] = {"permute": ["none", {"heuristic": {"layers": ["down_proj"]}}]}
REFUSED: dict[str, tuple[Callable[[], Testbed], dict[str, Any], str]] = {
    "a pattern": (lambda: tiny_testbed("opt", ffn_dim=66), {}, "layer .*fc2: pattern 2:4 .* 66"),
    "short positions": (lambda: tiny_testbed("opt", max_position_embeddings=8), {}, "8 positions"),
    "little text": (stingy, {}, "calibration split of text 'letters' has 20 tokens"),
    "no bias": (lambda: tiny_testbed("mistral"), UPDATES, "bias"),
    "no such layers": (lambda: tiny_testbed("opt"), PERMUTED, "'down_proj' matches no layer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_lacks_something_is_refused_by_name_before_the_long_work(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunezero.searching.session.Evaluator", None)
    make, choices, told = REFUSED[what]
    other = make()
    task = make_task(tiny_space(choices=choices), None, pattern="2:4")
    name = other.language_model.name
    with pytest.raises(PruneZeroError, match=f"^model {name}: .*{told}"):
        open_session([tiny_testbed(), other], task, tmp_path / "run")
    # The order does not matter, and nothing was begun.
    with pytest.raises(PruneZeroError, match=f"^model {name}: .*{told}"):
        open_session([other, tiny_testbed()], task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_model_is_refused_without_its_name(tmp_path: Path) -> None:
    task = make_task(tiny_space(choices=UPDATES), 0.5)
    with pytest.raises(ModelError, match="^(?!model )"):
        open_session([tiny_testbed("mistral")], task, tmp_path / "run")


def renamed(testbed: Testbed) -> Testbed:
    return replace(testbed, language_model=replace(testbed.language_model, name="again"))


UNLIKE: dict[str, tuple[Callable[[], Testbed], str]] = {
    "named twice": (lambda: tiny_testbed(seed=1), "model llama is named twice"),
    "the same": (lambda: renamed(tiny_testbed()), "llama and again are the same model"),
    "other sizes": (
        lambda: replace(other_testbed(), settings=Settings(16, 64, 128, 64)),
        "model opt has other text, settings",
    ),
    "other text": (
        lambda: replace(other_testbed(), text=replace(tiny_text(), fingerprint="other")),
        "model opt has other text, settings",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_models_that_cannot_be_compared_window_by_window_are_refused(
    what: str, tmp_path: Path
) -> None:
    make, told = UNLIKE[what]
    with pytest.raises(SearchError, match=told):
        task = make_task(tiny_space(), 0.5)
        open_session([tiny_testbed(), make()], task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_that_one_model_lacks_have_no_shares() -> None:
    task = make_task(tiny_space(ratios=["q_proj", "fc1", "gate_proj", "v_proj"]), 0.5)
    testbeds = (tiny_testbed(), other_testbed())
    assert fitted(task, testbeds).ratios == ("q_proj", "v_proj")
    assert fitted(task, testbeds[1:]).ratios == ("q_proj", "fc1", "v_proj")


def test_a_measurement_that_fails_on_the_second_model_leaves_both_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = [tiny_testbed(), other_testbed()]
    evaluator = Evaluator(make_task(tiny_space(), 0.5), pair)
    weights = [one.language_model.model.state_dict() for one in pair]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in weights]
    asked: list[str] = []

    def failing(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(model.name)
        if model.name == "opt":
            raise failure
        return evaluate(model, *args, **kwargs)

    request = Request.of(Recipe.load("wanda"), ("search",))
    with monkeypatch.context() as patch:
        patch.setattr("prunezero.pruning.compare.evaluate", failing)
        failure: Exception = MemoryError("Unable to allocate 8.00 PiB")
        assert evaluator.result(request) == {"fault": "it needs too much memory"}
        failure = ScoreError("layer fc1 ranks nothing")
        assert evaluator.result(request) == {"fault": "model opt: layer fc1 ranks nothing"}
    assert asked == ["llama", "opt"] * 2
    for state, known in zip(weights, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in known.items())
    assert "fault" not in evaluator.result(request)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two saved tiny models and a text file."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices("abcdefgh ,.", k=200)) for _ in range(60)]
    (folder / "letters.txt").write_text("\n\n".join(paragraphs))
    first, second = (save_tiny_model(family, folder / family) for family in ("llama", "opt"))
    return first, second, folder / "letters.txt"


def loaded(files: tuple[Path, Path, Path]) -> tuple[Testbed, Testbed]:
    testbed = set_up(str(files[0]), files[2], SETTINGS, dtype="float32", device="cpu")
    (other,) = beside(testbed, [str(files[1])], device="cpu")
    return testbed, other


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "elapsed")}


def test_a_plan_builds_the_evaluator_of_all_models_again(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files[0].parent)
    testbed, other = loaded((Path("llama"), Path("opt"), Path("letters.txt")))
    task = make_task(tiny_space(), 0.5, testbeds=[testbed, other])
    plan = EvaluatorPlan.of(task.config, [testbed, other])
    assert plan.config.also_model == (str(files[1]),)
    monkeypatch.chdir("/")
    evaluator, again = Evaluator(task, [testbed, other]), plan.evaluator(1)
    recipe = Recipe.load("magnitude")
    for request in (
        Request.of(recipe),
        Request.of(recipe, ("search", "test")),
        Request.of(recipe, trials=2),
        Request.of(None, ("test",)),
    ):
        # The worker has the models under other names, and says nothing of them.
        assert timeless(again.result(request)) == timeless(evaluator.result(request))


@pytest.mark.parametrize("what", ["another", "none", "gone"])
def test_a_worker_that_finds_another_second_model_refuses_to_measure(
    what: str, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    testbeds = loaded(files)
    plan = EvaluatorPlan.of(config_of(tiny_space(), 0.5, testbeds=testbeds), testbeds)
    found: tuple[str, ...] = (str(tmp_path / "gone"),)
    if what == "another":
        found = (str(save_tiny_model("opt", tmp_path / "model", seed=1)),)
    elif what == "none":
        found = ()
    plan = replace(plan, config=plan.config.model_copy(update={"also_model": found}))
    told = "gone" if what == "gone" else r"answer otherwise than the search \(also_.*models: "
    with pytest.raises(PruneZeroError, match=told):
        plan.evaluator(1)


def test_workers_search_over_models_as_this_process_does(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    testbeds = loaded(files)
    task = make_task(tiny_space(), 0.5, testbeds=testbeds)

    def searched(folder: Path, **options: Any) -> tuple[Any, ...]:
        session = open_session(testbeds, task, folder, **options)
        found = outcome(list(search(session.rungs, max_candidates=6)))
        session.rungs.close()
        lines = (folder / "journal.jsonl").read_bytes().splitlines()
        records = [json.loads(line.split(b" ", 2)[2]) for line in lines[1:]]
        return found, lines[0], [(one["key"], timeless(one["result"])) for one in records]

    def pool(plan: EvaluatorPlan) -> Any:
        return forked_pool(plan, 1)

    assert searched(tmp_path / "pool", pool=pool) == searched(tmp_path / "alone")


def test_further_models_are_loaded_on_the_same_text_in_the_dtype_of_the_first(
    files: tuple[Path, Path, Path],
) -> None:
    testbed = set_up(str(files[0]), files[2], SETTINGS, dtype="bfloat16", device="cpu")
    (other,) = beside(testbed, [str(files[1])], device="cpu")
    assert other.language_model.dtype == torch.bfloat16
    assert other.text is testbed.text and other.settings is testbed.settings
    with pytest.raises(SearchError, match="is named twice"):
        beside(testbed, [str(files[0])], device="cpu")
