"""Training on text of several sources: which windows come, against a slow loop of the equations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import PruneZeroWarning, RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.observing.gradients import sequence_loss
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.training_options import Lora, Tune
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.drawing import (
    ByDegradation,
    Equal,
    batches,
    degradation_shares,
    order_of,
)
from prunezero.pruning.recovery.mixture import Mixture, SourceReport, mixture_of
from prunezero.pruning.recovery.training import TrainingReport
from prunezero.pruning.recovery.words import tune
from tests.pruning.test_while_training import broken_loss
from tests.pruning.trained import TEXT, StopError, digest, halved, knowing_model, recipe, stop_after
from tests.tiny_models import tiny_batches

LENGTH = 12
# What the model knows, and noise, in turn: pruning costs something on the first alone.
WINDOWS = torch.stack([TEXT, tiny_batches(6, LENGTH, seed=5)], 1).reshape(-1, LENGTH)
SOURCES = ("known", "noise") * 6
THREE = ("a", "b", "c")
SAMPLING: dict[str, Any] = {
    "sampling": "degradation",
    "measure_every": 3,
    "held_out": 4,
    "batch": 3,
    "learning_rate": 0.01,
}


def losses_by_hand(model: LanguageModel, places: range) -> dict[int, float]:
    with torch.no_grad():
        return {place: float(sequence_loss(model.model, WINDOWS[place][None])) for place in places}


# The shares


def test_shares_follow_what_each_source_lost_over_a_balanced_part() -> None:
    # Lost: 0.3, 0.1 and nothing, for which a source that got better counts too.
    found = degradation_shares([1.3, 1.1, 0.9], 0.25)
    assert found == pytest.approx([0.25 / 3 + 0.75 * 0.75, 0.25 / 3 + 0.75 * 0.25, 0.25 / 3])
    assert sum(found) == pytest.approx(1)
    assert degradation_shares([1.3, 1.1], 1.0) == pytest.approx([0.5, 0.5])
    assert degradation_shares([1.3, 1.0], 0.0) == pytest.approx([1, 0])


@pytest.mark.parametrize("growth", [[1.0, 0.9], [math.nan, 1.2], [1.1, math.inf]])
def test_where_nothing_is_lost_or_known_all_sources_have_the_same_share(
    growth: list[float],
) -> None:
    assert degradation_shares(growth, 0.2) == [0.5, 0.5]


# The order of windows


def order(growths: Sequence[tuple[float, ...]], count: int = 24, **numbers: Any) -> list[list[int]]:
    """Batches of windows of sources a, b and c in turn, by what is measured each time."""
    options = Tune.model_validate({**SAMPLING, "held_out": 3, **numbers})
    mixture = Mixture(THREE, tuple(place % 3 for place in range(count)), {})
    found = ByDegradation(mixture, options, range(count - 3), "0 0")
    told = iter(growths)
    drawn = []
    for done in range(found.steps):
        if found.is_measured_before(done):
            found.growth.append((done, next(told)))
        drawn.append(found.batch(done))
    assert found.drawn_of(found.steps) == tuple(
        sum(place % 3 == source for batch in drawn for place in batch) for source in range(3)
    )
    return drawn


def slow_order(growths: Sequence[tuple[float, ...]], sequences: int, batch: int) -> list[list[int]]:
    """The same by exact numbers, with each source's windows in a deck that is shuffled anew."""
    credit, decks = [Fraction(0)] * 3, [[], [], []]  # type: ignore[var-annotated]
    rounds = [0] * 3
    found: list[list[int]] = []
    for step in range(math.ceil(sequences / batch)):
        lost = [max(Fraction(0), Fraction(str(one)) - 1) for one in growths[step // 3]]
        part = [one / sum(lost) if sum(lost) else Fraction(1, 3) for one in lost]
        shares = [Fraction(1, 15) + Fraction(4, 5) * one for one in part]
        found.append([])
        for _ in range(min(batch, sequences - step * batch)):
            credit = [one + share for one, share in zip(credit, shares, strict=True)]
            source = credit.index(max(credit))
            credit[source] -= 1
            if not decks[source]:
                own = list(range(source, 21, 3))
                rng = random.Random(f"0 0 {source} {rounds[source]}")
                decks[source], rounds[source] = rng.sample(own, len(own)), rounds[source] + 1
            found[-1].append(decks[source].pop(0))
    return found


def test_windows_come_as_the_slow_loop_deals_them_out() -> None:
    growths = [(1.31, 1.12, 0.97), (1.05, 1.23, 1.01), (0.9, 0.8, 0.7)]
    found = order(growths, sequences=25)
    assert found == slow_order(growths, 25, 3)
    assert [len(batch) for batch in found] == [3] * 8 + [1]


def test_counts_follow_shares_to_within_one_window_and_a_window_waits_for_all_of_its_source() -> (
    None
):
    growth = (1.5, 1.2, 1.0)
    drawn = [place for batch in order([growth] * 20, sequences=150) for place in batch]
    for count in range(1, 151):
        for source, share in enumerate(degradation_shares(growth, 0.2)):
            came = [place for place in drawn[:count] if place % 3 == source]
            assert abs(len(came) - share * count) <= 1
    for source in range(3):
        own = [place for place in drawn if place % 3 == source]
        for at in range(0, len(own) - 7, 7):
            assert len(set(own[at : at + 7])) == 7


def test_the_last_sources_wait_for_the_second_stage_and_then_come_alone() -> None:
    found = order([(1.2, 1.1, 1.5)] * 4, sequences=30, second_stage=1, second_from=0.65)
    by_step = [{place % 3 for place in batch} for batch in found]
    assert len(by_step) == 10
    assert set.union(*by_step[:6]) == {0, 1} and set.union(*by_step[6:]) == {2}


def test_one_source_or_equal_sampling_has_the_order_of_before() -> None:
    mixture = Mixture(("a", "b"), (0, 1) * 4)
    before = batches(8, 20, 4, "3 1")
    for options, known in (
        (Tune.model_validate({**SAMPLING, "sequences": 20, "batch": 4}), None),
        (Tune(sequences=20), None),
        (Tune(sequences=20), mixture),
    ):
        found = order_of(options, 8, known, "3 1")
        assert isinstance(found, Equal) and found.batches == before
    assert found.drawn_of(4) == (8, 8) and found.drawn_of(1) == (
        sum(place % 2 == 0 for place in before[0]),
        sum(place % 2 == 1 for place in before[0]),
    )


# The training


def test_text_of_one_source_trains_to_the_bits_of_equal_sampling() -> None:
    digests = []
    for sampling in ("equal", "degradation"):
        numbers = {**SAMPLING, "sampling": sampling, "sequences": 12}
        model = knowing_model()
        prune(model, recipe(recover={"tune": numbers}), 0.5, windows=WINDOWS, sources=["a"] * 12)
        digests.append(digest(model))
    assert digests[0] == digests[1]


def run(word: str, **numbers: Any) -> tuple[LanguageModel, TrainingReport]:
    model = knowing_model()
    length = {"sequences": 21} if word == "tune" else {"steps": 7}
    rules = recipe(recover={word: {**SAMPLING, **length, **numbers}})
    outcome = prune(model, rules, 0.5, windows=WINDOWS, sources=SOURCES)
    return model, outcome.trainings[0]


@pytest.mark.parametrize("word", ["tune", "lora", "distil"])
def test_every_recovery_measures_and_prefers_what_was_lost(word: str) -> None:
    _, report = run(word)
    known, noise = report.sources
    assert (known.name, noise.name) == ("known", "noise")
    assert [done for done, _ in known.growth] == [0, 3, 6]
    assert known.growth[0][1] > noise.growth[0][1] + 0.2
    assert known.shares[0][1] > 0.7
    assert known.tokens > noise.tokens
    assert known.tokens + noise.tokens == report.tokens == 21 * LENGTH
    for (_, one), (_, other) in zip(known.shares, noise.shares, strict=True):
        assert one + other == pytest.approx(1)


def test_growth_is_the_loss_on_held_out_windows_over_the_dense_models() -> None:
    dense, model = knowing_model(), knowing_model()
    options = Tune.model_validate({**SAMPLING, "sequences": 12})
    mixture = mixture_of(dense, WINDOWS, SOURCES, options)
    assert mixture is not None
    held_out = range(8, 12)
    before = losses_by_hand(dense, held_out)
    assert mixture.dense == before
    halved(model)
    after = losses_by_hand(model, held_out)
    by_step = {}

    def progress(what: str, done: int, total: int) -> None:
        by_step[done] = losses_by_hand(model, held_out)

    layers = find_linears(model.model)
    report = tune(model, layers, WINDOWS, options, mixture=mixture, progress=progress)
    for source, one in enumerate(report.sources):
        own = [place for place in held_out if place % 2 == source]
        for (done, growth), losses in zip(one.growth, (after, by_step[3]), strict=True):
            assert done in (0, 3)
            expected = sum(losses[place] for place in own) / sum(before[place] for place in own)
            assert growth == pytest.approx(expected, rel=1e-6)


def test_held_out_windows_decide_the_order_and_are_not_trained_on() -> None:
    trained: set[int] = set()
    plain = training._Training._add_gradients

    def watched(self: Any, places: list[int]) -> tuple[float, str]:
        trained.update(places)
        return plain(self, places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "_add_gradients", watched)
        run("tune", sequences=60)
    assert trained == set(range(8))


def test_equal_sampling_tells_the_tokens_of_each_source_and_measures_nothing() -> None:
    _, report = run("tune", sampling="equal", sequences=12)
    assert [one.tokens for one in report.sources] == [6 * LENGTH, 6 * LENGTH]
    assert all(one.growth == one.shares == () for one in report.sources)


def test_the_same_call_gives_the_same_bits_and_the_same_curves() -> None:
    first, again = run("lora"), run("lora")
    assert digest(first[0]) == digest(again[0])
    assert first[1].sources == again[1].sources


def test_lora_shear_recovers_in_two_stages() -> None:
    rules = Recipe.load("lora_shear")
    numbers = rules.recover.options.model_dump() | {"steps": 10, "batch": 2, "held_out": 2}
    fields = rules.model_dump(by_alias=True) | {
        "recover": {"lora": numbers},
        "schedule": {"periods": {"periods": 2, "begin": 0.1, "end": 0.6}},
    }
    outcome = prune(
        knowing_model(), Recipe.model_validate(fields), 0.2, windows=WINDOWS, sources=SOURCES
    )
    known, noise = outcome.trainings[0].sources
    assert known.shares == ((0, 1.0), (8, 0.0)) and noise.shares == ((0, 0.0), (8, 1.0))
    assert (known.tokens, noise.tokens) == (16 * LENGTH, 4 * LENGTH)


# Steps that count for nothing, and stops


def test_a_step_that_is_not_finite_is_told_with_its_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three windows a step: the third step.
    broken_loss(monkeypatch, 7)
    told = r"1 of 7 training steps changed nothing.* step 3 \(1 with text of known"
    with pytest.warns(PruneZeroWarning, match=told):
        _, report = run("tune")
    assert report.skipped == (3,)
    assert isinstance(report.sources[0], SourceReport) and report.sources[0].skipped == 1


@pytest.mark.parametrize("word", ["tune", "lora", "distil"])
def test_a_stopped_training_goes_on_with_the_same_windows(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 2)
    length = {"sequences": 21} if word == "tune" else {"steps": 7}
    rules = recipe(recover={word: {**SAMPLING, **length, "second_stage": 1, "second_from": 0.6}})
    call: dict[str, Any] = {"windows": WINDOWS, "sources": SOURCES}
    whole = knowing_model()
    outcome = prune(whole, rules, 0.5, **call)
    for stop in (1, 5):
        model, folder = knowing_model(), tmp_path / str(stop)
        with pytest.raises(StopError):
            prune(knowing_model(), rules, 0.5, folder=folder, progress=stop_after(stop), **call)
        again = prune(model, rules, 0.5, folder=folder, **call)
        assert digest(model) == digest(whole)
        assert again.trainings[0].sources == outcome.trainings[0].sources
        assert again.trainings[0].losses == outcome.trainings[0].losses


# Refusals


@pytest.mark.parametrize(
    ("numbers", "sources", "told"),
    [
        ({"held_out": 1}, SOURCES, "no window of source 'known' to hold out: .* the last 1;"),
        ({"held_out": 11}, SOURCES, "no window of source 'noise' to train on: it trains on 1 "),
        ({"held_out": 12}, SOURCES, "holds out 12 calibration windows and has 12"),
        ({"second_stage": 2}, SOURCES, "leaves the last 2 sources .* and the text has 2"),
        ({}, SOURCES[:5], "has 12 calibration windows and the sources of 5"),
    ],
)
def test_text_that_cannot_be_sampled_from_is_refused_before_the_work(
    numbers: dict[str, Any], sources: tuple[str, ...], told: str
) -> None:
    rules = recipe(recover={"lora": {**SAMPLING, **numbers}})
    steps: list[int] = []
    with pytest.raises(RecipeError, match=told):
        prune(
            knowing_model(),
            rules,
            0.5,
            windows=WINDOWS,
            sources=sources,
            progress=lambda *step: steps.append(1),
        )
    assert not steps


def test_a_second_stage_needs_sampling_by_degradation() -> None:
    with pytest.raises(RecipeError, match="second_stage 1 needs sampling: degradation"):
        recipe(recover={"lora": {"second_stage": 1}})
    assert Lora().sampling == "equal"
