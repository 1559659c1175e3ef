"""How near to what the hardware can do are scores and masks, and how far from published code?

    python benchmarks/scoring.py                        # on the GPU, where there is one
    python benchmarks/scoring.py --device cpu --shapes 4096x11008 11008x4096
    python benchmarks/scoring.py --report               # only write table and picture anew

Four parts. `copy` is the bandwidth of a copy within the memory of the device. `matrix` times score
and mask of one matrix: as published code makes them in torch, the same with torch.topk, the same
with a score from torch.compile, and by prunezero, on a GPU also by its kernels alone (replayed as a
CUDA graph, without what Python spends); their masks are compared, and what has to be read and
written at least is set against the copy. `population` scores 1, 8 and 64 formulas at once on
sampled rows of all layers of a model, as a search does. `model` is Wanda on all linear layers of a
model, one after the other.

Weights are random. Contenders take turns and are timed by the clock of the device (`turns.py`);
what Python spends on a call counts. What does not fit the memory of the device, or 6 GiB on a CPU,
is left out with a line that says so. Finished rows are kept in docs/results/scoring.jsonl, so a
second start goes on behind the last one, on the same or on another device; after a change of the
code, take the old rows away first. docs/results/scoring.md is the table of medians over all devices
in the file, and docs/results/scoring.png the picture. Both go to MLflow with the medians, in the
runs folder's database unless MLFLOW_TRACKING_URI names another place.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pruning import cpu_name
from published_selection import FORMULAS, REQUESTS
from rows import append, read
from scoring_parts import (
    MODELS,
    Row,
    Work,
    copy_bytes,
    copy_work,
    matrix_bytes,
    matrix_work,
    model_bytes,
    model_work,
)
from scoring_population import TOGETHER, population_bytes, population_work
from scoring_report import KEYS, draw, latest, report, to_mlflow, told
from turns import Times, in_turn

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
DTYPES = ("float32", "bfloat16")
SHAPES = ("576x576", "1536x576", "576x1536", "4096x4096")
WIDE_SHAPES = ("4096x11008", "11008x4096")
GIB = 1 << 30
ROOM_ON_CPU = 6 * GIB


@dataclass(frozen=True)
class Part:
    """One kind of measurement."""

    heads: Callable[[argparse.Namespace], Iterator[Row]]
    """what is asked for, from copies to models"""
    work: Callable[..., dict[str, Work]]
    """the contenders for one of them"""
    size: Callable[[Row], int]
    """bytes that they hold at most"""
    names: Callable[[argparse.Namespace], list[str]]
    """of the contenders"""


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write the table and the picture and tell MLflow."""
    arguments = parsed(words)
    path = arguments.results / "scoring.jsonl"
    if not arguments.report:
        torch.set_num_threads(arguments.threads)
        with torch.no_grad():
            measure(arguments, path)
    rows = latest(read(path))
    if not rows:
        raise SystemExit(f"{path} has no row; run without --report first")
    text = "\n".join(report(rows))
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(text + "\n")
    draw(rows, picture)
    print(text)
    to_mlflow(rows, arguments.runs, (table, picture))


def parsed(words: list[str] | None) -> argparse.Namespace:
    """What was asked for, with what follows from the device filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32; bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", type=shape, help="rows x columns, as in 4096x11008")
    parser.add_argument("--formulas", nargs="+", choices=FORMULAS, default=list(FORMULAS))
    parser.add_argument("--requests", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, help="demo; and 7b on a GPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds MLflow's database")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args(words)
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no CUDA device here; say --device cpu")
    if min(arguments.repeats, arguments.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    arguments.device = arguments.device or ("cuda" if has_gpu else "cpu")
    on_gpu = arguments.device == "cuda"
    arguments.machine = torch.cuda.get_device_name() if on_gpu else cpu_name()
    arguments.dtypes = arguments.dtypes or ["bfloat16" if on_gpu else "float32"]
    arguments.shapes = arguments.shapes or [*SHAPES, *(WIDE_SHAPES if on_gpu else ())]
    arguments.models = arguments.models or (["demo", "7b"] if on_gpu else ["demo"])
    return arguments


def shape(word: str) -> str:
    """A word such as 4096x11008."""
    rows, _, columns = word.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        example = "say rows and columns, as in 4096x11008"
        raise argparse.ArgumentTypeError(f"'{word}' is no shape; {example}")
    if int(columns) % 4:
        raise argparse.ArgumentTypeError(
            f"shape '{word}' has {columns} columns, but 2:4 needs a multiple of 4"
        )
    return word


def copy_heads(arguments: argparse.Namespace) -> Iterator[Row]:
    """The one copy."""
    yield {"dtype": "float32", "shape": "1 GiB", "formula": "", "request": ""}


def matrix_heads(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every shape, by every formula and request."""
    for dtype in arguments.dtypes:
        for word in arguments.shapes:
            for formula in arguments.formulas:
                for request in arguments.requests:
                    yield {"dtype": dtype, "shape": word, "formula": formula, "request": request}


def population_heads(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every model; the dtype is that of the Gram matrices."""
    for dtype in arguments.dtypes:
        for model in arguments.models:
            yield {"dtype": dtype, "shape": model, "formula": "random", "request": "rows"}


def model_heads(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every model."""
    for dtype in arguments.dtypes:
        for model in arguments.models:
            yield {"dtype": dtype, "shape": model, "formula": "wanda", "request": "rows"}


def matrix_names(arguments: argparse.Namespace) -> list[str]:
    """Who makes masks of a matrix."""
    kernels = ["kernels"] * (arguments.device == "cuda")
    return ["published", "topk", *["compiled"] * arguments.compile, "prunezero", *kernels]


PARTS = {
    "copy": Part(copy_heads, copy_work, copy_bytes, lambda arguments: ["copy"]),
    "matrix": Part(matrix_heads, matrix_work, matrix_bytes, matrix_names),
    "population": Part(
        population_heads,
        population_work,
        population_bytes,
        lambda arguments: [f"{n} to {what}" for n in TOGETHER for what in ("masks", "errors")],
    ),
    "model": Part(
        model_heads, model_work, model_bytes, lambda arguments: ["published", "prunezero"]
    ),
}


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Append the rows that the file does not hold yet."""
    place = {name: getattr(arguments, name) for name in ("device", "machine", "threads")}
    done = {tuple(row[key] for key in KEYS): row["repeats"] for row in latest(read(path))}
    for name in arguments.parts:
        part = PARTS[name]
        for asked in part.heads(arguments):
            head = {"part": name, **place, **asked}
            wanted = [head | {"contender": one} for one in part.names(arguments)]
            # Ratios are of contenders that took turns, so all of them are measured, or none.
            repeats = [done.get(tuple(row[key] for key in KEYS), 0) for row in wanted]
            if min(repeats) >= arguments.repeats or not fits(part.size(head), head):
                continue
            for row in measured(part, head, arguments):
                append(path, row)
                print(told(row), flush=True)


def measured(part: Part, head: Row, arguments: argparse.Namespace) -> list[Row]:
    """The rows of all contenders for the same."""
    works = part.work(head, with_compile=arguments.compile)
    calls = {name: work.call for name, work in works.items()}
    times = in_turn(calls, torch.device(head["device"]), arguments.repeats)
    return [
        head
        | {"contender": name, "repeats": arguments.repeats, "torch": torch.__version__}
        | {"seconds": [one / work.facts.get("rounds", 1) for one in times[name].seconds]}
        | {"calls": times[name].calls, "first_seconds": times[name].first_seconds}
        | {"differing": differing(works, times, name)}
        | work.facts
        for name, work in works.items()
    ]


def differing(works: dict[str, Work], times: dict[str, Times], name: str) -> int | None:
    """On how many weights a contender and published code disagree; None where none has a mask."""
    mask, reference = (times[one].result if one in times else None for one in (name, "published"))
    if mask is None or reference is None:
        return None
    return int(((mask ^ works[name].says_kept) != reference).sum())


def fits(size: int, head: Row) -> bool:
    """Whether so many bytes are free; says so where they are not."""
    on_gpu = head["device"] == "cuda"
    if on_gpu:
        # What torch keeps for later counts as taken otherwise.
        torch.cuda.empty_cache()
    room: Any = torch.cuda.mem_get_info()[0] if on_gpu else ROOM_ON_CPU
    if size <= room:
        return True
    print(
        f"{head['part']} of {head['shape']} in {head['dtype']} is left out: it needs about "
        f"{size / GIB:.1f} GiB, and {room / GIB:.1f} are "
        + ("free on the GPU" if on_gpu else "allowed on a CPU")
    )
    return False


if __name__ == "__main__":
    main()
