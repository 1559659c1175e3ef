"""A criterion as a file with its Triton kernel, which needs torch and Triton alone.

The kernel is the engine's own, cut from the text of `scoring/kernels/source.py`; what the engine
computes in torch beforehand stands as the same torch lines in front of the launch. The file is
given features and gives scores: it knows no models, text or masks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from prunezero.errors import OutputError
from prunezero.files.atomic import write_text
from prunezero.formula.code import split_steps
from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, Feature
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.report.export.page_lines import feature_lines
from prunezero.report.export.page_text import check_page
from prunezero.report.export.page_words import paragraphs
from prunezero.scoring.kernels.source import Plan, plan

# Of the generated kernels, those that a score needs.
_KERNELS = ("score_of", "score_kernel")
_SHAPES = {"element": "[out, in]", "row": "[out, 1]", "column": "[1, in]"}

_PAGE = '''"""$DOCSTRING
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


$KERNELS


def score($PARAMETERS) -> Tensor:
    """How much each weight [out, in] matters, float32 [out, in]; the lowest go first."""
    check(weight, {$GIVEN})
    weight = weight.detach()
    rows, columns = weight.shape
    scores = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return scores
    with torch.no_grad():
        $BEFORE
    arguments = []
    # In the kernel: $PLACES.
    for value in $INPUTS:
        value = value.expand(rows, columns)
        arguments += [value, *value.stride()]
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        score_kernel[rows, triton.cdiv(columns, 1024)](
            scores,
            columns,
            *arguments,
            *[$CONSTANTS],
            BLOCK=1024,
            num_warps=4,
            # Multiply-add fused into one rounding would give other scores than torch.
            enable_fp_fusion=False,
        )
    return scores


def check(weight: Tensor, features: dict[str, Tensor]) -> None:
    """Refuse what the kernel would misread."""
    if weight.dim() != 2 or not weight.is_floating_point():
        kind = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"the weight must be a matrix of floats [out, in] but is {kind}")
    # With TRITON_INTERPRET=1, Triton makes another object of a kernel.
    if isinstance(score_kernel, triton.JITFunction) and not weight.is_cuda:
        raise ValueError(
            f"the weight is on {weight.device}; move it to a CUDA device, or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    for name, value in features.items():
        wanted = SHAPES[name](*weight.shape)
        if tuple(value.shape) != wanted:
            found = list(value.shape)
            raise ValueError(f"{name} must have the shape {list(wanted)} but has {found}")
        if value.device != weight.device:
            raise ValueError(f"{name} is on {value.device}, the weight on {weight.device}")


# What each feature is given as, from the shape of the weight.
SHAPES = {$SHAPES}
'''
_SHAPE_LINES = {
    "element": "lambda rows, columns: (rows, columns)",
    "row": "lambda rows, columns: (rows, 1)",
    "column": "lambda rows, columns: (1, columns)",
}


def write_kernel(recipe: Recipe, path: Path) -> None:
    """Write the file, whole or not at all; of the recipe it takes the formula alone.

    Raises:
        OutputError: it cannot be written, or the recipe has several formulas.
    """
    write_text(kernel_page(recipe), path)


def refuse_several(recipe: Recipe) -> None:
    """Raise OutputError where a recipe has formulas of some layers beside the one of all others.

    Or where its formula is not one of single weights.
    """
    if not recipe.unit.is_usual:
        raise OutputError(
            f"{recipe.name} has unit: {recipe.unit.text}, but a kernel file scores single weights; "
            "use `prunezero prune` with the recipe"
        )
    if recipe.criteria:
        raise OutputError(
            f"{recipe.name} has formulas of its own for {', '.join(recipe.criteria)}, but a kernel "
            "file holds one; write a recipe of the formula that you want, and export that"
        )


def kernel_page(recipe: Recipe) -> str:
    """The file's text: it compiles, and it imports nothing of prunezero.

    Raises:
        OutputError: the recipe has several formulas.
    """
    refuse_several(recipe)
    criterion, planned = recipe.criterion, plan(recipe.criterion)
    given = _given(criterion)
    names = [feature.name for feature in given]
    places = [f"a{place} is {name}" for place, name in enumerate(planned.inputs)]
    new = {
        "DOCSTRING": _docstring(recipe, given),
        "KERNELS": "\n\n\n".join(_cut(planned.source)),
        "PARAMETERS": ", ".join(f"{name}: Tensor" for name in ("weight", *names)),
        "GIVEN": ", ".join(f'"{name}": {name}' for name in names),
        "BEFORE": "\n        ".join(_before(criterion, planned) or ["pass"]),
        "PLACES": ", ".join(places),
        "INPUTS": _tuple(planned.inputs),
        "CONSTANTS": ", ".join(map(repr, planned.constants)),
        "SHAPES": ", ".join(f'"{one.name}": {_SHAPE_LINES[one.shape]}' for one in given),
    }
    # In one pass: what a recipe calls itself may look like a place of ours.
    page = _without_idle_lines(re.sub(r"\$([A-Z]+)", lambda found: new[found[1]], _PAGE))
    check_page(page)
    return page


def _tuple(inputs: Sequence[str]) -> str:
    names = ["weight" if name == "W" else name for name in inputs]
    return f"({', '.join(names)}{',' * (len(names) == 1)})"


def _given(criterion: Criterion) -> list[Feature]:
    """The features that the caller has to measure; the others follow from the weight."""
    return [FEATURES[name] for name in criterion.features if FEATURES[name].sums]


def _before(criterion: Criterion, planned: Plan) -> list[str]:
    """The torch lines between features and kernel."""
    lines = [
        line
        for name in criterion.features
        if name != "W" and not FEATURES[name].sums
        for line in feature_lines(name)
    ]
    read = {argument for step in split_steps(criterion).before for argument in step.arguments}
    lines += [
        "W = weight.float()" if name == "W" else f"{name} = {name}.float()"
        for name in criterion.features
        if name in read and (name == "W" or FEATURES[name].sums)
    ]
    return lines + planned.before.splitlines()


def _cut(source: str) -> list[str]:
    """The kernels of a generated source that a score needs, as they stand there."""
    lines = source.splitlines()
    return [
        "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in _KERNELS
    ]


def _without_idle_lines(page: str) -> str:
    """The page without what some formulas have no use for, and with long lines marked."""
    page = page.replace("    with torch.no_grad():\n        pass\n", "")
    page = page.replace("            *[],\n", "")
    long = {line for line in page.splitlines() if len(line) > 100}
    return "".join(
        f"{line}  # noqa: E501\n" if line in long else f"{line}\n" for line in page.splitlines()
    )


def _docstring(recipe: Recipe, given: list[Feature]) -> str:
    """What the file computes of what, and how it is called, safe between triple quotes."""
    call = ", ".join(["weight", *(feature.name for feature in given)])
    return paragraphs(
        f"{recipe.name}: scores of the criterion `{recipe.criterion.text}` by a Triton kernel.",
        f"Source: {recipe.source}" if recipe.source else "",
        "The arithmetic is float32; sums over a row, a column or the layer are float64 and "
        "computed in torch beforehand. It is given the weight [out, in] of a linear layer, of any "
        f"float dtype and memory layout{', and of the same layer:' if given else '.'}",
        "\n".join(map(_row, given)),
        "It runs on a CUDA device, and on a CPU where TRITON_INTERPRET=1 is set before Triton is "
        "imported. Usage:",
        f"    from kernel import score\n    scores = score({call})  # float32 [out, in]",
    )


def _row(feature: Feature) -> str:
    text = f"{feature.name} {_SHAPES[feature.shape]}: {feature.meaning}"
    return fill(text, 99, initial_indent=" " * 4, subsequent_indent=" " * 8)
