"""The generated kernels compile for a GPU that is not there, without spills or fused roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import OPERATORS
from prunezero.scoring.kernels.machine import DEPTHS, machine_source
from prunezero.scoring.kernels.source import plan
from prunezero.scoring.kernels.sweep import SOURCE as SWEEP
from tests.scoring.compiled import Compiled, Wish, compile_all

pytest.importorskip("triton")

RATIOS = "(abs(W)/R1 + abs(W)/C1) * sqrt(X)"
LIGHT = "abs(W)**1.4 * G * sqrt(X)"
EVERY = "abs(W) * sqrt(G) * X + 0.5 * tanh(G) + exp(-G) / log(G) + G**0.3"
SIZES = ("columns", "stride", "remove", "groups_per_row")
MACHINES = {
    depth: machine_source(tuple(name for name, row in OPERATORS.own.items() if row.triton), depth)
    for depth in DEPTHS
}
SPEAKS = {
    "machine_kernel": {
        **dict.fromkeys(("scores", "numbers"), "*fp32"),
        **dict.fromkeys(("addresses", "strides"), "*i64"),
        **dict.fromkeys(("starts", "codes", "which"), "*i32"),
        **dict.fromkeys(("height", "width", "size"), "i32"),
    },
    "sweep_kernel": {
        **dict.fromkeys(("columns", "errors", "upper"), "*fp32"),
        **dict.fromkeys(("start", "count", "rows", "width"), "i32"),
        "keep": "*i1",
    },
}
NARROW = {"PIECE": 512, "PIECES": 2}
MIDDLE = {"PIECE": 512, "PIECES": 8}
PAIRS = {"OF": 16, "WIDTH": 16, "GROUPS": 16}
ODD = {"OF": 5, "WIDTH": 8, "GROUPS": 64}


def of_formula(text: str, kernel: str, constants: dict[str, Any], warps: int = 4) -> Wish:
    planned = plan(Criterion.parse(text))
    kinds = {"scores": "*fp32", "extremes": "*i32", "tied": "*i32", **dict.fromkeys(SIZES, "i32")}
    kinds["kept"] = "*i1"
    for place in range(len(planned.inputs)):
        at = f"a{place}"
        # The weights themselves are of 16 bits in most models.
        kinds |= {f"{at}_at": "*bf16" if place == 0 else "*fp32"}
        kinds |= {f"{at}_row": "i64"}
        # As they lie in most models: inputs as large as the weight, or one row for all.
        constants = {f"{at}_column": 1, **constants}
    kinds |= {f"c{place}": "fp32" for place in range(len(planned.constants))}
    return Wish(planned.source, kernel, kinds, constants, warps)


def machines() -> list[Wish]:
    kinds, constants = SPEAKS["machine_kernel"], {"BLOCK": 512}
    return [Wish(source, "machine_kernel", kinds, constants) for source in MACHINES.values()]


# Each with the bytes of stack that a thread may need: none for rows of common models.
BUDGETS = [
    (of_formula(EVERY, "score_kernel", {"BLOCK": 1024}), 0),
    (of_formula(EVERY, "row_kernel", NARROW), 0),
    (of_formula(EVERY, "row_kernel", MIDDLE, 8), 0),
    (of_formula(EVERY, "row_kernel", {**NARROW, "PIECE": 4096, "PIECES": 2}, 16), 0),
    (of_formula(RATIOS, "row_kernel", {**NARROW, "PIECE": 512, "PIECES": 8}, 4), 0),
    (of_formula(RATIOS, "row_kernel", {**NARROW, "PIECE": 1024, "PIECES": 11}, 8), 0),
    (of_formula(RATIOS, "row_kernel", {**NARROW, "PIECE": 2048, "PIECES": 7}, 16), 0),
    (of_formula(LIGHT, "row_kernel", {**NARROW, "PIECE": 1024, "PIECES": 11}, 4), 0),
    (of_formula(LIGHT, "row_kernel", {**NARROW, "PIECE": 4096, "PIECES": 7}, 16), 0),
    (of_formula("W", "long_row_kernel", {"PIECE": 4096}, 8), 0),
    (of_formula(EVERY, "slot_kernel", {"OF": 4, "SIZE": 1024}, 2), 0),
    (of_formula(EVERY, "slot_kernel", {"OF": 8, "SIZE": 1024}, 2), 8),
    (of_formula(EVERY, "pattern_kernel", PAIRS), 24),
    (of_formula(EVERY, "pattern_kernel", ODD), 0),
    *((machine, 0) for machine in machines()),
    (Wish(SWEEP, "sweep_kernel", SPEAKS["sweep_kernel"], {"COLUMNS": 128, "ROWS": 32}), 0),
]


def in_words(wish: Wish, made: Compiled) -> str:
    return f"{wish.kernel} {wish.constants}: {made.registers} registers, {made.stack} bytes"


def test_kernels_compile_for_a_gpu_that_is_not_there_within_their_budgets(tmp_path: Path) -> None:
    for (wish, budget), made in zip(
        BUDGETS, compile_all([wish for wish, _ in BUDGETS], tmp_path), strict=True
    ):
        print(in_words(wish, made))
        assert made.stack <= budget, in_words(wish, made)


def test_a_machine_keeps_every_value_of_its_stack_from_step_to_step(tmp_path: Path) -> None:
    # A compiler that takes two of them for one would lose both, which no interpreter shows.
    for depth, made in zip(DEPTHS, compile_all(machines(), tmp_path), strict=True):
        (loop,) = [line for line in made.ttir.splitlines() if "scf.for" in line]
        carried = loop.split("iter_args(")[1].split(")")[0]
        assert carried.count("=") == depth


def test_multiply_and_add_stay_two_roundings_as_in_torch(tmp_path: Path) -> None:
    wish = of_formula("abs(W) * X + 0.5 * G", "score_kernel", {"BLOCK": 1024})
    (made,) = compile_all([wish], tmp_path)
    assert "mul.f32" in made.ptx or "mul.rn.f32" in made.ptx
    assert "fma.rn.f32" not in made.ptx
