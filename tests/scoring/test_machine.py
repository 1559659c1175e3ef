"""The machine gives each formula the scores that a kernel of its own gives it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from prunezero.formula.criterion import Criterion
from prunezero.formula.vocabulary import FEATURES, OPERATORS
from prunezero.scoring.kernels import machine
from prunezero.scoring.kernels.files import kernel_folder
from prunezero.scoring.kernels.machine import can_run, machine_source, program, scores_of
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
    monkeypatch.setattr(machine, "DEPTHS", (1, 2))
    assert can_run(Criterion.parse("W*G")) and not can_run(Criterion.parse("(W + G)*(X + Y)"))


def test_the_source_holds_the_vocabulary_and_no_formula() -> None:
    source = machine_source(("add", "abs", "sqrt"), 4)
    assert "x + y" in source and "tl.sqrt_rn(x)" in source
    assert "tanh" not in source and "$" not in source


def test_formulas_are_computed_in_a_process_that_has_done_nothing_else() -> None:
    code = (
        "import torch\n"
        "from prunezero.formula.criterion import Criterion\n"
        "from prunezero.scoring.kernels.machine import scores_of\n"
        "from prunezero.scoring.fused import fused_score\n"
        "one, values = Criterion.parse('W**2*minmax(G)'), {n: torch.rand(1, 2, 8) for n in 'WG'}\n"
        "together = scores_of([one], values, (1, 2, 8))[0, 0]\n"
        "alone = fused_score(one, values['W'][0], {'G': values['G'][0]})\n"
        "assert torch.equal(together, alone)\n"
    )
    if DEVICE == "cuda":
        code = code.replace("torch.rand(1, 2, 8)", "torch.rand(1, 2, 8).cuda()")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_hundreds_of_new_formulas_need_one_kernel() -> None:
    _, together = stack()
    texts = [f"abs(W)**{1 + place / 1000} * sqrt(X) + {place + 1} * G" for place in range(150)]
    texts += [f"tanh(abs(W) * {place + 1}) / (X + {place + 1})" for place in range(150)]
    criteria = [Criterion.parse(text) for text in texts]
    one_row = {name: value[:1, :1] for name, value in together.items()}
    for start in range(0, 300, 100):
        scores_of(criteria[start : start + 100], one_row, (1, 1, 40))
    assert len(list(kernel_folder().glob("*.py"))) == 1
