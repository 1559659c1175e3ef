"""How much memory do prune, compare and search take on models of 1B to 70B, told by their shapes?

    python benchmarks/memory_plan.py                     # minutes, no GPU and no weights
    python benchmarks/memory_plan.py --report            # only the page anew

Shapes are those that the models' configurations publish. Estimates are of `prunezero plan`, which
tests hold to measured peaks on small models: never below, and at most 1.5 times as much. Rows are
kept in docs/results/memory.jsonl, docs/results/memory.md is the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rows import append, read, under_equal

from prunezero.cli.plan import DEVICES_GB, OF_SIGNALS, planned_rows
from prunezero.models.loading.outline import outlined_model
from prunezero.pruning.recipes.staged import load_recipe
from prunezero.pruning.testbed import Settings

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
Row = dict[str, Any]

# Of meta-llama/Llama-3.2-1B, Llama-2-7b-hf, Llama-2-13b-hf and Llama-2-70b-hf.
SHAPES: dict[str, dict[str, int | bool]] = {
    "Llama 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama 7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "Llama 13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "Llama 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
# Tokens in a window; 128 windows of calibration text, as the papers have it.
LENGTHS = (256, 2048)
WINDOWS = 128


def main() -> None:
    """Estimate, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true")
    path = RESULTS / "memory.jsonl"
    if not parser.parse_args().report:
        path.unlink(missing_ok=True)
        for name in SHAPES:
            for length in LENGTHS:
                for row in estimated(name, length):
                    append(path, row)
    text = "\n".join(report(read(path))) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)


def estimated(name: str, length: int) -> list[Row]:
    """The rows of one model and length of windows, in bfloat16 on a GPU."""
    configuration = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "max_position_embeddings": 4096,
        **SHAPES[name],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(configuration))
        model = outlined_model(folder, device="cuda")
    settings = Settings(length, WINDOWS * length, 64 * length, 64 * length)
    recipes = [load_recipe(word) for word in OF_SIGNALS.split(",")]
    parameters = sum(one.numel() for one in model.model.parameters())
    facts = {"model": name, "parameters": parameters, "length": length, "dtype": model.dtype_word}
    return [facts | row for row in planned_rows(model, recipes, "formulas", settings)]


def report(rows: list[Row]) -> list[str]:
    """The lines of the page."""
    devices = ", ".join(map(str, DEVICES_GB))
    lines = [
        "# Memory of prune, compare and search, by shapes",
        "",
        "GiB on a GPU in bfloat16, estimated by `prunezero plan` from configurations alone and "
        f"written by `python benchmarks/memory_plan.py`; {WINDOWS} windows of calibration text. "
        "The formula is held to measured peaks of processes on a CPU, on small models of three "
        "families (`tests/pruning/test_memory_plan.py`): never below, at most 1.5 times as much. "
        f"None of these rows was measured on a GPU. A device of {devices} GB fits where 2 GiB of "
        "it stay free. With a limit, sums stay on disk and dense weights are read from their "
        "files again; gradients then take so many passes over the text at the least limit, and "
        "fewer under a larger one.",
    ]
    for together in under_equal(rows, ("model", "length")):
        first = together[0]
        size = f"{first['parameters'] / 1e9:.1f} billion parameters"
        lines += ["", f"## {first['model']}, windows of {first['length']} tokens ({size})", ""]
        lines += [
            "| work | of | signal | all in memory | fits | least limit | fits | passes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in together]
    return lines


def _line(row: Row) -> str:
    cells = [row["work"], row["what"], row["signal"]]
    for way in ("in_memory", "least_limit"):
        size, device = row[f"{way}_bytes"], row[f"{way}_on_gb"]
        cells.append("-" if size is None else f"{size / 2**30:.1f}")
        cells.append("-" if size is None else f"{device} GB" if device else "none")
    return "| " + " | ".join([*cells, str(row["gradient_passes"] or "-")]) + " |"


if __name__ == "__main__":
    main()
