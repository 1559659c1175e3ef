"""The training loop: looks at held-out windows, steps that are not finite, and interruptions."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunezero.errors import OutputError, PruneZeroWarning, RecipeError
from prunezero.models.anatomy.linears import find_linears
from prunezero.models.loading.language_model import LanguageModel
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.training_options import Lora, Tune
from prunezero.pruning.recovery import training
from prunezero.pruning.recovery.objectives import NextToken
from prunezero.pruning.recovery.training import Choices, TrainingReport, train
from prunezero.pruning.recovery.weights import train_weights
from prunezero.pruning.recovery.words import lora, tune
from tests.pruning.trained import (
    TEXT,
    StopError,
    digest,
    halved,
    knowing_model,
    recipe,
    stop_after,
)
from tests.tiny_models import tiny_batches, tiny_model

LOOKING: dict[str, Any] = {"batch": 2, "patience": 2, "every": 2, "held_out": 2}


def weights_of(model: LanguageModel) -> list[Tensor]:
    return [layer.weight.clone() for layer in find_linears(model.model)]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def test_training_stops_when_held_out_windows_get_no_better_and_keeps_the_best() -> None:
    # Two windows that the model knows are held out, and noise is learned, quickly.
    windows = torch.cat([tiny_batches(4, 12, seed=7), TEXT[:2]])
    model = halved(knowing_model())
    options = Tune.model_validate({**LOOKING, "sequences": 80, "learning_rate": 0.03})
    by_step = {0: weights_of(model)}
    report = tune(
        model,
        find_linears(model.model),
        windows,
        options,
        progress=lambda what, done, total: by_step.update({done: weights_of(model)}),
    )
    losses = [loss for _, loss in report.looks]
    best = losses.index(min(losses))
    assert [done for done, _ in report.looks] == list(range(0, 2 * len(losses), 2))
    # The second look without news ends it, long before the last of 40 steps.
    assert len(losses) == best + 3 and len(report.losses) == 2 * (best + 2) < 40
    assert report.kept_step == 2 * best
    assert report.tokens == 2 * len(report.losses) * 12
    assert are_equal(weights_of(model), by_step[2 * best])
    assert not are_equal(weights_of(model), by_step[len(report.losses)])


def test_what_is_measured_is_what_is_left() -> None:
    model = halved(knowing_model())
    options = Lora.model_validate(
        {**LOOKING, "steps": 6, "learning_rate": 0.01, "dropout": 0.1, "every": 3}
    )
    # What is held out is trained on too, so that it gets better.
    windows = torch.cat([TEXT[:2], TEXT[:2]])
    report = lora(model, find_linears(model.model), windows, options)
    assert report.kept_step
    with torch.no_grad():
        losses = [float(NextToken().loss(model.model, ids, 0)) for ids in TEXT[:2]]
    assert min(loss for _, loss in report.looks) == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_held_out_windows_are_not_trained_on() -> None:
    reports = []
    for last in (TEXT[-2:], tiny_batches(2, 12, seed=5)):
        model = halved(knowing_model())
        options = Tune.model_validate({**LOOKING, "sequences": 12, "patience": 100})
        windows = torch.cat([TEXT[:-2], last])
        reports.append(tune(model, find_linears(model.model), windows, options))
    assert reports[0].losses == reports[1].losses
    assert reports[0].looks != reports[1].looks


def test_fewer_windows_may_be_trained_on() -> None:
    digests = []
    for windows, number in ((TEXT, 2), (TEXT[:2], 0)):
        model = halved(knowing_model())
        options = Tune(windows=number, sequences=6)
        tune(model, find_linears(model.model), windows, options)
        digests.append(digest(model))
    assert digests[0] == digests[1]


def test_text_that_is_all_held_out_is_refused_before_the_work() -> None:
    told: list[str] = []
    chosen = recipe(recover={"tune": {"patience": 1, "held_out": 6}})
    said = "recover tune holds out 6 calibration windows and has 6, so none is left to train on"
    with pytest.raises(RecipeError, match=said):
        prune(knowing_model(), chosen, 0.5, windows=TEXT, progress=lambda *step: told.append("any"))
    assert not told


class _Faulty:
    """The next-token loss, but for some calls, counted from 1, that spoil it."""

    def __init__(self, calls: set[int], *, is_smooth: bool) -> None:
        self._calls, self._is_smooth, self._count = calls, is_smooth, 0

    def loss(self, model: Any, ids: Tensor, place: int) -> Tensor:
        self._count += 1
        loss = NextToken().loss(model, ids, place)
        if self._count not in self._calls:
            return loss
        # A root is 0 at 0, where its slope is infinite.
        return loss * math.nan if self._is_smooth else loss + (loss - loss.detach()).sqrt()


def run_faulty(calls: set[int], *, is_smooth: bool) -> tuple[TrainingReport, list[list[Tensor]]]:
    model = halved(knowing_model())
    by_step = [weights_of(model)]
    report = train(
        model,
        find_linears(model.model),
        TEXT,
        Tune(sequences=12, batch=2, learning_rate=0.01),
        Choices(_Faulty(calls, is_smooth=is_smooth), train_weights),
        progress=lambda *step: by_step.append(weights_of(model)),
    )
    return report, by_step


@pytest.mark.parametrize("is_smooth", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(is_smooth: bool) -> None:
    # The second sequence of the third step, so a gradient of the first one is there already.
    with pytest.warns(PruneZeroWarning, match="1 of 6 training steps changed nothing.* step 3"):
        report, by_step = run_faulty({6}, is_smooth=is_smooth)
    assert report.skipped == (3,)
    assert math.isnan(report.losses[2]) == is_smooth
    assert are_equal(by_step[2], by_step[3])
    assert not are_equal(by_step[3], by_step[4])
    assert all(bool(torch.isfinite(weight).all()) for weight in by_step[-1])


def test_too_many_such_steps_or_one_at_the_end_are_refused() -> None:
    # A step with a fault looks at no further sequence.
    with pytest.raises(RecipeError, match="step 4 of 6: the loss is nan"):
        run_faulty({3, 4, 5}, is_smooth=True)
    with pytest.raises(RecipeError, match="step 6 of 6: the norm of the gradients is"):
        run_faulty({11}, is_smooth=False)


RESUMED: dict[str, dict[str, Any]] = {
    "lora": {"lora": {**LOOKING, "steps": 7, "dropout": 0.3, "patience": 100}},
    "distil": {"distil": {**LOOKING, "steps": 7, "top": 4, "learning_rate": 0.02}},
    "distil through lora": {"distil": {**LOOKING, "steps": 7, "through": "lora", "states": 1.0}},
}


def run_recipe(word: str, folder: Path | None, progress: Any = None) -> tuple[str, Any]:
    """The digest of a model that is pruned and recovers, and how its training went."""
    model = knowing_model()
    outcome = prune(
        model, recipe(recover=RESUMED[word]), 0.6, windows=TEXT, folder=folder, progress=progress
    )
    (report,) = outcome.trainings
    return digest(model), (report.losses, report.looks, report.kept_step)


@pytest.mark.parametrize("word", RESUMED)
def test_a_recovery_goes_on_after_any_step_and_ends_in_the_same_bits(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 3)
    whole = run_recipe(word, None)
    last = len(whole[1][0])
    # One of the trainings ends before its steps do.
    assert last == (4 if word == "distil" else 7)
    for steps in (1, 3, 4):
        folder = tmp_path / str(steps)
        with pytest.raises(StopError):
            run_recipe(word, folder, stop_after(steps))
        torch.manual_seed(steps)
        done: list[int] = []

        def tell(what: str, place: int, total: int, done: list[int] = done) -> None:
            done += [place] if "tuning" in what else []

        assert run_recipe(word, folder, tell) == whole
        kept = steps if steps == last else steps // 3 * 3
        assert done == list(range(kept + 1, last + 1))


def kill_in_training(folder: Path) -> None:
    """Print digests of an undisturbed run, and of one that was killed in its fifth step."""
    training.KEEP_EVERY = 2
    print(run_recipe("lora", None)[0])

    def kill(what: str, done: int, total: int) -> None:
        if "tuning" in what and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        run_recipe("lora", folder, kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(run_recipe("lora", folder)[0])


def test_a_killed_recovery_ends_in_the_same_bits(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.pruning.test_training import kill_in_training\n"
        "kill_in_training(Path(sys.argv[1]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    whole, taken_up = run.stdout.split()
    assert whole == taken_up


def test_a_checkpoint_of_other_numbers_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "training", tiny_model()
    layers = find_linears(model.model)
    for rank, refused in ((2, False), (3, True)):
        chosen = Lora(steps=1, rank=rank)
        if refused:
            with pytest.raises(OutputError, match="is of another tuning .*rank: 2, now 3"):
                lora(model, layers, TEXT, chosen, checkpoint=path)
        else:
            with pytest.raises(StopError):
                lora(model, layers, TEXT, chosen, checkpoint=path, progress=stop_after(1))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"patience": -1}, "patience: .*greater than or equal to 0"),
        ({"every": 0}, "every: .*greater than or equal to 1"),
        ({"held_out": 0}, "held_out: .*greater than or equal to 1"),
        ({"windows": -1}, "windows: .*greater than or equal to 0"),
        ({"steps": 4}, "'tune.steps' is not a known number"),
    ],
)
def test_bad_numbers_are_refused_when_the_recipe_is_read(
    numbers: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(recover={"tune": numbers})
