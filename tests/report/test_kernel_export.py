"""An exported kernel gives the engine's scores, in a process that has no prunezero."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunezero.errors import CriterionError, OutputError
from prunezero.formula.criterion import Criterion
from prunezero.formula.features import features_of_domain
from prunezero.formula.vocabulary import FEATURES
from prunezero.pruning.recipes.recipe import Recipe, published_of
from prunezero.report.export.kernel import kernel_page, write_kernel
from prunezero.scoring.feature_values import feature
from prunezero.scoring.fused import fused_score
from prunezero.scoring.kernels.source import plan
from prunezero.scoring.score import evaluate
from tests.report.random_recipes import random_formula
from tests.report.recipes import recipe_of
from tests.scoring.compiled import Wish, compile_all

pytest.importorskip("triton")

# Triton decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

# With every feature, sums of every kind, powers, and divisions by values that hold zeros.
EXACT = {
    "weight": "W",
    "wanda": "abs(W)*X",
    "ria": "(abs(W)/C1 + abs(W)/R1)*sqrt(X)",
    "pruner_zero": "sqr(W)*minmax(G)",
    "zeros": "W**3/(X_mean*F) + 0.25*X_rms/X_var",
    "sums": "zscore(abs(W))*row_norm(W) + col_max(G)*layer_sum(H)*V",
    "before": "row_mean(abs(W))*C2",
    "scalar": "layer_mean(G1)",
    "taylor": "abs(W*S)",
}
APPROXIMATE = {
    "powers": "abs(W)**0.7*X_ms**1.5 - 0.3*G1**-0.5",
    "functions": "exp(-abs(W))*log(G)*tanh(D*F)*W",
    "second order": "W**2/U**2*Y**0.3 + abs(W)**0.5/R2",
}
FORMULAS = EXACT | APPROXIMATE
KERNELS = int(os.environ.get("PRUNEZERO_RANDOM_RECIPES", "60"))
SHAPES = {"element": (3, 1030), "row": (3, 1), "column": (1, 1030)}

RUN = """
import sys
sys.modules["prunezero"] = None
import importlib.util, torch
values, scores = torch.load("values.pt"), {}
for name, (features, kinds) in values["formulas"].items():
    spec = importlib.util.spec_from_file_location("kernel", f"{name}.py")
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    given = {feature: values["features"][feature] for feature in features}
    scores[name] = {kind: kernel.score(values["weights"][kind], **given) for kind in kinds}
torch.save(scores, "scores.pt")
"""


def values() -> dict[str, torch.Tensor]:
    """A value for every feature, coarse enough to hold ties, with some zeros."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, row in FEATURES.items():
        value = torch.randn(SHAPES[row.shape], generator=generator)
        value = torch.where(value.abs() < 0.1, 0.0, (value * 4).round() / 8)
        found[name] = value.abs() if row.nonnegative else value
    return found


def weights() -> dict[str, torch.Tensor]:
    plain = values()["W"]
    return {"plain": plain, "bfloat16": plain.bfloat16(), "transposed": plain.T.contiguous().T}


def features_of(criterion: Criterion, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the engine has them: what follows from the weight, and what was measured."""
    return {
        name: value if FEATURES[name].sums else feature(name, weight)
        for name, value in values().items()
        if name in criterion.features
    }


def fields_of(name: str, formula: str) -> Recipe:
    criterion = Criterion.parse(formula)
    return recipe_of(name, criterion, compare="layer", source="tests " * 30)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The scores of every formula and weight, from files in a process of their own."""
    folder = tmp_path_factory.mktemp("kernels")
    formulas = {}
    for name, text in FORMULAS.items():
        criterion = Criterion.parse(text)
        write_kernel(fields_of(name, text), folder / f"{name}.py")
        measured = [one for one in criterion.features if FEATURES[one].sums]
        formulas[name] = (measured, list(weights()))
    given = {"formulas": formulas, "features": values(), "weights": weights()}
    torch.save(given, folder / "values.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "scores.pt")


def test_the_formulas_hold_every_feature() -> None:
    held = {name for text in FORMULAS.values() for name in Criterion.parse(text).features}
    assert held == set(features_of_domain("matrix"))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine's kernel runs on the GPU here")
def test_the_scores_are_the_bits_of_the_engines_kernel(
    name: str, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    criterion = Criterion.parse(FORMULAS[name])
    for kind, weight in weights().items():
        features = features_of(criterion, weight)
        expected = fused_score(criterion, weight, features)
        assert torch.isfinite(expected).all() and expected.dtype == torch.float32
        assert torch.equal(found[name][kind], expected), kind
        in_torch = evaluate(criterion, features, weight.shape)
        if name in EXACT:
            assert torch.equal(found[name][kind], in_torch), kind
        else:
            torch.testing.assert_close(found[name][kind], in_torch, rtol=1e-5, atol=1e-6)


def wish(fields: Recipe) -> Wish:
    planned = plan(fields.criterion)
    kinds = {"scores": "*fp32", "columns": "i32"}
    for place, name in enumerate(planned.inputs):
        kinds[f"a{place}_at"] = "*bf16" if name == "W" else "*fp32"
        kinds |= {f"a{place}_row": "i64", f"a{place}_column": "i64"}
    kinds |= {f"c{place}": "fp32" for place in range(len(planned.constants))}
    return Wish(kernel_page(fields), "score_kernel", kinds, {"BLOCK": 1024})


def test_published_and_other_formulas_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    published = {fields.criterion.text: fields for fields in published_of("weight")}
    assert len(published) > 5
    others = [fields_of(name, text) for name, text in FORMULAS.items() if name in APPROXIMATE]
    every = [*published.values(), *others]
    for fields, made in zip(
        every, compile_all([wish(one) for one in every], tmp_path), strict=True
    ):
        assert made.stack == 0, fields.name
        assert "enable_fp_fusion=False" in kernel_page(fields)


def test_the_file_is_clean_by_our_own_linter_and_told_what_it_needs(tmp_path: Path) -> None:
    for name, text in FORMULAS.items():
        write_kernel(fields_of(name, text), tmp_path / f"{name}.py")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100"]
    command += ["--select", "E,F,I,UP,B", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = ast.get_docstring(ast.parse((tmp_path / "second order.py").read_text())) or ""
    for words in (
        "`W**2*Y**0.3/U**2",
        "U [1, in]:",
        "Y [out, 1]:",
        "score(weight, Y, U)",
        "CUDA device",
    ):
        assert words in told
    alone = ast.get_docstring(ast.parse((tmp_path / "weight.py").read_text())) or ""
    assert "memory layout.\n" in alone.replace("memory\nlayout", "memory layout")
    assert "scores = score(weight)" in alone


def test_hostile_words_stay_words() -> None:
    fields = recipe_of('x"""\nimport os\n"""$KERNELS', Criterion.parse("abs(W)"), source="\\x41")
    tree = ast.parse(kernel_page(fields))
    modules = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert modules == {"torch", "triton", "triton.language"}
    assert "$KERNELS" in (ast.get_docstring(tree) or "")


def kernel_of(text: str, folder: Path, name: str = "kernel") -> Any:
    import importlib.util

    write_kernel(fields_of("mine", text), folder / f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine's kernel runs on the GPU here")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::prunezero.errors.FormulaWarning")
def test_random_formulas_of_all_shapes_score_as_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rng, shapes = random.Random(0), set()
    for turn in range(KERNELS):
        text = random_formula(rng)
        try:
            criterion = Criterion.parse(text)
        except CriterionError:
            continue
        shapes.add(criterion.shape)
        kernel = kernel_of(criterion.text, tmp_path, f"kernel_{turn}")
        rows, columns = rng.choice([(3, 17), (1, 5), (4, 1), (2, 70), (1, 1)])
        features = {
            name: value[: min(rows, len(value)), : min(columns, value.shape[1])].contiguous()
            for name, value in tall_values().items()
        }
        weight = features.pop("W").to(rng.choice([torch.float32, torch.bfloat16, torch.float16]))
        given = {name: features[name] for name in criterion.features if name in features}
        given |= {n: feature(n, weight) for n in criterion.features if not FEATURES[n].sums}
        measured = {name: value for name, value in given.items() if FEATURES[name].sums}
        found = kernel.score(weight, **measured)
        wanted = fused_score(criterion, weight, given)
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32)), text
        in_torch = evaluate(criterion, given, weight.shape)
        torch.testing.assert_close(found, in_torch, rtol=1e-3, atol=1e-5, equal_nan=True, msg=text)
    assert shapes == {"element", "row", "column", "scalar"}


def tall_values() -> dict[str, torch.Tensor]:
    """A value for every feature of a layer of 4 rows and 70 columns."""
    sizes = {"element": (4, 70), "row": (4, 1), "column": (1, 70)}
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, row in FEATURES.items():
        value = torch.randn(sizes[row.shape], generator=generator)
        value = torch.where(value.abs() < 0.1, 0.0, value)
        found[name] = value.abs() if row.nonnegative else value
    return found


def test_what_the_kernel_would_misread_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernel_of("abs(W)*X", tmp_path)
    weight, norms = torch.ones(4, 4), torch.ones(1, 4)
    assert torch.equal(kernel.score(torch.nn.Parameter(weight), norms), weight)
    assert kernel.score(torch.ones(0, 4), norms).shape == (0, 4)
    with pytest.raises(ValueError, match=r"X must have the shape \[1, 4\] but has \[4\]"):
        kernel.score(weight, norms[0])
    with pytest.raises(ValueError, match=r"X must have the shape \[1, 4\] but has \[4, 1\]"):
        kernel.score(weight, norms.T)
    with pytest.raises(ValueError, match="X is on meta, the weight on cpu"):
        kernel.score(weight, norms.to("meta"))
    with pytest.raises(ValueError, match=r"a matrix of floats .* is torch.int64 \[4, 4\]"):
        kernel.score(weight.long(), norms)
    monkeypatch.setattr(kernel.triton, "JITFunction", object)
    with pytest.raises(ValueError, match="on cpu; move it to a CUDA device, or set TRITON_INTERP"):
        kernel.score(weight, norms)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="kernel.py cannot be written"):
        write_kernel(fields_of("m", "abs(W)"), tmp_path / "missing" / "kernel.py")
