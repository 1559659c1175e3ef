"""Does one step of `pruning.py` in a process of its own, so that its peak memory is its alone.

Told the path of a JSON file, it does what stands there under "step", and writes what it found to
the path under "result".
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rivals_in_torch import prune_block_by_block
from seconds_and_memory import measured

from prunezero.models.anatomy.linears import find_linears
from prunezero.models.evaluation import evaluate
from prunezero.models.loading.language_model import LanguageModel
from prunezero.models.loading.load import load_model, save_model
from prunezero.models.observing.calibration import calibrate
from prunezero.pruning.prune import prune
from prunezero.pruning.recipes.recipe import Recipe
from prunezero.pruning.requirements import dense_sums
from prunezero.pruning.testbed import Settings, set_up, with_choices
from prunezero.scoring.request import parse_pattern

Row = dict[str, Any]


def main(path: Path) -> None:
    """Do one step."""
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    Path(job["result"]).write_text(json.dumps(STEPS[job["step"]](job)))


def prepare(job: Row) -> Row:
    """Save the dense model in float32 and the token windows, which every contender starts from."""
    settings = Settings(
        sequence_length=job["sequence_length"],
        calibration_tokens=job["calibration_tokens"],
        test_tokens=job["test_tokens"],
        seed=job["seed"],
    )
    testbed = set_up(job["model"], job["text"], settings, dtype="float32", device="cpu")
    save_model(testbed.language_model, job["dense"])
    ids = {split: testbed.windows(split).tolist() for split in ("calibration", "test")}
    if job.get("order") == "reversed":
        ids["calibration"].reverse()
    Path(job["windows"]).write_text(json.dumps(ids))
    return {}


def prune_here(job: Row) -> Row:
    """Prune by a contender of this environment, and measure what is left."""
    windows = windows_of(job, "calibration")
    recipe = with_choices(Recipe.load(job["method"]), pattern=job["pattern"])
    pattern = parse_pattern(job["pattern"])
    kept = None if pattern is None else (pattern.keep, pattern.of)
    begin = time.perf_counter()
    model = loaded(job, job["dense"])
    loading = time.perf_counter() - begin
    method, sparsity = job["method"], job["sparsity"]

    def from_the_dense_model() -> None:
        once = with_choices(recipe, statistics="dense")
        layers = find_linears(model.model)
        sums = calibrate(model, windows, layers, dense_sums([once]))
        prune(model, once, sparsity, statistics=sums, windows=windows)

    calls = {
        # Sequential statistics are collected as it prunes, so there is nothing to find in a cache.
        "prunezero": lambda: prune(model, recipe, sparsity, windows=windows),
        "prunezero, dense": from_the_dense_model,
        "straightforward": lambda: prune_block_by_block(
            model.model, windows, method, sparsity, kept
        ),
    }
    found = measured(calls[job["contender"]])
    versions = {name: version(name) for name in ("prunezero", "torch", "transformers")}
    return found | {"load_seconds": loading, "versions": versions} | quality(job, model)


def measure(job: Row) -> Row:
    """Measure a saved model, dense or pruned elsewhere."""
    return quality(job, loaded(job, job["pruned"]))


def loaded(job: Row, folder: str) -> LanguageModel:
    """The model of a folder, on the CPU."""
    return load_model(folder, dtype=job["dtype"], device="cpu")


def windows_of(job: Row, split: str) -> torch.Tensor:
    """Token ids `[count, length]` of a split."""
    return torch.tensor(json.loads(Path(job["windows"]).read_text())[split])


def quality(job: Row, model: LanguageModel) -> Row:
    """What every contender is judged by: the zeros in its layers, and perplexity on test text."""
    weights = [layer.weight for layer in find_linears(model.model)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "sparsity_reached": zeros / sum(weight.numel() for weight in weights),
        "test_perplexity": evaluate(model, windows_of(job, "test")).perplexity,
    }


STEPS = {"prepare": prepare, "prune": prune_here, "measure": measure}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
