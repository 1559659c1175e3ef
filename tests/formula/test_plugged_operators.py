"""An operator of another package is a word like ours; a bad one is an error where it is used."""

from __future__ import annotations

import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from prunezero.cli.listing import LISTS
from prunezero.errors import CriterionError, RecipeError
from prunezero.formula import FEATURES, OPERATORS, Criterion, plugins
from prunezero.formula.functions import elementwise_function
from prunezero.formula.plugins import GROUP
from prunezero.formula.ranking import ranking_form
from prunezero.formula.vocabulary import Operator, elementwise
from prunezero.pruning.recipes.documents import validated
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page import write_pruner
from prunezero.scoring.columns import sees_inputs_alone
from prunezero.scoring.fused import fused_score
from prunezero.scoring.kernels.source import plan
from prunezero.scoring.score import evaluate
from prunezero.searching.spaces.space import SearchSpace
from prunezero.searching.strategies.enumeration import Blocks
from prunezero.searching.strategies.genetics import cross, mutate, random_criterion, tunable
from tests.report.recipes import recipe_of

# Triton decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SIGMOID = elementwise(
    "sigmoid",
    "torch.sigmoid({0})",
    meaning="logistic function",
    triton="1.0 / (1.0 + tl.exp(-{0}))",
    sign="nonnegative",
)
ASINH = elementwise("asinh", "torch.asinh({0})", meaning="area sine", sign="as argument")
SIN = elementwise("sin", "torch.sin({0})", meaning="sine")
INT = elementwise("int", "torch.round({0})", meaning="Python has the word, formulas not")
_exp, _row_sum = OPERATORS["exp"].build, OPERATORS["row_sum"].build
SWISH = Operator("swish", 1, "swish(x)", "x times its sigmoid", lambda x: x / (1 + _exp(-x)))
SHARE = Operator("share", 2, "share(x, y)", "x by the row's sum of y", lambda x, y: x / _row_sum(y))
GOOD = {"sigmoid": SIGMOID, "asinh": ASINH, "sin": SIN, "int": INT, "swish": SWISH}
GOOD |= {"share": SHARE}

BAD: dict[str, tuple[Any, str]] = {
    "plain": ({}, "is a dict, not an Operator"),
    "other_name": (SIGMOID, "calls itself 'sigmoid'"),
    "no_text": (
        Operator("no_text", 1, "no_text(x)", "", elementwise_function("no_text", "any")),
        "it has no torch text",
    ),
    "foreign": (Operator("foreign", 1, "", "", sympy.erf), "it builds 'erf', which is no word"),
    "ternary": (Operator("ternary", 3, "", "", lambda x, y, z: x), "takes 1 or 2 values"),
    "signed": (replace(SWISH, name="signed", sign="positive"), "has the sign 'positive'"),
    "failing": (Operator("failing", 1, "", "", lambda: 1), "cannot be built: TypeError"),
    "python": (Operator("python", 1, "", "", lambda x: 0.5), "builds a float"),
    "unread": (replace(SWISH, name="unread", torch="torch.abs({0})"), "which nobody would read"),
    "inside": (
        Operator("inside", 1, "", "", lambda x: 2 * elementwise_function("inside", "any")(x)),
        "builds itself inside another",
    ),
    "imports": (elementwise("imports", "mine.f({0})", meaning=""), "names nothing else than torch"),
    "numpy": (
        elementwise("numpy", "torch.abs({0})", meaning="", triton="torch.abs({0})"),
        "names nothing else than tl",
    ),
    "commented": (elementwise("commented", "torch.abs({0}) # x", meaning=""), "is no expression"),
    "broken_line": (
        elementwise("broken_line", "{0}\n    + torch.sin({0})", meaning=""),
        "is no expression",
    ),
    "unclosed": (elementwise("unclosed", "torch.abs({0}", meaning=""), "is no expression"),
    "valueless": (elementwise("valueless", "torch.ones(1)", meaning=""), "is no expression"),
    "unfilled": (elementwise("unfilled", "torch.abs({x})", meaning=""), "is no expression"),
}
HERE = "tests.formula.test_plugged_operators"
Plug = Callable[..., None]


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes entry points, `name=value`, all that are installed."""

    def installed(*points: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, GROUP) for name, value in points]
        monkeypatch.setattr(plugins, "entry_points", lambda group: found)
        monkeypatch.setattr(OPERATORS, "_loaded", {})
        plugins._points.cache_clear()

    yield installed
    plugins._points.cache_clear()


@pytest.fixture
def good(plug: Plug) -> None:
    """The good operators of this file, installed."""
    plug(*((name, f"{HERE}:{name.upper()}") for name in GOOD))


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 24, generator=generator)
    return {"W": weight, "X": torch.rand(1, 24, generator=generator)}


def value(text: str) -> torch.Tensor:
    criterion = Criterion.parse(text)
    features = {name: values()[name] for name in criterion.features}
    return evaluate(criterion, features, values()["W"].shape)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("sigmoid(X * W)", "sigmoid(W*X)"),
        ("abs(sigmoid(W)) * X", "sigmoid(W)*X"),
        ("abs(asinh(X)) * W", "W*asinh(X)"),
        ("abs(asinh(W))", "abs(asinh(W))"),
        ("sigmoid(W + W) ** 0.5", "sqrt(sigmoid(2*W))"),
        ("2/int(sin(W)) - X", "2/int(sin(W)) - X"),
        ("swish(W)", "W/(1 + exp(-W))"),
        ("share(abs(W), sigmoid(W))", "abs(W)/row_sum(sigmoid(W))"),
    ],
)
@pytest.mark.usefixtures("good")
def test_its_word_is_read_simplified_and_printed(written: str, canonical: str) -> None:
    criterion = Criterion.parse(written)
    assert criterion.text == canonical
    assert Criterion.parse(criterion.text).sympy == criterion.sympy
    assert Criterion.from_sympy(criterion.sympy) == criterion


@pytest.mark.usefixtures("good")
def test_it_has_a_size_a_shape_latex_and_a_place_in_recipes() -> None:
    criterion = Criterion.parse("sigmoid(abs(W)*X)")
    assert (
        criterion.latex == r"\operatorname{sigmoid}\left(\left|W\right| \lVert X_j\rVert_2\right)"
    )
    assert (criterion.complexity, criterion.depth, criterion.shape) == (5, 4, "element")
    assert Criterion.parse("sigmoid(X)").shape == "column"
    assert sees_inputs_alone(criterion)
    assert not sees_inputs_alone(Criterion.parse("share(W, X)"))
    recipe = validated(Recipe, {"name": "new", "criterion": "sigmoid(abs(W)*X)"}, "new.yaml")
    assert recipe.model_dump()["criterion"] == criterion.text


@pytest.mark.usefixtures("good")
def test_its_value_is_that_of_its_torch_text() -> None:
    weight, inputs = values()["W"], values()["X"]
    assert torch.equal(value("sigmoid(W*X)"), torch.sigmoid(weight * inputs))
    assert torch.equal(
        value("sigmoid(X)*asinh(W + X)"), inputs.sigmoid() * (weight + inputs).asinh()
    )
    torch.testing.assert_close(value("swish(W)"), torch.nn.functional.silu(weight))
    torch.testing.assert_close(
        value("share(abs(W), W**2)"), weight.abs() / weight.square().sum(1, keepdim=True)
    )


@pytest.mark.usefixtures("good")
def test_an_exported_page_computes_it_without_either_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.py"
    write_pruner(recipe_of("new", Criterion.parse("sigmoid(W)*swish(abs(W))")), page)
    for package in ("prunezero", "tests"):
        # Python refuses to import what is None there.
        monkeypatch.setitem(sys.modules, package, None)
    weight = values()["W"]
    scores = runpy.run_path(str(page))["score"](weight, {})
    silu = torch.nn.functional.silu(weight.abs())
    torch.testing.assert_close(scores, torch.sigmoid(weight) * silu)


@pytest.mark.usefixtures("good")
def test_a_kernel_computes_it_where_it_has_triton_text_and_else_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inside, beforehand = Criterion.parse("sigmoid(W)*X"), Criterion.parse("asinh(W)*X")
    assert "1.0 / (1.0 + tl.exp(-a0))" in plan(inside).source and not plan(inside).before
    assert plan(beforehand).before == "t1 = torch.asinh(W)"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = {name: feature.to(device) for name, feature in values().items()}
    for criterion in (inside, beforehand):
        scores = fused_score(criterion, features["W"], features).cpu()
        torch.testing.assert_close(scores, value(criterion.text), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("good")
def test_a_search_writes_it() -> None:
    fields = SearchSpace.load("formulas").model_dump(mode="json")
    space = validated(SearchSpace, fields | {"operators": ["mul", "sigmoid", "swish"]}, "new.yaml")
    rng = random.Random(0)
    fresh = [random_criterion(space, rng) for _ in range(20)]
    pool = [criterion for criterion in fresh if criterion is not None]
    children = [mutate(rng.choice(pool), space, rng) for _ in range(20)]
    children += [cross(rng.choice(pool), rng.choice(pool), space, rng) for _ in range(20)]
    found = [criterion for criterion in [*pool, *children] if criterion is not None]
    assert sum("sigmoid" in criterion.text for criterion in found) > 10
    assert sum("exp" in criterion.text for criterion in found) > 10
    for criterion in found:
        assert Criterion.parse(criterion.text) == criterion
    filled, numbers = tunable(Criterion.parse("X + sigmoid(2*W)"))
    assert Criterion.from_sympy(filled([1.5 * one for one in numbers])).text == "sigmoid(3*W) + X"
    small = space.model_copy(update={"max_complexity": 2})
    assert "sigmoid(W)" in {block.text for block in Blocks(small)}


@pytest.mark.usefixtures("good")
def test_nothing_is_taken_away_around_it_but_what_its_sign_allows() -> None:
    for text in ("sigmoid(W)", "sin(W*X)", "asinh(W*X)", "sin(X)*W", "sigmoid(2*W)"):
        criterion = Criterion.parse(text)
        assert ranking_form(criterion.sympy, "row") == criterion.sympy
    # A row's factor that is never negative changes no order in it; one of any sign may.
    assert str(ranking_form(Criterion.parse("W*sigmoid(R1)").sympy, "row")) == "W"
    assert Criterion.from_sympy(ranking_form(Criterion.parse("W*sin(R1)").sympy, "row")).text == (
        "W*sin(R1)"
    )


@pytest.mark.usefixtures("good")
def test_a_foreign_function_of_the_same_name_is_still_refused() -> None:
    with pytest.raises(CriterionError, match="may not hold 'sin'"):
        Criterion.from_sympy(sympy.sin(FEATURES["W"].symbol))


@pytest.mark.usefixtures("good")
def test_mistakes_in_its_use_are_told_as_for_our_words() -> None:
    with pytest.raises(CriterionError, match=r"sigmoid takes 1 value\(s\), not 2: sigmoid\(x\)"):
        Criterion.parse("sigmoid(W, X)")
    with pytest.raises(CriterionError, match="did you mean 'sigmoid'"):
        Criterion.parse("sigmiod(W)")
    with pytest.raises(CriterionError, match="'sigmoid' is an operator; write sigmoid"):
        Criterion.parse("sigmoid*W")
    with pytest.raises(CriterionError, match="sigmoid of a constant"):
        Criterion.parse("sigmoid(2)*W")


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_an_error_by_its_word(
    name: str, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, complaint = BAD[name]
    monkeypatch.setattr(sys.modules[HERE], "ROW", row, raising=False)
    plug((name, f"{HERE}:ROW"))
    with pytest.raises(CriterionError, match=f"^operator '{name}' of {HERE}:ROW .*{complaint}"):
        Criterion.parse(f"{name}(W)")


def test_a_row_that_is_not_there_is_an_error_by_its_word(plug: Plug) -> None:
    plug(("lost", f"{HERE}:LOST"), ("gone", "tests.formula.nowhere:GONE"))
    with pytest.raises(CriterionError, match="operator 'lost' .* cannot be loaded: AttributeError"):
        Criterion.parse("lost(W)")
    with pytest.raises(CriterionError, match="operator 'gone' .* ModuleNotFoundError: No module"):
        Criterion.parse("gone(W)")
    recipe = {"name": "new", "criterion": "gone(W)"}
    with pytest.raises(RecipeError, match="new.yaml, criterion: operator 'gone' of .* cannot be"):
        validated(Recipe, recipe, "new.yaml")
    fields = SearchSpace.load("tiny").model_dump(mode="json")
    with pytest.raises(RecipeError, match="mine.yaml, operators: operator 'gone' of .* cannot be"):
        validated(SearchSpace, fields | {"operators": ["gone"]}, "mine.yaml")


def test_two_packages_cannot_share_a_word(plug: Plug) -> None:
    plug(("sin", f"{HERE}:SIN"), ("sin", "theirs:SIN"))
    with pytest.raises(CriterionError, match="is also that of theirs:SIN; uninstall one"):
        Criterion.parse("sin(W)")
    # One package that is found twice, as where it is installed twice, is one.
    plug(("sin", f"{HERE}:SIN"), ("sin", f"{HERE}:SIN"))
    assert Criterion.parse("sin(W)").text == "sin(W)"


def test_our_words_stay_ours_and_the_list_says_who_wanted_them(plug: Plug) -> None:
    names = ["tanh", "W", "my-word", "lambda", "Sigmoid"]
    plug(*((name, f"{HERE}:SIGMOID") for name in names))
    assert torch.equal(value("tanh(W)*X"), values()["W"].tanh() * values()["X"])
    faults = {point.name: str(found) for point, found in OPERATORS.others().items()}
    assert set(faults) == set(names)
    for name in ("tanh", "W"):
        assert faults[name].endswith("would redefine a word of prunezero; give it another name")
    for name in ("my-word", "lambda", "Sigmoid"):
        assert "cannot be written in a formula" in faults[name]
    assert set(OPERATORS) == set(OPERATORS.own) and len(OPERATORS) == len(OPERATORS.own)
    assert OPERATORS.plugged() == {}


def test_the_list_shows_where_a_word_is_from_and_why_another_cannot_be_used(plug: Plug) -> None:
    plug(("sigmoid", f"{HERE}:SIGMOID"), ("gone", "nowhere:GONE"))
    rows = {row["name"]: row for row in LISTS["operators"](Path("runs"))}
    assert rows["sigmoid"] == {
        "name": "sigmoid",
        "usage": "sigmoid(x)",
        "meaning": f"logistic function; from {HERE}:SIGMOID",
        "sign": "nonnegative",
    }
    assert "cannot be used: operator 'gone' of nowhere:GONE cannot" in rows["gone"]["meaning"]
    assert rows["tanh"]["meaning"] == "hyperbolic tangent"
    assert "sigmoid" in OPERATORS and "sigmiod" not in OPERATORS


def test_its_meaning_changes_with_whatever_results_depend_on(
    plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug()
    assert OPERATORS.plugged() == {}

    def meaning(row: Operator) -> str:
        monkeypatch.setattr(sys.modules[HERE], "ROW", row, raising=False)
        plug((row.name, f"{HERE}:ROW"), ("gone", "nowhere:GONE"))
        (word, text), *others = OPERATORS.plugged().items()
        assert word == row.name and not others
        return text

    kinds = [
        SIGMOID,
        replace(SIGMOID, torch="torch.sigmoid(2.0 * {0})"),
        replace(SIGMOID, triton=None),
        elementwise("sigmoid", "torch.sigmoid({0})", meaning="", triton=SIGMOID.triton),
        SWISH,
        replace(SWISH, build=lambda x: x / (1 + _exp(-2 * x))),
        replace(SWISH, build=lambda x: abs(x) / (1 + _exp(-x))),
        SHARE,
        replace(SHARE, build=lambda x, y: x / _row_sum(abs(y))),
    ]
    texts = [meaning(row) for row in kinds]
    assert len(set(texts)) == len(texts)
    assert [meaning(row) for row in kinds] == texts
    assert meaning(replace(SIGMOID, meaning="said otherwise")) == texts[0]


def test_an_installed_package_is_loaded_when_its_word_is_used_and_no_sooner(
    tmp_path: Path,
) -> None:
    (tmp_path / "theirs.py").write_text(
        "from prunezero.formula.vocabulary import elementwise\n"
        "SIGMOID = elementwise('sigmoid', 'torch.sigmoid({0})', meaning='')\n"
    )
    (tmp_path / "broken.py").write_text("raise OSError('no such device')\n")
    written = tmp_path / "theirs-1.0.dist-info"
    written.mkdir()
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (written / "entry_points.txt").write_text(
        f"[{GROUP}]\nsigmoid = theirs:SIGMOID\nlost = broken:LOST\n"
    )
    program = (
        "import sys, prunezero as pz\n"
        "print(pz.Criterion.parse('tanh(W)*X').text, 'theirs' in sys.modules)\n"
        "print(pz.Criterion.parse('sigmoid(W)*X').text, 'theirs' in sys.modules)\n"
        "try: pz.Criterion.parse('lost(W)')\n"
        "except Exception as error: print(error)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed == [
        "tanh(W)*X False",
        "sigmoid(W)*X True",
        "operator 'lost' of broken:LOST cannot be loaded: OSError: no such device",
    ]
