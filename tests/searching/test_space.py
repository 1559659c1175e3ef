"""A space holds what its rules may look at, and nothing dearer, wherever that was said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from prunezero.errors import RecipeError
from prunezero.formula.feature_row import WEIGHT_SIGNALS
from prunezero.formula.features import FEATURES
from prunezero.pruning.recipes.documents import validated, write_document
from prunezero.pruning.requirements import dense_sums
from prunezero.searching.experiment.baselines import baselines
from prunezero.searching.proxies.samples import rung_sums
from prunezero.searching.spaces.space import SearchSpace, search_spaces
from prunezero.searching.spaces.space_choices import signal_of
from tests.searching.testbed import make_task

# Sums that only a backward pass gives.
GRADIENTS = {name for row in FEATURES.values() if row.cost == "gradients" for name in row.sums}


def written(path: Path, **changes: Any) -> Path:
    """The space `pipeline` in a file, with some keys changed."""
    write_document({**SearchSpace.load("pipeline").model_dump(mode="json"), **changes}, path)
    return path


@pytest.mark.parametrize("signals", WEIGHT_SIGNALS)
@pytest.mark.parametrize("name", search_spaces())
def test_nothing_in_a_space_looks_at_dearer_signals_than_were_asked_for(
    name: str, signals: str
) -> None:
    whole, space = SearchSpace.load(name), SearchSpace.load(name, signals=signals)
    allowed = WEIGHT_SIGNALS[: WEIGHT_SIGNALS.index(signals) + 1]
    assert [one.text for one in space.terminals] == (
        [one.text for one in whole.terminals if one.signal in allowed]
    )
    assert all(
        signal_of(key, value, whole.unit) in allowed
        for key, values in space.choices.items()
        for value in values
    )
    assert space.costliest_signal in allowed
    # What is kept of it is read back to the same, and nothing comes back.
    assert SearchSpace.model_validate(space.model_dump(mode="json")) == space


def test_without_gradients_none_are_collected_for_anybody() -> None:
    space = SearchSpace.load("pipeline", signals="activations")
    task = make_task(space, 0.5)
    sums = rung_sums(space.features, with_gradients=space.weighted_by_gradient)
    sums |= dense_sums([*space.examples("free"), *baselines(task)])
    assert not sums & GRADIENTS
    assert all(seed.criterion.signal in ("none", "activations") for seed in task.seeds)
    whole = SearchSpace.load("pipeline")
    assert rung_sums(whole.features, with_gradients=whole.weighted_by_gradient) & GRADIENTS


def test_choices_that_need_gram_matrices_go_with_them(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.yaml",
        choices={
            "allocate": ["uniform", "owl", "sensitivity", "heavy_tail"],
            "update": [["none"], ["obs"], ["dsnot", "bias"], ["swaps", "bias"]],
            "damping": [0.01, 0.1],
        },
    )
    chosen = {
        signals: SearchSpace.load(path, signals=signals).choices for signals in WEIGHT_SIGNALS
    }
    assert chosen["none"] == {"allocate": ("uniform", "heavy_tail"), "update": (["none"],)}
    assert chosen["activations"] == {
        "allocate": ("uniform", "owl", "heavy_tail"),
        "update": (["none"], ["dsnot", "bias"]),
    }
    assert chosen["gradients"]["allocate"] == ("uniform", "owl", "sensitivity", "heavy_tail")
    assert set(chosen["second order"]) == {"allocate", "update", "damping"}


def test_a_file_may_say_it_and_the_option_stands_in_for_it(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", signals="activations")
    space = SearchSpace.load(path)
    assert (space.signals, space.costliest_signal) == ("activations", "activations")
    assert not space.weighted_by_gradient
    assert SearchSpace.load(path, signals="none").features == ("W", "R1", "C1", "R2", "C2")
    # The file holds its terminals still.
    assert "G" in SearchSpace.load(path, signals="gradients").features


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"terminals": ["G", "X"], "signals": "activations"}, "terminals: none that varies .*'act"),
        ({"terminals": ["X", "R1"]}, "terminals: none varies by weight"),
        ({"signals": "activation"}, "signals: 'activation' is no signal; did you mean 'activ"),
        ({"signals": None}, "signals"),
    ],
)
def test_a_space_with_nothing_left_or_an_unknown_signal_is_one_sentence(
    change: dict[str, object], complaint: str
) -> None:
    fields = SearchSpace.load("formulas").model_dump(mode="json") | change
    with pytest.raises(RecipeError, match=complaint) as refused:
        validated(SearchSpace, fields, "mine.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", search_spaces())
def test_a_space_travels_to_workers_with_all_its_terminals(name: str) -> None:
    space = SearchSpace.load(name)
    assert pickle.loads(pickle.dumps(space)) == space
