"""Which machine is this, as far as numbers and times depend on it?"""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from prunezero.files.digests import joined_digest


@lru_cache(maxsize=1)
def processor() -> str:
    """Hexadecimal digest of what a processor can do, by which libraries choose their kernels."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for key in ("model name", "flags", "Features"):
            found += [line for line in lines if line.startswith(key)][:1]
    return joined_digest(found)


def conditions(device: torch.device) -> list[str]:
    """Words that change with whatever of this machine and its libraries may change a number."""
    return [
        device.type,
        *graphics(device).values(),
        processor(),
        str(torch.get_num_threads()),
        *(version(name) for name in ("prunezero", "torch", "transformers")),
    ]


def graphics(device: torch.device) -> dict[str, str]:
    """Which GPU computes, as `gpu`; nothing where none does."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
