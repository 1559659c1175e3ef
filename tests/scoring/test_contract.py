"""What formulas trust operators for: ours keep every promise, and a broken one is told by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prunezero.formula.operators import Operator, elementwise
from prunezero.formula.vocabulary import OPERATORS
from prunezero.testing.operators import broken_promises
from tests.formula.test_plugged_operators import GOOD


@pytest.mark.parametrize("name", OPERATORS.own)
def test_every_operator_of_ours_keeps_its_promises(name: str) -> None:
    assert broken_promises(OPERATORS.own[name]) == []


@pytest.mark.parametrize("name", GOOD)
def test_good_operators_of_other_packages_keep_them_although_nobody_installed_them(
    name: str,
) -> None:
    assert broken_promises(GOOD[name]) == []


def word(torch: str, **claims: Any) -> Operator:
    return elementwise("word", torch, meaning="", **claims)


ROW_SUM = OPERATORS.own["row_sum"]
SIGMOID = "1.0 / (1.0 + tl.exp({0}))"
BROKEN: dict[str, tuple[Operator, str]] = {
    "sign": (word("torch.sin({0})", sign="nonnegative"), "claims to be nonnegative, but is -"),
    "sign of the argument": (
        word("torch.sin({0})", sign="as argument"),
        "claims to be nonnegative where its argument is, but is -",
    ),
    "sign of other words": (
        Operator("word", 1, "", "", lambda x: x**3, sign="nonnegative"),
        "claims to be nonnegative, but is -",
    ),
    "overflow": (word("torch.expm1({0})"), "is not finite, but inf for 100"),
    "pole": (word("torch.reciprocal({0})"), "is not finite, but inf for 0"),
    "nan": (word("torch.sqrt({0})"), "is not finite, but nan for -"),
    "neighbours": (
        word("torch.tanh({0}) - torch.tanh({0}).mean()"),
        "claims to see each element by itself, but one row changes with others",
    ),
    "neighbours in a row": (
        word("torch.softmax(torch.tanh({0}), dim=-1)"),
        "claims to see each element by itself, but one column changes with others",
    ),
    "sum of other rows": (
        replace(ROW_SUM, torch="({0} + {0}.abs().mean((-2, -1), True)).sum(-1, keepdim=True)"),
        "claims to see each row by itself, but one row changes with others",
    ),
    "sum that knows places": (
        replace(ROW_SUM, torch="{0}[..., :1] + 0 * {0}[..., -1:]"),
        "do not move when rows and columns change places",
    ),
    "sum of another axis": (
        replace(ROW_SUM, torch="{0}.sum((-2,), keepdim=True)"),
        "claims one value for each row, but gives [1, 7] for [5, 7]",
    ),
    "sum from the front": (
        replace(ROW_SUM, torch="{0}.sum(1, keepdim=True)"),
        "on layers in a stack [layers, out, in] it gives other values",
    ),
    "chance": (word("torch.rand_like({0})"), "asked again, it gives another value"),
    "in place": (word("{0}.sin_()"), "changes the values that it is given"),
    "dtype": (word("torch.tanh({0}).double()"), "gives torch.float64, not torch.float32"),
    "number": (word("{0}.sum().item()"), "gives float, not torch.float32"),
    "failing": (word("torch.tanhh({0})"), "its torch text fails on [5, 7]: AttributeError"),
    "meaning": (
        replace(OPERATORS.own["sqr"], torch="{0} * {0} * 2.0", triton="{0} * {0} * 2.0"),
        "but its SymPy meaning W**2 is",
    ),
    "Triton": (word("torch.sigmoid({0})", triton=SIGMOID), "its Triton text gives"),
    "Triton that fails": (
        word("torch.sigmoid({0})", triton="tl.sigmoidd({0})"),
        "has no attribute 'sigmoidd'",
    ),
    "build": (Operator("word", 1, "", "", lambda: 1), "it cannot be built: TypeError"),
}


def test_a_triton_text_that_cannot_be_tried_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (told,) = broken_promises(GOOD["sigmoid"])
    assert told.endswith("without a GPU, set TRITON_INTERPRET=1 before Triton is imported")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_told_and_no_other(name: str) -> None:
    if name.startswith("Triton"):
        pytest.importorskip("triton")
    operator, sentence = BROKEN[name]
    (told,) = broken_promises(operator)
    assert sentence in told and told.startswith(("it ", "its ", "asked", "on layers"))
    assert "\n" not in told
