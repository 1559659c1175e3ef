"""Kernels compiled for a GPU that is not there, and what they would need on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wish:
    """One kernel to compile."""

    source: str
    """the text of its file"""
    kernel: str
    """its name there"""
    kinds: dict[str, str]
    """Triton's word for the type of each argument that is no constant"""
    constants: dict[str, Any] = field(default_factory=dict)
    """by name"""
    warps: int = 4


@dataclass(frozen=True)
class Compiled:
    """A kernel for compute capability 9.0."""

    registers: int
    """of a thread"""
    stack: int
    """bytes that a thread spills"""
    ptx: str
    ttir: str
    """as Triton saw it before it chose layouts"""


def compile_all(wishes: list[Wish], folder: Path) -> list[Compiled]:
    """The kernels, compiled in a process of their own: this one may run the interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    (folder / "wishes.json").write_text(json.dumps([asdict(wish) for wish in wishes]))
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [Compiled(**one) for one in json.loads((folder / "compiled.json").read_text())]


def _main(folder: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prunezero.scoring.kernels.files import import_kernels
    from prunezero.scoring.kernels.launches import KERNEL_OPTIONS

    found = []
    for wish in json.loads((folder / "wishes.json").read_text()):
        kernel = getattr(import_kernels(wish["source"], folder / "kernels"), wish["kernel"])
        constants = wish["constants"]
        signature = {
            name: "constexpr" if name in constants else wish["kinds"][name]
            for name in kernel.arg_names
        }
        options = {**KERNEL_OPTIONS, "num_warps": wish["warps"]}
        source = ASTSource(kernel, signature, constexprs=constants)
        asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        found.append({**_resources(asm["cubin"], folder), "ptx": asm["ptx"], "ttir": asm["ttir"]})
    (folder / "compiled.json").write_text(json.dumps(found))


def _resources(binary: bytes, folder: Path) -> dict[str, int]:
    import re

    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall("REG:([0-9]+) STACK:([0-9]+)", usage)[0])
    return {"registers": registers, "stack": stack}


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
