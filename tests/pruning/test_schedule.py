from __future__ import annotations

import pytest

from prunezero.pruning.recipes.word_options import Iterative, Options
from prunezero.pruning.schedule import iterative, one_shot


def test_one_shot_is_one_step() -> None:
    assert one_shot(0.55, Options()) == (0.55,)


def test_linear_steps_are_equally_large() -> None:
    assert iterative(0.6, Iterative(steps=4, shape="linear")) == (0.15, 0.3, 0.45, 0.6)


def test_cubic_steps_remove_most_at_first() -> None:
    # 1 - (3/4)^3 = 37/64, 1 - (1/2)^3 = 7/8, 1 - (1/4)^3 = 63/64
    assert iterative(0.64, Iterative(steps=4)) == (0.37, 0.56, 0.63, 0.64)


def test_steps_are_rounded_down_to_four_digits_but_the_last_is_exact() -> None:
    assert iterative(0.123456, Iterative(steps=2, shape="linear")) == (0.0617, 0.123456)


def test_decimals_are_taken_as_they_read() -> None:
    # 0.58 / 2 is 0.29 in decimals, but 0.58 * 5000 is just below 2900 in floating point.
    assert iterative(0.58, Iterative(steps=2, shape="linear")) == (0.29, 0.58)


@pytest.mark.parametrize("sparsity", [0.0, 1e-05, 0.0002, 0.1, 0.29996, 0.5, 0.7, 0.999999])
@pytest.mark.parametrize("shape", ["linear", "cubic"])
@pytest.mark.parametrize("steps", [2, 3, 7, 100])
def test_sparsities_grow_and_end_at_the_one_asked_for(
    sparsity: float, shape: str, steps: int
) -> None:
    reached = iterative(sparsity, Iterative.model_validate({"steps": steps, "shape": shape}))
    assert reached[-1] == sparsity
    assert len(reached) <= steps
    assert all(earlier < later for earlier, later in zip(reached, reached[1:], strict=False))
    assert min(reached) > 0 or sparsity == 0


def test_steps_that_would_remove_nothing_more_are_left_out() -> None:
    assert iterative(0.0, Iterative()) == (0.0,)
    assert iterative(0.0002, Iterative(steps=4, shape="linear")) == (0.0001, 0.0002)
