"""`prunezero doctor`: what this machine has, and what prunezero will do with it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prunezero.cli.options import JsonFile, RunsDir, check_json, write_json
from prunezero.errors import masked_uri, reason

_PACKAGES = (
    "torch transformers triton sympy optuna mlflow datasets safetensors gguf accelerate".split()
)


def doctor(json_file: JsonFile = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Show versions, devices, which `--dtype` is faster here, and where things are kept.

    Examples:

        prunezero doctor

        prunezero doctor --json doctor.json
    """
    from prunezero.cli.fitting import Table
    from prunezero.cli.tables import console

    check_json(json_file)
    facts = {**_versions(), **_machine(), **_places(runs_dir)}
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    write_json(facts, json_file)


def _versions() -> dict[str, str]:
    found = {"prunezero": version("prunezero"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, str]:
    import torch

    from prunezero.models.loading.load import trial_dtypes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    trial = trial_dtypes(device)
    times = ", ".join(f"{dtype} {1000 * seconds:.1f} ms" for dtype, seconds in trial.items())
    has_triton = importlib.util.find_spec("triton") is not None
    has_kernels = device.type == "cuda" and has_triton
    how = f"Triton kernels; {_parity()}" if has_kernels else "torch and numpy, some rows at a time"
    return {
        "device": f"{device} ({name}), {torch.get_num_threads()} threads",
        "one product": f"{times}: {min(trial, key=lambda dtype: trial[dtype])} is faster here",
        "scoring": how,
    }


def _parity() -> str:
    """How masks by kernels differ from those of the CPU, for a formula of many functions."""
    import torch

    from prunezero.formula.criterion import Criterion
    from prunezero.scoring.parity import parity

    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.rand(256, 4096, generator=generator).cuda() for _ in range(2))
    criterion = Criterion.parse("abs(W)**0.7 * log(G + 1) + tanh(W) * sqrt(G) + exp(-W)")
    try:
        return f"beside the CPU {parity(criterion, weight, {'G': gradient}, 0.5)}"
    # Whatever keeps kernels from running is what doctor is asked for.
    except Exception as error:
        return f"they do not run here: {reason(error)}"


def _places(runs_dir: Path) -> dict[str, str]:
    from prunezero.files.cache import cache_dir
    from prunezero.models.loading.gguf import DEMO_PACKAGE
    from prunezero.report.tracking.tracker import tracking_uri

    cache = cache_dir()
    files = [path for path in cache.rglob("*") if path.is_file()] if cache.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    packages = {"demo model": DEMO_PACKAGE, "demo text": "gensim"}
    return {
        "cache": f"{cache} ({size / 2**30:.2f} GiB)",
        "runs": str(runs_dir.absolute()),
        "tracking": masked_uri(tracking_uri(runs_dir)),
        **{
            name: "installed" if importlib.util.find_spec(package) else "not installed: make setup"
            for name, package in packages.items()
        },
    }
