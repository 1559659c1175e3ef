"""The generated kernels compile for a GPU that is not there, without spills or fused roundings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own: this one may run kernels in the interpreter, which cannot compile.
COMPILE = """
import re
import subprocess
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prunezero.formula.criterion import Criterion
from prunezero.scoring.fused import WIDEST_FUSED_ROW, WIDEST_ROW
from prunezero.scoring.kernel_files import import_kernels
from prunezero.scoring.kernel_source import plan

POINTERS = {"scores": "*fp32", "kept": "*i1", "tallies": "*i32", "a0_at": "*bf16"}

def kind_of(word):
    if word in POINTERS or not word[1:2].isdigit():
        return POINTERS.get(word, "i32")
    return "*fp32" if word.endswith("_at") else "fp32" if word[0] == "c" else "i64"

def compiled(text, name, warps=4, **constants):
    kernels = import_kernels(plan(Criterion.parse(text)).source, Path(sys.argv[1]))
    kernel = getattr(kernels, name)
    signature = {w: "constexpr" if w in constants else kind_of(w) for w in kernel.arg_names}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

every = "abs(W) * sqrt(G) * X + 0.5 * tanh(G) + exp(-G) / log(G) + G**0.3"
assert compiled(every, "score_kernel", BLOCK=1024)["cubin"]
assert compiled(every, "pattern_kernel", OF=5, WIDTH=8, GROUPS=64, PACKED=False)["cubin"]

# What may be spilled to the stack, in bytes a thread: nothing for rows of common models.
narrow = {"BLOCK": 1024, "PACKED": False}
packed = {"BLOCK": 4096, "PACKED": True, "a0_column": 1}
pairs = {"OF": 4, "WIDTH": 4, "GROUPS": 256, "PACKED": True}
for text, name, warps, budget, constants in (
    (every, "row_kernel", 4, 0, narrow),
    (every, "row_kernel", 8, 0, packed),
    (every, "row_kernel", 16, 64, {**narrow, "BLOCK": WIDEST_FUSED_ROW}),
    ("W", "row_kernel", 16, 128, {**narrow, "BLOCK": WIDEST_ROW}),
    ("W", "long_row_kernel", 8, 0, packed),
    (every, "pattern_kernel", 4, 0, pairs),
):
    binary = Path(sys.argv[1]) / "kernel.cubin"
    binary.write_bytes(compiled(text, name, warps, **constants)["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall("REG:([0-9]+) STACK:([0-9]+)", usage)[0])
    assert stack <= budget, (text, name, constants, registers, stack)

# Multiply and add stay two roundings, as in torch.
assert "fma.rn.f32" not in compiled("abs(W) * X + 0.5 * G", "score_kernel", BLOCK=1024)["ptx"]
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernels")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
