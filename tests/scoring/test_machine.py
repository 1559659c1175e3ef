"""The machine gives each formula the scores that a kernel of its own gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, OPERATORS
from prunezero.scoring import machine
from prunezero.scoring.machine import can_run, machine_source, program, scores_of
from tests.scoring.test_fused import DEVICE, kernel_score, tensors, with_operator

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

EVERY = [one for name in OPERATORS.own for one in with_operator(name)]
EVERY += [Criterion.parse(name) for name in FEATURES]
EVERY += [Criterion.parse("(abs(W)/R1 + abs(W)/C1) * sqrt(X)"), Criterion.parse("W**2*minmax(G)")]
LAYERS = 3


def stack() -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Layers of one shape, each for itself and all in a stack."""
    single = [tensors(seed) for seed in range(LAYERS)]
    together = {name: torch.stack([one[name] for one in single]) for name in single[0]}
    return single, {name: value.to(DEVICE) for name, value in together.items()}


def test_a_population_on_a_stack_scores_as_each_formula_on_each_layer() -> None:
    single, together = stack()
    shape = together["W"].shape
    assert len(EVERY) > 50 and all(map(can_run, EVERY))
    scores = scores_of(EVERY, together, shape).cpu()
    assert scores.shape == (len(EVERY), *shape)
    for criterion, found in zip(EVERY, scores, strict=True):
        for layer, values in enumerate(single):
            assert torch.equal(found[layer], kernel_score(criterion, values)), criterion.text


def test_a_formulas_scores_do_not_depend_on_its_company() -> None:
    _, together = stack()
    shape = together["W"].shape
    whole = scores_of(EVERY[:12], together, shape)
    for criterion, found in zip(EVERY[:12], whole, strict=True):
        assert torch.equal(scores_of([criterion], together, shape)[0], found)


def test_what_looks_at_whole_matrices_is_computed_once_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [
        "abs(W)*col_norm(abs(W)*X)",
        "W**2*col_norm(abs(W)*X)",
        "abs(W)+sqrt(X)",
        "abs(W)*sqrt(X)",
    ]
    criteria = [Criterion.parse(text) for text in texts]
    computed = []
    real = machine._Tape._compute

    def watched(tape: machine._Tape, step: object, means: dict[str, str]) -> None:
        before = len(tape.computed)
        real(tape, step, means)  # type: ignore[arg-type]
        computed.extend([list(tape.computed)[-1]] * (len(tape.computed) - before))

    monkeypatch.setattr(machine._Tape, "_compute", watched)
    _, together = stack()
    scores_of(criteria, together, together["W"].shape)
    assert computed == ["abs(W)", "mul(abs(W),X)", "col_norm(mul(abs(W),X))", "sqrt(X)"]


def test_a_formula_that_needs_a_deeper_stack_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    depths = {"W": 1, "abs(W)": 1, "W*G": 2, "W + G*X": 3, "(W + G)*(X + Y)": 3}
    for text, depth in depths.items():
        assert program(Criterion.parse(text)).depth == depth, text
    monkeypatch.setattr(machine, "DEPTH", 2)
    assert can_run(Criterion.parse("W*G")) and not can_run(Criterion.parse("(W + G)*(X + Y)"))


COMPILE = """
import re
import subprocess
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prunezero.formula.vocabulary import OPERATORS
from prunezero.scoring.kernel_files import import_kernels
from prunezero.scoring.machine import machine_source

words = tuple(name for name, row in OPERATORS.own.items() if row.triton)
kernel = import_kernels(machine_source(words), Path(sys.argv[1])).machine_kernel
kinds = {"scores": "*fp32", "numbers": "*fp32", "addresses": "*i64", "strides": "*i64"}
kinds |= {name: "*i32" for name in ("starts", "codes", "which")}
kinds |= {name: "i32" for name in ("height", "width", "size")}
source = ASTSource(kernel, {**kinds, "BLOCK": "constexpr"}, constexprs={"BLOCK": 1024})
options = {"num_warps": 4, "enable_fp_fusion": False}
asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
binary = Path(sys.argv[1]) / "machine.cubin"
binary.write_bytes(asm["cubin"])
command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
"""


def test_the_machine_compiles_for_a_gpu_that_is_not_there_and_spills_nothing(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernels")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    registers, spilled = map(int, re.findall("REG:([0-9]+) STACK:([0-9]+)", done.stdout)[0])
    assert registers <= 128 and spilled == 0, done.stdout


def test_the_source_holds_the_vocabulary_and_no_formula() -> None:
    source = machine_source(("add", "abs", "sqrt"))
    assert "x + y" in source and "tl.sqrt_rn(x)" in source
    assert "tanh" not in source and "$" not in source
