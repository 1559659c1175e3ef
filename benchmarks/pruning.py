"""How many seconds and how much memory does a whole pruning take, here and elsewhere?

    python benchmarks/pruning.py                              # against plain torch loops
    python benchmarks/pruning.py --llm-compressor PYTHON      # and against llm-compressor
    python benchmarks/pruning.py --report                     # only write table and picture anew

PYTHON is the interpreter of an environment of its own, because llm-compressor 0.14 asks for an
older transformers than prunezero has; torch comes first, so that it is that of the CPU:

    python3 -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \
        torch==2.13.0+cpu
    ENVIRONMENT/bin/pip install llmcompressor==0.14.0.1

All contenders load the same dense folder, calibrate on the same token windows, prune all linear
layers inside the blocks, and are measured by one evaluation on test text. `straightforward` is
`rivals_in_torch.py`; `prunezero, dense` takes the statistics of all blocks from the dense model, in
one pass. Every row has a process of its own; contenders take turns, and who begins
changes from one repeat to the next. Seconds are those of calibration and pruning; loading, saving
and evaluation come apart. Every finished row is kept in docs/results/pruning.jsonl, so a second
start goes on behind the last one; after a change of the code, take the old rows away first.
docs/results/pruning.md is the table of medians, and docs/results/pruning.png the picture. Both go
to MLflow with the medians, in the runs folder's database unless MLFLOW_TRACKING_URI names another
place.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pruning_report import draw, report, to_mlflow
from rows import append, read

from prunezero.errors import PruneZeroError
from prunezero.scoring.request import pattern_sparsity, removed_count

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
METHODS = ("wanda", "ria", "sparsegpt")
TARGETS = ({"sparsity": 0.5, "pattern": "free"}, {"sparsity": 0.5, "pattern": "2:4"})
# Who takes part, and by which methods.
CONTENDERS = {
    "prunezero": METHODS,
    "prunezero, dense": ("wanda", "ria"),
    "straightforward": METHODS,
    "llm-compressor": ("wanda", "sparsegpt"),
}
CONDITIONS = (
    *("model", "text", "dtype", "calibration_tokens", "sequence_length", "test_tokens"),
    *("seed", "threads", "cpu"),
)
KEYS = (*CONDITIONS, "contender", "method", "sparsity", "pattern", "repeat")
ASK_FOR_RIVAL = "name its interpreter by --llm-compressor PYTHON (--help: how to make one)"

Row = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write the table and the picture and tell MLflow."""
    arguments = parsed(words)
    path = arguments.results / "pruning.jsonl"
    conditions = {name: getattr(arguments, name) for name in CONDITIONS}
    if not arguments.report:
        measure(arguments, conditions, path)
    rows = [row for row in read(path) if conditions.items() <= row.items()]
    if not rows:
        raise SystemExit(f"{path} has no row under these conditions; run without --report first")
    text = "\n".join(report(rows))
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(text + "\n")
    draw(rows, picture)
    print(text)
    to_mlflow(rows, conditions, arguments.runs, (table, picture))


def parsed(words: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=target, default=TARGETS)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds MLflow's database")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args(words)
    arguments.cpu = cpu_name()
    return arguments


def target(word: str) -> Row:
    """The sparsity and pattern in a word such as free:0.7 or 2:4."""
    try:
        free, _, number = word.partition(":")
        pattern = "free" if free == "free" else word
        implied = pattern_sparsity(pattern)
        sparsity = float(number) if implied is None else implied
        removed_count(1, sparsity)
    except (PruneZeroError, ValueError) as error:
        example = "say free:0.5 for half of the weights, or a pattern such as 2:4"
        raise argparse.ArgumentTypeError(f"'{word}' is no target ({error}); {example}") from error
    return {"sparsity": sparsity, "pattern": pattern}


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(arguments: argparse.Namespace, conditions: Row, path: Path) -> None:
    """Append the rows that the file does not hold yet."""
    if not arguments.llm_compressor:
        print(f"llm-compressor is left out; {ASK_FOR_RIVAL}")
    done = {tuple(row[key] for key in KEYS) for row in read(path)}
    jobs = [conditions | head for head in wanted(arguments)]
    missing = [job for job in jobs if tuple(job[key] for key in KEYS) not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="pruning-") as name:
        scratch = Path(name)
        in_process(conditions | {"step": "prepare"}, scratch)
        for job in missing:
            row = job | row_of(job, scratch, arguments.llm_compressor)
            append(path, row)
            print(told(row), flush=True)


def wanted(arguments: argparse.Namespace) -> Iterator[Row]:
    """The dense model, then every pruning in its turn."""
    yield {"contender": "dense", "method": "", "sparsity": 0.0, "pattern": "free", "repeat": 0}
    names = [name for name in CONTENDERS if name != "llm-compressor" or arguments.llm_compressor]
    for repeat in range(arguments.repeat):
        first = repeat % len(names)
        for asked in arguments.targets:
            for method in arguments.methods:
                for contender in names[first:] + names[:first]:
                    if method in CONTENDERS[contender]:
                        head = {"contender": contender, "method": method, "repeat": repeat}
                        yield head | asked


def row_of(job: Row, scratch: Path, llm_compressor: str | None) -> Row:
    """What one contender is found to do."""
    if job["contender"] == "dense":
        return in_process(job | {"step": "measure"}, scratch, pruned="dense")
    if job["contender"] != "llm-compressor":
        return in_process(job | {"step": "prune"}, scratch)
    found = in_process(job, scratch, python=llm_compressor, script="rival_llm_compressor.py")
    found |= in_process(job | {"step": "measure"}, scratch)
    shutil.rmtree(scratch / "pruned")
    return found


def in_process(
    job: Row,
    scratch: Path,
    *,
    pruned: str = "pruned",
    python: str | None = None,
    script: str = "pruning_row.py",
) -> Row:
    """What a script in a process of its own writes down as its result.

    Args:
        scratch: folder of the dense model, the windows, the result, and what a rival pruned.
        pruned: folder in it that is measured, or pruned to.
    """
    places = {"dense": "dense", "pruned": pruned, "windows": "windows.json", "result": "row.json"}
    file = scratch / "job.json"
    file.write_text(json.dumps(job | {key: str(scratch / name) for key, name in places.items()}))
    command = [python or sys.executable, str(HERE / script), str(file)]
    try:
        subprocess.run(command, env=environment(job, scratch), check=True, capture_output=True)
    except OSError as error:
        reason = f"{command[0]} cannot be run ({error.strerror})"
        raise SystemExit(f"{reason}; {ASK_FOR_RIVAL}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        what = " ".join(str(job.get(key, "")) for key in ("step", "contender", "method", "pattern"))
        raise SystemExit(f"{script} failed at {' '.join(what.split())}: {lines[-1]}") from error
    return json.loads((scratch / "row.json").read_text())


def environment(job: Row, scratch: Path) -> dict[str, str]:
    """Variables that give every process as many threads, no GPU and no network."""
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    own = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if job.get("step") != "prepare":
        # Nothing that an earlier run kept may help.
        own["PRUNEZERO_CACHE"] = str(scratch / "cache")
    return os.environ | threads | own


def told(row: Row) -> str:
    """One row for reading."""
    if row["contender"] == "dense":
        return f"dense: perplexity {row['test_perplexity']:.2f}"
    return (
        f"{row['method']} {row['sparsity']:g} {row['pattern']} {row['contender']} repeat "
        f"{row['repeat']}: {row['seconds']:.1f} s, {row['peak_mib']:.0f} MiB, "
        f"{100 * row['sparsity_reached']:.2f} % zeros, perplexity {row['test_perplexity']:.2f}"
    )


if __name__ == "__main__":
    main()
