"""A formula means its simplified form: its text, but at points that docs/formulas.md names."""

from __future__ import annotations

import random
import time
import warnings

import pytest
import torch

from prunezero.errors import CriterionError, FormulaWarning
from prunezero.formula import Criterion
from prunezero.formula.ranking import ranking_form
from prunezero.scoring.score import evaluate
from tests.formula.as_typed import compare_many
from tests.formula.grammar import random_text


def test_random_formulas_have_the_values_of_their_text_on_seven_kinds_of_layers() -> None:
    totals, faults = compare_many(250, seed=1)
    assert not faults, "\n".join(faults)
    compared = totals["equal"]
    excused = sum(count for name, count in totals.items() if "float32" in name or "told" in name)
    assert totals["formulas"] > 180 and compared > 60_000
    assert excused < 0.05 * compared and totals["rounding decides"] < 0.1 * compared


@pytest.mark.parametrize(
    ("typed", "read", "where"),
    [
        ("abs(W)*exp(-log(X))", "abs(W)/X", "log sees less than 1e-12"),
        ("abs(W)*X/X", "abs(W)", "divided by itself is 0"),
        ("abs(W)/exp(X)", "abs(W)*exp(-X)", "exp sees more than 80"),
        ("sqrt(exp(X))/abs(W)", "exp(0.5*X)/abs(W)", "exp sees more than 80"),
        ("log(exp(W))", "W", "exp sees more than 80, or log less"),
        ("W*row_sum(R1*X/X)", "W*R1", "the count of what is summed"),
        ("W*row_sum(R1*X**0)", "W*R1", "the count of what is summed"),
    ],
)
def test_a_reader_is_told_where_the_simplified_form_differs(
    typed: str, read: str, where: str
) -> None:
    with pytest.warns(FormulaWarning, match=where) as told:
        assert Criterion.parse(typed).text == read
    assert len(told) == 1 and f"is read as {read}," in str(told[0].message)


@pytest.mark.parametrize(
    "typed",
    [
        "X*abs(W)",
        "sqrt(W**2)*X",
        "W**3/W",
        "(1 + X)*W/(1 + X)",
        "exp(-X)*abs(W)",
        "W - W + X*W",
        "exp(-X)*exp(-Y)*W",
        "exp(-X)**2*W",
    ],
)
def test_nothing_is_told_where_the_value_stays(typed: str) -> None:
    Criterion.parse(typed)  # warnings are errors


def test_a_power_of_a_product_stays_within_float32_where_its_factors_would_not() -> None:
    small, large = torch.tensor([[1e-6, 2e-6]]), torch.tensor([[1e6, 1e6]])
    for text, expected in (
        ("(W*X)**8", [1, 256]),
        ("(W*X)**2", [1, 4]),
        ("sqr(sqr(sqr(W*X)))", [1, 256]),
        ("1/(W*X)**8", [1, 2**-8]),
        ("(1e-6*X)**8*W", [1e-6, 2e-6]),
    ):
        found = evaluate(Criterion.parse(text), {"W": small, "X": large}, (1, 2))
        assert found.tolist()[0] == pytest.approx(expected, rel=1e-5), text


def test_what_is_saved_can_be_read_back() -> None:
    assert Criterion.parse("100000*W/0.3").text == "333333.333333*W"
    read = 0
    for seed in range(800):
        rng = random.Random(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FormulaWarning)
                criterion = Criterion.parse(random_text(rng, rng.randint(1, 4)))
        except CriterionError:
            continue
        read += 1
        again = Criterion.parse(criterion.text)  # and nothing more is told of it
        assert (again, again.sympy) == (criterion, criterion.sympy)
    assert read > 500


@pytest.mark.parametrize(
    "text",
    [
        "((((((((2*X)**8)**8)**8)**8)**8)**8)**8)**8",
        "sqr(W-tanh(exp((10*X)**8)*sqrt(G/R1)))",
        "tanh((W**1.5 + (2 - X))**(-8))**0.25",
        "(divide_by_norm(2, X_mean**0.1) + ((W*X)**2)**1.5)**0.5",
        "sqrt(abs(" + "-".join(f"({name}+W)**-8" for name in ("X", "G", "Y", "R1", "C1")) + "))",
        "(999999.5*X)**0.123457*(0.000123457*G)**(-7.654321)*W",
        "abs(abs(abs(abs(W-X)-Y)-G)-R1)**0.3",
        "exp(" * 14 + "W" + ")" * 14,
        "log(abs(tanh(W-(X-(Y-(G-(R1-(C1-(D-F)**3)**3)**3)**3)**3))))**7",
    ],
)
def test_what_once_hung_is_read_or_refused_in_milliseconds(text: str) -> None:
    begin = time.process_time()
    try:
        criterion = Criterion.parse(text)
        ranking_form(criterion.sympy, "row")
        assert criterion.latex and Criterion.parse(criterion.text) == criterion
    except CriterionError as error:
        assert len(str(error)) < 300
    assert time.process_time() - begin < 0.5


def test_a_tree_of_pruner_zero_has_the_limits_of_text() -> None:
    def grown(depth: int) -> dict[str, object]:
        if depth == 0:
            return {"data": "W"}
        return {"data": "add", "left": grown(depth - 1), "right": {"data": "X"}}

    def full(depth: int) -> dict[str, object]:
        side = full(depth - 1) if depth else None
        return {"data": "add" if depth else "X", "left": side, "right": side}

    Criterion.from_pruner_zero(grown(7))
    with pytest.raises(CriterionError, match="at most 16 deep"):
        Criterion.from_pruner_zero(grown(20))
    begin = time.process_time()
    with pytest.raises(CriterionError, match="at most 96 nodes"):
        Criterion.from_pruner_zero(full(14))
    assert time.process_time() - begin < 0.5
