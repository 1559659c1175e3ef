"""Text from outside is read through a whitelist, and nothing in it is ever run."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from prunezero.errors import CriterionError
from prunezero.formula import Criterion
from prunezero.searching.spaces.space import SearchSpace

CANARY = Path("/tmp/prunezero-canary")

HOSTILE = [
    "__import__('os').system('touch /tmp/prunezero-canary')",
    "().__class__.__bases__[0].__subclasses__()",
    "W.__class__",
    "W.real",
    "W[0]",
    "W[:, 0]",
    "lambda: W",
    "(lambda x: x)(W)",
    "[W for W in (1,)]",
    "{W: X}",
    "{W, X}",
    "(W, X)",
    "[W]",
    "f'{W}'",
    'f\'{__import__("os").system("touch /tmp/prunezero-canary")}\'',
    "'W'",
    "b'W'",
    "(W := X)",
    "W if X else G",
    "W and X",
    "not W",
    "W < X",
    "W @ X",
    "W // X",
    "W % X",
    "W << 2",
    "~W",
    "abs(*W)",
    "abs(x=W)",
    "abs(**W)",
    "abs()",
    "abs(W, X)",
    "open('/etc/passwd')",
    "eval('W')",
    "exec('W')",
    "print(W)",
    "True * W",
    "None",
    "...",
    "1j * W",
    "W; X",
    "W = X",
    "import os",
    "await W",
    "yield",
    "",
    "   ",
    "Ｗ * X",  # noqa: RUF001
    "W\x00X",
    "abs(W) * Q",
    "max(W, X)",
    "minmax",
    "abs.__call__(W)",
    "sympy.Symbol('W')",
]
EXPLODING = [
    "9**9**9*W",
    "W**1000",
    "W**X",
    "1e400*W",
    "2**40*W",
    "W*1" + "0" * 300,
    "(W+X)**-9",
    "W**(2**9)",
    "((W**8)**8)",
]
NOT_FINITE = ["1/0 + W", "W/(1-1)", "W*0**-1", "(0*X)*W + 1/(1-1)", "W**(1/0)"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_formula_is_refused_and_never_run(text: str) -> None:
    CANARY.unlink(missing_ok=True)
    with pytest.raises(CriterionError):
        Criterion.parse(text)
    assert not CANARY.exists()


@pytest.mark.parametrize("text", EXPLODING)
def test_an_exploding_constant_or_exponent_is_refused_at_once(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(CriterionError):
        Criterion.parse(text)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("text", NOT_FINITE)
def test_constants_that_are_not_finite_are_refused(text: str) -> None:
    with pytest.raises(CriterionError):
        Criterion.parse(text)


def test_a_tower_of_exponentials_folds_in_floats_and_is_refused() -> None:
    with pytest.raises(CriterionError, match="too large"):
        Criterion.parse("W * exp(exp(exp(99999)))")


def test_roots_and_logarithms_of_negative_constants_see_the_absolute_value() -> None:
    assert Criterion.parse("W*sqrt(0-4)").text == "2*W"
    assert Criterion.parse("W*log(0)").text.startswith("-27.63")


@pytest.mark.parametrize(
    "text",
    [
        "W" * 1_000_000,
        "(" * 300 + "W" + ")" * 300,
        "-" * 3000 + "W",
        "-" * 400 + "W",
        "+".join(["W"] * 4000),
        "+".join(["W"] * 200),
        "abs(" * 60 + "W" + ")" * 60,
    ],
)
def test_a_huge_or_deep_formula_is_one_clear_error_in_bounded_memory(text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CriterionError) as caught:
        Criterion.parse(text)
    assert len(str(caught.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_misspelt_word_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(CriterionError, match="did you mean 'abs'"):
        Criterion.parse("abss(W)")
    with pytest.raises(CriterionError, match="did you mean 'X_rms'"):
        Criterion.parse("W * X_rm")


def test_numbers_of_every_usual_form_are_read() -> None:
    assert Criterion.parse("1e-3*W + .5*X + 2.*G").text == "0.001*W + 2*G + 0.5*X"


@pytest.mark.parametrize("text", ["W*1" + "0" * 400, "W**1" + "0" * 400, "W*0x" + "f" * 400])
def test_an_integer_beyond_every_float_is_too_large_like_any_other(text: str) -> None:
    with pytest.raises(CriterionError, match="too large"):
        Criterion.parse(text)


def test_an_operator_as_a_feature_and_a_feature_as_an_operator_are_told_apart() -> None:
    with pytest.raises(CriterionError, match=r"'abs' is an operator; write abs\(x\)"):
        Criterion.parse("abs * W")
    with pytest.raises(CriterionError, match=r"'W' is a feature .* W \* "):
        Criterion.parse("W(X)")


def test_a_formula_that_was_built_is_refused_when_its_own_text_could_not_be_read() -> None:
    features = "W R1 C1 R2 C2 X X_ms X_rms X_mean X_var Y G G1 D".split()
    symbols = [Criterion.parse(name).sympy for name in features]
    long = sum(symbols) + sum(symbol**2 for symbol in symbols)
    with pytest.raises(CriterionError, match="nested at most 16 deep"):
        Criterion.from_sympy(long)
    short = Criterion.from_sympy(sum(symbols))
    assert Criterion.parse(short.text) == short


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "norm"])
def test_words_of_formulas_that_were_saved_before_are_read(kind: str) -> None:
    before = Criterion.parse(f"abs(W)/layer_{kind}(W**2)")
    assert before == Criterion.parse(f"abs(W)/matrix_{kind}(W**2)")
    assert before.text == f"abs(W)/matrix_{kind}(W**2)"


def test_a_search_space_that_was_saved_before_is_read() -> None:
    fields = {"name": "older", "terminals": ["abs(W)"], "glanced": 3}
    older = SearchSpace.model_validate(
        {**fields, "operators": ["mul", "exp", "layer_norm"], "forbid": {"exp": ["layer_norm"]}}
    )
    assert older.operators == ("mul", "exp", "matrix_norm") and older.quick_kl == 3
    assert older.forbid == {"exp": ("matrix_norm",)}
    assert "glanced" not in older.model_dump()
