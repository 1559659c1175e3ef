"""Units that are tried before any goes, against a slow loop of the corrective cycle of HESSO."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunezero.errors import PruneZeroWarning, ScoreError
from prunezero.pruning.outcome import Outcome
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.recipes.word_options import Periods
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.moves import clip_scale
from prunezero.pruning.recovery.periods import PeriodicRemoval
from prunezero.pruning.schedule import cycle_bounds, period_bounds
from tests.pruning.test_periods import chosen, computed, same_again, slow_scores, unit_rows
from tests.pruning.test_while_training import broken_loss
from tests.pruning.trained import TEXT, digest, knowing_model

STEPS, KEPT, GONE = 20, 40, 24
NUMBERS: dict[str, Any] = {"batch": 2, "learning_rate": 0.02}
RECOVERIES: dict[str, dict[str, Any]] = {
    "tune": {"tune": {**NUMBERS, "sequences": 2 * STEPS}},
    "lora": {"lora": {**NUMBERS, "steps": STEPS, "rank": 2}},
    "distil": {"distil": {**NUMBERS, "steps": STEPS}},
}
# Of 20 steps cycles begin after 2, 5 and 8, and the last ends after 11; all is gone after 16.
CYCLES = {"periods": 1, "begin": 0.1, "end": 0.8, "cycles": 3, "cycles_end": 0.55}
BOUNDS = (2, 5, 8, 11)


def rules(word: str = "tune", **changes: Any) -> Recipe:
    schedule = {"periods": {**CYCLES, **changes}}
    recover = RECOVERIES[word]
    return chosen(unit="neuron", compare="group", schedule=schedule, recover=recover)


@dataclass
class Seen:
    """What a training did, by its steps from 0, as numpy in float64."""

    weights: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """that the model computes with, before each step that was finite"""
    moves: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    stepped: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """weights after the step of the optimizer"""
    after: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """and after what followed it"""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen()
    see, act = PeriodicRemoval.see, PeriodicRemoval.act

    def watched_see(self: PeriodicRemoval, trained: Any) -> None:
        found.weights[self.done] = computed(trained)
        scale = clip_scale(trained.masters)
        moves = {
            name: trained.moving(name, self._optimizer, scale)[1]
            for name in found.weights[self.done]
        }
        found.moves[self.done] = {key: one.double().numpy().copy() for key, one in moves.items()}
        see(self, trained)

    def watched_act(self: PeriodicRemoval, trained: Any, done: int, total: int) -> None:
        found.stepped[done - 1] = computed(trained)
        act(self, trained, done, total)
        found.after[done - 1] = computed(trained)

    monkeypatch.setattr(PeriodicRemoval, "see", watched_see)
    monkeypatch.setattr(PeriodicRemoval, "act", watched_act)
    yield found


def rows(values: dict[str, np.ndarray]) -> np.ndarray:
    """All neurons of the tiny model, block after block, [neurons, weights]."""
    return np.concatenate([unit_rows(values, "neuron", block) for block in (0, 1)])


def lowest(scores: np.ndarray) -> set[int]:
    """The units of each block whose scores are lowest, as many as go of it."""
    halves = np.split(scores, 2)
    places = [np.argsort(half, kind="stable")[:GONE] + 64 * at for at, half in enumerate(halves)]
    return set(np.concatenate(places).tolist())


def slow_cycles(seen: Seen, tolerance: int) -> tuple[set[int], int, list[set[int]]]:
    """What goes in the end, the steps done by then, and what was tried; checks every step."""
    free = {("neuron", block): np.ones(64, dtype=bool) for block in (0, 1)}
    tried: list[set[int]] = []
    low: set[int] = set()
    every, start = [], np.zeros(0)
    for step in range(BOUNDS[0], BOUNDS[-1]):
        if step in seen.weights:
            found = slow_scores(seen.weights[step], seen.moves[step], free)
            every.append(np.concatenate(list(found.values())))
            low |= lowest(every[-1])
            if not tried:
                tried, low = [low], set()
                start = rows(seen.weights[step])
            low = {unit for unit in low if not any(unit in some for some in tried)}
        if not tried:
            np.testing.assert_array_equal(rows(seen.after[step]), rows(seen.stepped[step]))
            continue
        end = min(bound for bound in BOUNDS if bound > step)
        left = end - step - 1
        if left:
            factor = np.ones((128, 1))
            factor[list(tried[-1])] = left / (left + 1)
            expected = factor * rows(seen.stepped[step])
            np.testing.assert_allclose(rows(seen.after[step]), expected, rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(rows(seen.after[step]), start)
            if len(low) <= tolerance or end == BOUNDS[-1]:
                return lowest(np.mean(every, 0)), end, tried
            tried, low = [*tried, low], set()
    raise AssertionError("cycles end at the last bound")


def gone_of(outcome: Outcome) -> set[int]:
    """The neurons that went, counted over both blocks."""
    kept = np.concatenate([one.numpy() for _, one in outcome.selection])
    return set(np.flatnonzero(~kept).tolist())


@pytest.mark.parametrize("word", RECOVERIES)
def test_units_are_tried_and_go_as_the_slow_loop_says(word: str, seen: Seen) -> None:
    outcome = prune(knowing_model(), rules(word), GONE / 64, windows=TEXT)
    expected, end, tried = slow_cycles(seen, 0)
    assert gone_of(outcome) == expected
    # Others were tried than those of the first look, and some of these stay.
    assert len(tried) > 1 and tried[1]
    assert expected != tried[0]
    for step in range(end, STEPS):
        left = max(0, 16 - step - 1)
        factor = np.ones((128, 1))
        factor[list(expected)] = left / (left + 1)
        expected_rows = factor * rows(seen.stepped[step])
        np.testing.assert_allclose(rows(seen.after[step]), expected_rows, rtol=1e-5, atol=1e-7)


def test_cycles_end_once_few_enough_units_are_left_to_try(seen: Seen) -> None:
    outcome = prune(knowing_model(), rules(tolerance=127), GONE / 64, windows=TEXT)
    expected, end, tried = slow_cycles(seen, 127)
    assert (end, len(tried)) == (5, 1)
    assert gone_of(outcome) == expected
    # The period begins at once.
    (first,) = {int(one) for one in expected if one == min(expected)}
    np.testing.assert_allclose(
        rows(seen.after[5])[first], 10 / 11 * rows(seen.stepped[5])[first], rtol=1e-5, atol=1e-7
    )


def test_bounds_are_equal_parts_between_begin_and_their_end() -> None:
    options = Periods.model_validate(CYCLES)
    assert cycle_bounds(STEPS, options) == BOUNDS
    assert period_bounds(STEPS, options, behind=8) == (8, 16)
    assert period_bounds(STEPS, options) == (2, 16)


def test_more_cycles_than_steps_are_as_many_as_there_are_steps() -> None:
    outcome = prune(knowing_model(), rules(cycles=50), GONE / 64, windows=TEXT)
    assert outcome.sparsity_reached == GONE / 64


def test_later_periods_go_by_the_same_means(seen: Seen) -> None:
    outcome = prune(knowing_model(), rules(periods=2), GONE / 64, windows=TEXT)
    expected, end, _ = slow_cycles(seen, 0)
    assert gone_of(outcome) == expected
    half = end + (16 - end) // 2
    gone = [int((~rows(seen.after[step]).any(1)).sum()) for step in range(end, STEPS)]
    assert gone == [0] * (half - 1 - end) + [GONE] * (16 - half) + [2 * GONE] * (STEPS - 15)


def test_hesso_cric_takes_out_what_is_asked_for() -> None:
    published = Recipe.load("hesso_cric")
    numbers = {**published.recover.options.model_dump(), "sequences": 40, "batch": 2}
    outcome = prune(
        knowing_model(),
        chosen(
            recover={"tune": numbers},
            schedule={"periods": published.schedule.options.model_dump()},
        ),
        0.2,
        windows=TEXT,
    )
    assert 0.2 - 3 * 32 / outcome.total < outcome.sparsity_reached <= 0.2


# Steps that count for nothing, and stops


def test_steps_that_are_not_finite_are_no_part_of_the_means(
    monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    # Two windows a step: the third step, before which the first cycle begins, and the seventh.
    broken_loss(monkeypatch, 4, 12)
    with pytest.warns(PruneZeroWarning, match="2 of 20 training steps changed nothing"):
        outcome = prune(knowing_model(), rules(), GONE / 64, windows=TEXT)
    assert outcome.trainings[0].skipped == (3, 7)
    assert sorted(seen.weights) == [step for step in range(STEPS) if step not in (2, 6)]
    assert gone_of(outcome) == slow_cycles(seen, 0)[0]


def test_scores_that_rank_nothing_are_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, count = rules(), iter(range(1000))
    plain = type(fitted.unit.row).scores

    def scores(self: Any, *given: Any, **numbers: Any) -> Any:
        if next(count) == 0:
            raise ScoreError("they rank nothing")
        return plain(self, *given, **numbers)

    monkeypatch.setattr(type(fitted.unit.row), "scores", scores)
    with pytest.warns(PruneZeroWarning, match="1 training steps gave scores that rank no units"):
        outcome = prune(knowing_model(), fitted, GONE / 64, windows=TEXT)
    assert outcome.sparsity_reached == GONE / 64


# The same in 12 steps: cycles end after 4 and 6, and all is gone after 10.
SHORT = {"periods": {**CYCLES, "begin": 0.17, "cycles": 2, "cycles_end": 0.5, "end": 0.84}}


@pytest.mark.parametrize("word", ["tune", "lora"])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_stopped_training_goes_on_to_the_same_bits(
    stop: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    length = {"sequences": 24} if word == "tune" else {"steps": 12}
    fitted = chosen(schedule=SHORT, recover={word: {**NUMBERS, **length}})
    whole, model = same_again(fitted, stop, tmp_path)
    assert digest(model) == digest(whole)


def killed_or_whole(folder: Path | None, kill_at: int = 0) -> tuple[str, Any]:
    """The digest of a model that units left by cycles, on text of two sources, and its curves."""
    sampling = {"sampling": "degradation", "measure_every": 2, "held_out": 2, "second_stage": 1}
    numbers = {**NUMBERS, "steps": 12, **sampling}
    fitted = chosen(schedule=SHORT, recover={"lora": numbers})

    def kill(what: str, done: int, total: int) -> None:
        if "tuning" in what and done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    model, sources = knowing_model(), ("a", "b") * 3
    outcome = prune(model, fitted, 0.5, windows=TEXT, sources=sources, folder=folder, progress=kill)
    return digest(model), outcome.trainings[0].sources


def kill_in_cycles(folder: Path) -> None:
    """Print whether runs that were killed in a cycle and in a period end as one that was not."""
    training.KEEP_EVERY = 2
    whole = killed_or_whole(None)
    for kill_at in (5, 9):
        child = os.fork()
        if not child:
            killed_or_whole(folder / str(kill_at), kill_at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        print(killed_or_whole(folder / str(kill_at)) == whole)


def test_a_killed_training_by_cycles_on_two_sources_ends_in_the_same_bits(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.pruning.test_corrective import kill_in_cycles\n"
        "kill_in_cycles(Path(sys.argv[1]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert run.stdout.split() == ["True", "True"]
