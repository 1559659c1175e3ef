"""Do two versions of prunezero prune to the same bits, and search the same way?

    git worktree add ../before TAG; cd ../before; python THIS/benchmarks/same_bits.py before.jsonl
    python benchmarks/same_bits.py after.jsonl --against ../before/before.jsonl

A change that is not meant to change any number is held to it here: every recipe of `baselines/` and
`docs/results/found/`, free and 2:4, on dense and sequential statistics, in float32 and bfloat16, on
tiny models of two families and, with --demo, on the demo model; and short seeded searches of every
space. All through the command line, which both versions have. A line of the file is a request and
the digest of the weights that it saved, of the candidates that it found, or how it was refused.
Finished lines are not computed again, so a second start goes on behind the last one. Bits depend on
the processor and on the version of torch, so both files have to come from one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

SIZES = "--sequence-length {} --calibration-tokens {} --evaluation-tokens {} --test-tokens {}"
TINY, DEMO = SIZES.format(16, 128, 64, 64), SIZES.format(128, 1024, 256, 256)
# Columns of a table of candidates that say how a search went.
KEPT = (
    *("slot", "generation", "origin", "parents", "status", "formula", "choices", "mask"),
    *("layer_error", "kl", "search_perplexity", "validation_perplexity"),
)

Request = dict[str, Any]


def main() -> None:
    """Write what is missing of the file, then compare it with another one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path, help="file of the other version")
    parser.add_argument("--demo", action="store_true", help="the demo model too: half an hour")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        write(arguments.file, Path(name), with_demo=arguments.demo)
    if arguments.against is not None:
        compare(read(arguments.against), read(arguments.file))


def write(path: Path, scratch: Path, *, with_demo: bool) -> None:
    """Append a line for each request that the file does not hold yet."""
    done = read(path)
    prepare(scratch)
    for request in [*prunings(("llama", "gpt2")), *searches(), *(demo() if with_demo else ())]:
        if key_of(request) not in done:
            found = answer(request, scratch)
            with path.open("a") as file:
                file.write(json.dumps(request | {"found": found}) + "\n")
            print(*request.values(), found[:90], flush=True)


def compare(before: dict[str, str], after: dict[str, str]) -> None:
    """Say which requests end otherwise; exit code 1 if some do."""
    both = before.keys() & after.keys()
    unlike = sorted(key for key in both if before[key] != after[key])
    for key in unlike:
        print(f"{key}\n  before: {before[key]}\n  after:  {after[key]}")
    print(f"{len(both)} requests stand in both files; {len(unlike)} of them end otherwise")
    sys.exit(1 if unlike or not both else 0)


def read(path: Path) -> dict[str, str]:
    """What was found, by the request."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {key_of({k: v for k, v in row.items() if k != "found"}): row["found"] for row in rows}


def key_of(request: Request) -> str:
    """The request on one line."""
    return json.dumps(request, sort_keys=True)


def recipes() -> list[str]:
    """Every recipe of the repository, as a path inside it."""
    return [
        str(path.relative_to(HERE))
        for folder in ("baselines", "docs/results/found")
        for path in sorted((HERE / folder).glob("*.yaml"))
    ]


def prunings(models: tuple[str, ...]) -> Iterator[Request]:
    """All recipes in all ways on tiny models."""
    for model, recipe, pattern, statistics, dtype in itertools.product(
        models, recipes(), ("free", "2:4"), ("dense", "sequential"), ("float32", "bfloat16")
    ):
        yield {
            **{"model": model, "recipe": recipe, "pattern": pattern},
            **{"statistics": statistics, "dtype": dtype},
        }


def demo() -> Iterator[Request]:
    """All recipes on the demo model but the slowest, each way of looking with one pattern."""
    quick = [recipe for recipe in recipes() if "swaps" not in recipe]
    for recipe, (pattern, statistics, dtype) in itertools.product(
        quick, (("free", "dense", "float32"), ("2:4", "sequential", "float32"))
    ):
        yield {
            **{"model": "demo", "recipe": recipe, "pattern": pattern},
            **{"statistics": statistics, "dtype": dtype},
        }
    for recipe in ("wanda", "gblm", "sparsegpt", "ria", "dsnot", "pruner_zero"):
        yield {
            **{"model": "demo", "recipe": f"baselines/{recipe}.yaml", "pattern": "free"},
            **{"statistics": "sequential", "dtype": "bfloat16"},
        }


def searches() -> Iterator[Request]:
    """Every space, free and 2:4, and the ways that a search may be asked for."""
    ways = ["--sparsity 0.5", "--pattern 2:4"]
    for path in sorted((HERE / "search_spaces").glob("*.yaml")):
        for way in ways:
            yield {"model": "llama", "space": path.stem, "options": way}
    for way in (
        *("--sparsity 0.5 --also 0.7,2:4", "--sparsity 0.5 --draws 2"),
        *("--sparsity 0.5 --signals activations", "--sparsity 0.5 --from-scratch"),
        *("--sparsity 0.5 --strategy random", "--sparsity 0.5 --also-model GPT2"),
        *("--sparsity 0.5 --workers 2 --threads 1", "--sparsity 0.5 --targets mlp"),
    ):
        yield {"model": "llama", "space": "formulas", "options": way}


def prepare(scratch: Path) -> None:
    """Save tiny models and a text; everything else goes to the scratch folder as well."""
    import os

    import torch

    from tests.tiny_models import save_tiny_model

    torch.set_num_threads(1)
    os.environ["PRUNEZERO_CACHE"] = str(scratch / "cache")
    for family in ("llama", "gpt2"):
        save_tiny_model(family, scratch / family)
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices("abcdefgh ,.", k=200)) for _ in range(60)]
    (scratch / "letters.txt").write_text("\n\n".join(paragraphs))


def answer(request: Request, scratch: Path) -> str:
    """The digest of what a request made, or how it was refused."""
    import shutil

    is_demo = request["model"] == "demo"
    model = "--model demo --text demo" if is_demo else f"--model {scratch / request['model']}"
    text = "" if is_demo else f" --text {scratch / 'letters.txt'}"
    common = f"{model}{text} {DEMO if is_demo else TINY}"
    place = scratch / "result"
    shutil.rmtree(place, ignore_errors=True)
    if "space" in request:
        options = request["options"].replace("GPT2", str(scratch / "gpt2"))
        said = run(
            f"search {common} {options} --space {request['space']} --budget 24 --seed 3 "
            f"--runs-dir {place} --name it"
        )
        table = place / "it" / "candidates.parquet"
        return digest_of_search(table) if table.exists() else said
    asked = " --sparsity 0.5" if request["pattern"] == "free" else ""
    said = run(
        f"prune {common} --recipe {HERE / request['recipe']} --pattern {request['pattern']}{asked} "
        f"--statistics {request['statistics']} --dtype {request['dtype']} --output {place}"
    )
    return digest_of_model(place) if place.exists() else said


def run(command: str) -> str:
    """Run a command in this process; the last of what it said, without names of the scratch."""
    from typer.testing import CliRunner

    from prunezero.cli import app

    result = CliRunner().invoke(app, command.split())
    told = str(result.exception) if result.exception else result.output
    return " ".join(told.replace(tempfile.gettempdir(), "").split())[-400:]


def digest_of_model(folder: Path) -> str:
    """Names, dtypes, shapes and bytes of all tensors of a saved model."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_search(path: Path) -> str:
    """All candidates with their numbers, without times."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(path).to_pylist()
    kept = [[row.get(key) for key in KEPT] for row in rows]
    return f"{len(rows)} candidates " + hashlib.sha256(json.dumps(kept).encode()).hexdigest()


if __name__ == "__main__":
    main()
